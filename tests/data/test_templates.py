"""Named templates, Jinja strings, and the checks before they are used."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from tests.tiny import tiny_tokenizer
from tunesmith.data.encode.templates import TEMPLATES, apply_template
from tunesmith.errors import DataError

TALK = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def rendered(name, messages=TALK, **options):
    tokenizer, _ = apply_template(tiny_tokenizer(), name)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_the_model_s_own_template_stays():
    tokenizer = tiny_tokenizer("chatml")
    before = tokenizer.chat_template
    assert apply_template(tokenizer, None) == (tokenizer, "the model's own chat template") and tokenizer.chat_template == before


def test_a_model_without_a_template_gets_roles_and_the_description_names_it():
    tokenizer, description = apply_template(tiny_tokenizer(), None)
    assert "roles" in description and "none of its own" in description and tokenizer.chat_template


TEXTS = {
    "alpaca": "S\n\n### Instruction:\nQ\n\n### Response:\nA</s>\n\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA</s>\n",
    "roles": "<|system|>\nS\n<|user|>\nQ\n<|assistant|>\nA</s>\n",
    "korean": "S\n\n### 질문:\nQ\n\n### 답변:\nA</s>\n\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_write_what_they_promise(name):
    assert rendered(name) == TEXTS[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_a_named_template_is_the_beginning_of_its_answer(name):
    assert TEXTS[name].startswith(rendered(name, TALK[:2], add_generation_prompt=True))


def test_alpaca_without_a_system_turn_has_its_well_known_beginning():
    assert rendered("alpaca", TALK[1:]).startswith("Below is an instruction that describes a task.")


def test_chatml_renders_tools_and_the_other_templates_refuse_them():
    tool = {"type": "function", "function": {"name": "add"}}
    assert '"name": "add"' in rendered("chatml", TALK, tools=[tool])
    assert rendered("chatml", TALK, tools=[tool]).count("<|im_start|>system") == 1
    for name in set(TEMPLATES) - {"chatml"}:
        with pytest.raises(Exception, match="no place for tools"):
            rendered(name, TALK, tools=[tool])


def test_a_jinja_string_is_used_as_it_is():
    tokenizer, description = apply_template(tiny_tokenizer("chatml"), "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "[S][Q][A]" and "Jinja" in description


BAD = [
    ("{{ cycler.__init__.__globals__ }}", "sandbox"),
    ("{% if messages|length > 9 %}{{ ''.__class__.__mro__ }}{% endif %}{{ messages[1].content }}", "sandbox"),
    ("{{ messages['__class__'] }}", "sandbox"),
    ("{{ messages | attr('__class__') }}", "sandbox"),
    ("{% for m in messages %}{{ m.content }}", "not valid Jinja: line 1"),
    ("{{ messages[5].content.x }}", "fails on a question"),
    ("{{ 'nothing' }}", "does not write the assistant's answer"),
    ("chatlm", "Did you mean `chatml`"),
    ("no such template", "neither a Jinja string, nor the path of a .jinja file, nor a name"),
]


@pytest.mark.parametrize(("template", "message"), BAD)
def test_a_bad_template_is_refused_before_data_is_read(template, message):
    with pytest.raises(DataError, match=message) as caught:
        apply_template(tiny_tokenizer(), template)
    assert caught.value.exit_code == 2


def test_a_model_s_own_template_passes_the_same_guard():
    with pytest.raises(DataError, match="sandbox"):
        apply_template(tiny_tokenizer("{{ messages.__class__ }}"), None)


def test_generation_tags_are_known():
    template = "{% for m in messages %}{%- generation -%}{{ m.content }}{%- endgeneration -%}{% endfor %}"
    apply_template(tiny_tokenizer(), template)


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def test_a_template_may_be_a_file(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(THINKING)
    tokenizer, description = apply_template(tiny_tokenizer(), str(path))
    assert tokenizer.chat_template == THINKING and description == f"the template in {path}"
    with pytest.raises(DataError, match=r"onw\.jinja cannot be read: no such file\. Template files in .*: own\.jinja"):
        apply_template(tiny_tokenizer(), str(tmp_path / "onw.jinja"))


def test_variables_of_a_template_are_saved_with_it(tmp_path):
    """They hold in the program that reads the saved template, which may still pass another value."""
    tokenizer, description = apply_template(tiny_tokenizer(THINKING), None, {"enable_thinking": False})
    assert description == "the model's own chat template, with enable_thinking: false"
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    prompt = {"tokenize": False, "add_generation_prompt": True}
    thought = "<think>\n\n</think>\n\n"
    assert saved.apply_chat_template(TALK[:2], **prompt).endswith("assistant\n" + thought)
    assert saved.apply_chat_template(TALK[:2], enable_thinking=True, **prompt).endswith("assistant\n")
    apply_template(saved, None, {"enable_thinking": True})  # the latest word counts
    assert saved.apply_chat_template(TALK[:2], **prompt).endswith("assistant\n")


@pytest.mark.parametrize("value", [None, True, "a 'b'\n\"c\"", 2.5, {"x": [None, "한"]}])
@pytest.mark.parametrize("begin", ["", "\n", "  ", "\n  {% if true %}{% endif %}"])
def test_variables_keep_their_values_and_the_text_of_the_template(value, begin):
    body = begin + "{% for m in messages %}{{ m.content }}{% endfor %}"
    plain = apply_template(tiny_tokenizer(), body)[0].apply_chat_template(TALK, tokenize=False)
    tokenizer, _ = apply_template(tiny_tokenizer(), body + "{{ x | tojson }}", {"x": value})
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == plain + json.dumps(value, ensure_ascii=False)


def test_a_variable_that_the_template_never_reads_is_refused():
    with pytest.raises(DataError, match=r"reads no variable 'enable_thinkin'\. It reads enable_thinking\. Did you mean"):
        apply_template(tiny_tokenizer(THINKING), None, {"enable_thinkin": False})
