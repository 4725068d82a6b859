"""Masks over the template zoo: supervised are the assistant's answers and the token that stops each, nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.zoo import ZOO
from tests.tiny import tiny_tokenizer
from tunesmith.data.encode.conversations import encode, find_omitted_text, prompt_ids, render_prompt, stop_ids
from tunesmith.data.encode.spans import SpanError
from tunesmith.data.encode.templates import TEMPLATES, Renderer, apply_template, special_tokens
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Chat, PromptCompletion, Text
from tunesmith.errors import DataError

TOKENIZERS = {name: style.tokenizer() for name, style in ZOO.items()}
WORDS = [
    "Paris.",
    "안녕하세요 👋🏽",
    "end",
    "a  b\n\nc",
    "<think",
    "日本語のテキスト",
    "1 2 3",
    "<|",
    "### Response:",
    "</s",
    "-",
]


def turns(count, system=None, words=WORDS):
    messages = [{"role": "system", "content": system}] if system is not None else []
    for number in range(count):
        messages += [
            {"role": "user", "content": f"ask {words[(number + 3) % len(words)]} {number}"},
            {"role": "assistant", "content": f"{words[(number * 5) % len(words)]} {number}"},
        ]
    return messages


def supervised_texts(example, tokenizer):
    """The text of each run of supervised tokens."""
    ids, mask = example["input_ids"], example["supervised"]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]).astype(int)))
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


def encode_one(row, tokenizer, **options):
    (examples,) = encode([row], tokenizer, **options)
    (example,) = examples
    return example


def is_spoken(style, message, text):
    """True if ``text`` is the content (which the template may trim) and the stop."""
    return text.replace(" " + style.stop, style.stop).strip() == message["content"].strip() + style.stop


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ZOO)
def test_every_answer_and_its_stop_are_supervised(name, count):
    style, tokenizer = ZOO[name], TOKENIZERS[name]
    messages = turns(count)
    texts = supervised_texts(encode_one(Chat(tuple(messages)), tokenizer, train_on="assistant"), tokenizer)
    answers = [message for message in messages if message["role"] == "assistant"]
    if name == "qwen3":
        texts[-1] = texts[-1].replace("<think>\n\n</think>\n\n", "")
    assert len(texts) == count and all(is_spoken(style, answer, text) for answer, text in zip(answers, texts)), texts


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", ZOO)
def test_completion_supervises_the_last_answer_only(name, word):
    style, tokenizer = ZOO[name], TOKENIZERS[name]
    messages = [*turns(2), {"role": "user", "content": word}, {"role": "assistant", "content": word}]
    (text,) = supervised_texts(encode_one(Chat(tuple(messages)), tokenizer), tokenizer)
    assert is_spoken(style, messages[-1], text.replace("<think>\n\n</think>\n\n", "")), text


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].system])
def test_system_turns_are_context(name, system):
    style, tokenizer = ZOO[name], TOKENIZERS[name]
    messages = turns(1, system=system)
    (text,) = supervised_texts(encode_one(Chat(tuple(messages)), tokenizer, train_on="assistant"), tokenizer)
    assert is_spoken(style, messages[-1], text.replace("<think>\n\n</think>\n\n", ""))


@pytest.mark.parametrize("name", ["chatml", "zephyr", "granite", "llama3"])
def test_an_empty_answer_is_its_stop_alone(name):
    messages = [*turns(1), {"role": "user", "content": "and?"}, {"role": "assistant", "content": ""}]
    (text,) = supervised_texts(encode_one(Chat(tuple(messages)), TOKENIZERS[name]), TOKENIZERS[name])
    assert text == ZOO[name].stop


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
SCHEMA = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].tools])
def test_calls_are_supervised_and_tool_answers_are_not(name):
    style, tokenizer = ZOO[name], TOKENIZERS[name]
    messages = (
        {"role": "user", "content": "1+1?"},
        CALL,
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    )
    first, last = supervised_texts(encode_one(Chat(messages, (SCHEMA,)), tokenizer, train_on="assistant"), tokenizer)
    assert '"name": "add"' in first and first.endswith(style.stop) and first.count(style.stop) == 1
    assert "Two." in last and last.endswith(style.stop) and '"2"' not in first + last


def test_a_conversation_may_end_with_a_call():
    tokenizer = TOKENIZERS["mistral"]
    (text,) = supervised_texts(encode_one(Chat(({"role": "user", "content": "1+1?"}, CALL)), tokenizer), tokenizer)
    assert text.startswith("[TOOL_CALLS]") and text.endswith("]</s>")


def test_reasoning_that_the_template_strips_is_reported():
    tokenizer = TOKENIZERS["qwen3"]
    messages = turns(2)
    for message in messages:
        if message["role"] == "assistant":
            message["reasoning_content"] = f"thinking of {message['content']}"
    row = Chat(tuple(messages))
    first, last = supervised_texts(encode_one(row, tokenizer, train_on="assistant"), tokenizer)
    assert first == messages[1]["content"] + "<|im_end|>"
    assert last == f"<think>\n{messages[3]['reasoning_content']}\n</think>\n\n{messages[3]['content']}<|im_end|>"
    assert find_omitted_text(row, Renderer(tokenizer)) == [f"messages[1].reasoning_content: {messages[1]['reasoning_content']!r}"]


def test_tools_that_the_template_omits_are_reported():
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    row = Chat(({"role": "user", "content": "1+1?"}, CALL, {"role": "assistant", "content": "2"}), (tool,))
    plain = tiny_tokenizer(template="chatml")
    plain.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    assert find_omitted_text(row, Renderer(plain)) == ["tools: all 1 of them"]
    assert find_omitted_text(row, Renderer(TOKENIZERS["qwen3"])) == []


@pytest.mark.parametrize("content", ["", "I look up weather in Oslo."])
def test_a_call_that_the_template_omits_is_not_trained_as_an_answer_without_it(content):
    """Words of the question or of the answer do not count as a rendered call."""
    function = {"name": "weather", "arguments": {"in": "Oslo"}}
    call = {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}
    row = Chat(({"role": "user", "content": "weather in Oslo?"}, call))
    for template in (
        "chatml",
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}",
    ):
        with pytest.raises(RowFault, match="template that renders tool calls") as caught:
            encode([Text("fine"), row], tiny_tokenizer(template))
        assert caught.value.index == 1 and "data.template=chatml" in caught.value.fix


PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NAMES_ONLY = PLAIN.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}")
LAST_ONLY = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% if loop.last %}{{ (m.tool_calls or []) | tojson }}{% endif %}<|im_end|>
{% endfor %}"""


def with_call(weight=None, name="weather"):
    """A conversation whose second turn is a call; the tool's answer and the last answer follow."""
    function = {"name": name, "arguments": {"city": "Oslo", "days": 2}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    turns = ({"role": "user", "content": "weather in Oslo, 2 days?"}, call | ({} if weight is None else {"weight": weight}))
    return (*turns, {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "It rains."})


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
@pytest.mark.parametrize(
    ("template", "omitted"), [(PLAIN, "weather"), (NAMES_ONLY, "the argument 'city' of weather"), (LAST_ONLY, "weather")]
)
def test_a_call_that_the_template_omits_from_the_context_is_refused(template, omitted, train_on):
    """The model would read the answer of a tool that nobody called: in training, and in generation."""
    tokenizer, renderer = tiny_tokenizer(template), Renderer(tiny_tokenizer(template))
    for weight in (0,) if train_on == "assistant" else (None, 0):
        row = Chat(with_call(weight))
        with pytest.raises(RowFault, match="template that renders tool calls") as caught:
            encode([Text("fine"), row], tokenizer, train_on=train_on)
        assert caught.value.index == 1 and caught.value.got.startswith(f"messages[1].tool_calls[0]: {omitted}")
    with pytest.raises(SpanError, match="renders tool calls"):
        render_prompt(Chat(row.messages[:3]), renderer)


def test_calls_of_the_context_are_checked_by_one_rendering(monkeypatch):
    """Whatever their number: a template that writes them is not asked about each."""
    from tunesmith.data.encode import spans

    monkeypatch.setattr(spans, "omitted_calls", lambda *given: pytest.fail("a call was tried alone"))
    rows = [Chat(with_call()), Chat(with_call() + with_call(name="<odd> & name"))]
    assert len(encode(rows, TOKENIZERS["qwen3"])) == 2


def test_a_template_that_knows_functions_by_name_keeps_their_calls():
    """It writes nothing for the names that the check puts in their place."""
    known = "{% for c in m.tool_calls or [] if c.function.name == 'weather' %}{{ c.function.arguments | tojson }}{% endfor %}"
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }}" + known)
    assert len(encode([Chat(with_call())], tiny_tokenizer(template))) == 1
    with pytest.raises(RowFault, match="renders tool calls"):
        encode([Chat(with_call(name="other"))], tiny_tokenizer(template))


@pytest.mark.parametrize(
    "written", ["weather({{ k }}={{ v }})", "{{ k }}: {{ v | upper }}", '{{ c.function | tojson | replace("O", "0") }}']
)
def test_a_call_may_be_rendered_in_any_notation(written):
    call = "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}" + written + "{% endfor %}"
    template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}" + call + "{% endfor %}</s>{% endfor %}"
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    row = Chat(({"role": "user", "content": "x"}, {**CALL, "tool_calls": [{"type": "function", "function": function}]}))
    (text,) = supervised_texts(encode_one(row, tokenizer := tiny_tokenizer(template)), tokenizer)
    assert text.startswith("weather") and text.endswith("</s>")


def test_reasoning_alone_that_the_template_omits_is_not_trained_as_an_empty_answer():
    row = Chat(({"role": "user", "content": "x"}, {"role": "assistant", "content": "", "reasoning_content": "hm"}))
    with pytest.raises(RowFault, match="reasoning_content alone"):
        encode([row], TOKENIZERS["chatml"])
    (text,) = supervised_texts(encode_one(row, TOKENIZERS["qwen3"]), TOKENIZERS["qwen3"])
    assert "hm" in text


@pytest.mark.parametrize("options", [{}, {"train_on": "assistant"}, {"expand_turns": True}])
@pytest.mark.parametrize("name", ["chatml", "llama2", "qwen3"])
def test_turns_of_weight_0_are_never_supervised(name, options):
    tokenizer, messages = TOKENIZERS[name], turns(3)
    for turn in (1, 5):
        messages[turn]["weight"] = 0
    (examples,) = encode([Chat(tuple(messages))], tokenizer, **options)
    texts = [text for example in examples for text in supervised_texts(example, tokenizer)]
    assert len(texts) == 1 and is_spoken(ZOO[name], messages[3], texts[0].replace("<think>\n\n</think>\n\n", ""))
    messages[3]["weight"] = 0
    with pytest.raises(RowFault, match="weight 0"):
        encode([Chat(tuple(messages))], tokenizer, **options)


def test_under_all_everything_but_turns_of_weight_0_is_supervised():
    tokenizer, messages = TOKENIZERS["chatml"], turns(2)
    messages[1]["weight"] = 0
    example = encode_one(Chat(tuple(messages)), tokenizer, train_on="all")
    left = tokenizer.decode(example["input_ids"][~example["supervised"]].tolist())
    assert left == messages[1]["content"] + "<|im_end|>"


def test_reasoning_inside_the_content_of_an_earlier_turn_is_not_supervised():
    tokenizer = TOKENIZERS["qwen3"]
    messages = turns(2)
    messages[1] = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
    first, _ = supervised_texts(encode_one(Chat(tuple(messages)), tokenizer, train_on="assistant"), tokenizer)
    assert first == "Yes.<|im_end|>"


@pytest.mark.parametrize("name", ZOO)
def test_expanded_turns_see_what_generation_sees(name):
    tokenizer = TOKENIZERS[name]
    messages = turns(3)
    for message in messages:
        if message["role"] == "assistant" and name == "qwen3":
            message["reasoning_content"] = "because"
    (examples,) = encode([Chat(tuple(messages))], tokenizer, expand_turns=True)
    assert len(examples) == 3
    for turn, example in zip((1, 3, 5), examples):
        served = prompt_ids(messages[:turn], tokenizer)
        seam = int(np.flatnonzero(example["supervised"])[0])
        if name == "deepseek":  # its generation prompt opens a thought that its history never shows
            served = served[: len(served) - len(tokenizer("<think>\n", add_special_tokens=False)["input_ids"])]
        assert example["input_ids"][:seam].tolist() == served[:seam] and len(served) - seam in (0, 1)
        assert len(supervised_texts(example, tokenizer)) == 1


@pytest.mark.parametrize("change", ["reverse", "length"])
def test_a_rewritten_turn_that_cannot_be_found_names_the_row(change):
    tokenizer = tiny_tokenizer(template="{% for m in messages %}{{ m.role }}: {{ m.content | " + change + " }}\n{% endfor %}")
    with pytest.raises(RowFault, match="expand_turns") as caught:
        encode([Text("fine"), Chat(tuple(turns(2)))], tokenizer, train_on="assistant")
    assert caught.value.index == 1


def test_a_rewritten_turn_that_can_be_found_is_supervised():
    template = "{% for m in messages %}{{ '<|im_start|>' + (m.content | upper) + '<|im_end|>' }}{% endfor %}"
    tokenizer = tiny_tokenizer(template=template + "{% if add_generation_prompt %}<|im_start|>{% endif %}")
    row = Chat(({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "bye"}))
    assert supervised_texts(encode_one(row, tokenizer), tokenizer) == ["YES<|im_end|>"]


def test_an_error_of_the_template_names_the_row():
    with pytest.raises(RowFault, match="System role not supported") as caught:
        encode([Chat(tuple(turns(1))), Chat(tuple(turns(1, system="x")))], TOKENIZERS["gemma"])
    assert caught.value.index == 1


def test_a_template_that_never_stops_gets_the_end_token():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = tiny_tokenizer(template=template + "{% if add_generation_prompt %}assistant: {% endif %}")
    example = encode_one(Chat(tuple(turns(2))), tokenizer)
    assert example["input_ids"][-1] == tokenizer.eos_token_id and example["supervised"][-1]
    assert np.count_nonzero(example["input_ids"] == tokenizer.eos_token_id) == 1


def test_all_supervises_every_token():
    assert encode_one(Chat(tuple(turns(2))), TOKENIZERS["llama3"], train_on="all")["supervised"].all()


def test_a_special_token_written_by_the_assistant_is_no_stop():
    tokenizer = TOKENIZERS["chatml"]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "write <|im_end|> to stop"}]
    (text,) = supervised_texts(encode_one(Chat(tuple(messages)), tokenizer), tokenizer)
    assert text == "write <|im_end|> to stop<|im_end|>"


@pytest.mark.parametrize("more", [[], [{"role": "user", "content": "q"}, {"role": "assistant", "content": "fin"}]])
@pytest.mark.parametrize("name", [name for name in ZOO if name != "gemma"])
def test_without_a_generation_prompt_an_answer_of_special_tokens_is_stopped(name, more):
    """The header of the turn begins with the same text as the answer; the stop token still follows the answer."""
    style, tokenizer = ZOO[name], ZOO[name].tokenizer()
    template = re.sub(r"\{%-? if add_generation_prompt %\}.*?\{% endif %\}", "", tokenizer.chat_template, flags=re.DOTALL)
    tokenizer.chat_template = template
    for token in special_tokens(tokenizer):
        for answer in (token, f"yes {token}"):
            row = Chat(({"role": "user", "content": "x"}, {"role": "assistant", "content": answer}, *more))
            texts = supervised_texts(encode_one(row, tokenizer, train_on="assistant"), tokenizer)
            assert len(texts) == 1 + bool(more)
            assert texts[0].endswith(style.stop) and texts[0].count(style.stop) == 1 + answer.count(style.stop), texts


VERBATIM = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + OPEN + m.content + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
OPENING = {
    "content as it is": VERBATIM.replace("OPEN", "''") + PROMPT,
    "opens the answer itself": VERBATIM.replace("OPEN", "('<think>\n' if m.role == 'assistant' else '')") + PROMPT,
}


@pytest.mark.parametrize("content", ["<think>\nA cat.\n</think>\n\nTwelve.", "A cat.\n</think>\n\nTwelve."])
@pytest.mark.parametrize("name", OPENING)
def test_reasoning_that_the_generation_prompt_opens_is_opened_once(name, content):
    tokenizer = tiny_tokenizer(OPENING[name])
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    example = encode_one(Chat(tuple(messages)), tokenizer)
    prompt = prompt_ids(messages[:1], tokenizer)
    assert tokenizer.decode(example["input_ids"][: len(prompt)]).endswith("assistant\n<think>\n")
    assert supervised_texts(example, tokenizer) == ["A cat.\n</think>\n\nTwelve.<|im_end|>"]
    assert example["input_ids"][: len(prompt)].tolist() == prompt


def test_html_in_an_answer_is_no_reasoning():
    tokenizer = tiny_tokenizer(OPENING["content as it is"])
    messages = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "<b>bold</b> text"})
    assert supervised_texts(encode_one(Chat(messages), tokenizer), tokenizer)[0].endswith("<b>bold</b> text<|im_end|>")


@pytest.mark.parametrize("content", ["<think>A cat.</think>Twelve.", "<think>\n\nA cat.\n\n\n</think>\nTwelve."])
def test_reasoning_that_the_template_spaces_anew_is_not_omitted(content):
    messages = ({"role": "user", "content": "x"}, {"role": "assistant", "content": content})
    tokenizer = TOKENIZERS["qwen3"]
    assert find_omitted_text(Chat(messages), Renderer(tokenizer)) == []
    earlier = (*messages, {"role": "user", "content": "y"}, {"role": "assistant", "content": "z"})
    assert len(find_omitted_text(Chat(earlier), Renderer(tokenizer))) == 1  # that of an earlier turn is


SEAMS = [
    (" a", "b"),
    ("x\n", "\n y"),
    ("<th", "ink>"),
    ("12", "34"),
    ("a ", " b"),
    ("a", " "),
    ("질", "문"),
    ("👋", "🏽"),
    ("the quick ", "brown"),
]


@pytest.mark.parametrize(("prompt", "completion"), SEAMS)
def test_a_token_across_the_seam_belongs_to_the_completion(prompt, completion):
    tokenizer = tiny_tokenizer()
    example = encode_one(PromptCompletion(prompt, completion), tokenizer)
    start = int(np.flatnonzero(example["supervised"])[0])
    assert example["supervised"][start:].all()
    text = prompt + completion
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert start == 0 or offsets[start - 1][1] <= len(prompt)
    assert offsets[start][1] > len(prompt)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_text_has_one_beginning_and_one_end(adds_bos):
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    rows = [Text("The fox"), PromptCompletion("The ", "fox"), Text("<s>The fox</s>")]
    for row in rows:
        ids = encode_one(row, tokenizer)["input_ids"].tolist()
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.bos_token_id) == (1 if adds_bos or row is rows[2] else 0)


@pytest.mark.parametrize("name", ZOO)
def test_training_and_generation_begin_with_the_same_bos(name):
    tokenizer = TOKENIZERS[name]
    row = Chat(tuple(turns(1)))
    trained = encode_one(row, tokenizer)["input_ids"].tolist()
    served = prompt_ids(list(row.messages[:1]), tokenizer)
    assert trained.count(tokenizer.bos_token_id) == served.count(tokenizer.bos_token_id) == int(ZOO[name].adds_bos)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_named_templates_begin_and_end_once(name, adds_bos):
    tokenizer, _ = apply_template(tiny_tokenizer(adds_bos=adds_bos), name)
    example = encode_one(Chat(tuple(turns(2))), tokenizer, train_on="assistant")
    assert np.count_nonzero(example["input_ids"] == tokenizer.bos_token_id) == int(adds_bos)
    assert [text.removesuffix("</s>") for text in supervised_texts(example, tokenizer)] == [m["content"] for m in turns(2)[1::2]]


def test_eos_is_supervised_when_it_is_also_the_padding():
    tokenizer = tiny_tokenizer(template="chatml", pad_is_eos=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = encode_one(Chat(tuple(turns(1))), tokenizer)
    assert example["input_ids"][np.flatnonzero(example["supervised"])[-1]] == tokenizer.eos_token_id


def test_the_mask_does_not_depend_on_the_padding_token():
    plain, same = tiny_tokenizer("chatml"), tiny_tokenizer("chatml", pad_is_eos=True)
    row = Chat(tuple(turns(3)))
    assert (encode_one(row, plain)["supervised"] == encode_one(row, same)["supervised"]).all()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(set(ZOO) - {"qwen3", "deepseek"})),
    contents=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip), min_size=2, max_size=6
    ),
)
def test_any_content_is_found_again(name, contents):
    """Whatever the content of the turns, the supervised text of the last one is its content and the stop."""
    tokenizer, style = TOKENIZERS[name], ZOO[name]
    contents = contents[: len(contents) // 2 * 2]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    example = encode_one(Chat(tuple(messages)), tokenizer)
    assert example["supervised"].any() and not example["supervised"].all()
    ids = example["input_ids"][example["supervised"]].tolist()
    wanted = tokenizer(messages[-1]["content"].strip(), add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids)
    assert text.strip().endswith(style.stop) and tokenizer.decode(wanted).strip() in text


def test_prompts_without_a_template_are_plain_text():
    tokenizer = tiny_tokenizer(adds_bos=True)
    assert prompt_ids("The fox", tokenizer) == tokenizer("The fox")["input_ids"]


def test_a_system_sentence_comes_first():
    tokenizer = TOKENIZERS["chatml"]
    text = tokenizer.decode(prompt_ids("Hi", tokenizer, system="Be brief."))
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ZOO)
def test_stop_ids_hold_the_end_token_and_the_template_s_own(name):
    tokenizer = TOKENIZERS[name]
    stops = tokenizer.convert_ids_to_tokens(stop_ids(tokenizer))
    assert ZOO[name].stop in stops and tokenizer.eos_token in stops


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"tokenizer\.json"):
        encode([Text("x")], Slow())
