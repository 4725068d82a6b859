"""Rows of compared answers, as files write them: one answer chosen over another, or several ranked ones.

Rows whose answers are to be scored (``needs_gold`` is False) may have no grades, wrong grades or equal
answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from tunesmith.data.formats import ratings
from tunesmith.data.formats.dialogues import DIALOGUE, NONEMPTY_ANSWER, is_dialogue, parse_dialogue
from tunesmith.data.formats.fields import (
    SYSTEM,
    TOOLS,
    FieldFault,
    Format,
    Values,
    optional,
    parse_collection,
    parse_list,
    require_text,
    required,
)
from tunesmith.data.formats.turns import (
    alpaca_prompt,
    parse_tools,
    parse_turn,
    parse_turns,
    turns_field,
    with_system,
)
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Chat, Message, PromptCompletion, Ranking

SAME_PROMPT = "two answers to the same prompt"
DIFFERENT_ANSWERS = "two answers that differ"
"""``expected`` of the problems that ``data lint`` counts by kind."""

EMPTY = ("empty text", "only spaces", "nothing (null)", "an empty list")
"""``got`` of the problems of an empty answer."""

BEFORE_ANSWER = ("user", "tool", "ipython", "document")
"""Roles after which the assistant may speak."""

ANSWER_KEYS = ("answer", "response", "completion", "text")
"""Keys of the text of an answer that is an object, as in {"answer": "...", "rank": 1}."""

SIDE_NAMES = ("chosen", "rejected")

Turns = Sequence[Message]


def build_preference(values: Values) -> Ranking:
    """The row of a prompt, a chosen and a rejected answer. Three texts are plain text, without a template."""
    sides = [values[name] for name in SIDE_NAMES]
    prompt = parse_prompt(values, _are_plain(sides))
    if isinstance(prompt, str):
        return _pair(prompt, [_answer_text(side, name) for side, name in zip(sides, SIDE_NAMES)], values)
    return _pair_of_turns(prompt, "prompt", values)


def build_preference_turns(values: Values) -> Ranking:
    """The row of turns and two answers to the last of them."""
    turns = with_system(turns_field(values, "conversations"), values)
    return _pair_of_turns(turns, "conversations", values)


def build_preference_answered(values: Values) -> Ranking:
    """Return the row of a conversation that ends with the chosen answer, and of a rejected answer.

    A rejected text replaces the last turn. Rejected turns replace all turns after the last question. The
    rejected side may also be a whole conversation."""
    turns, value = turns_field(values, "messages"), turns_from_json(values["rejected"])
    rejected = _parse_side(value, "rejected")
    if rejected[0]["role"] != "assistant":
        return _pair_of_turns(None, "messages", Values(values | {"chosen": turns, "rejected": rejected}))
    asked = [index for index, message in enumerate(turns) if message["role"] in BEFORE_ANSWER]
    if isinstance(value, list | tuple):
        asked = [index for index in asked if turns[index]["role"] == "user"]
    end = asked[-1] + 1 if asked else 0
    if not turns[:end] or not turns[end:]:
        got = f"a turn of {turns[-1]['role']} at the end" if asked else "no question"
        fix = "Add it, or delete the row: 'rejected' has the other answer only."
        raise FieldFault("messages", "a question and the chosen answer to it", got, fix)
    prompt = with_system(turns[:end], values)
    return _pair_of_turns(prompt, "messages", Values(values | {"chosen": turns[end:], "rejected": rejected}))


def build_preference_alpaca(values: Values) -> Ranking:
    """The row of an instruction with its input, and two answers."""
    return _pair_of_turns(alpaca_prompt(values), "instruction", values)


def build_preference_dialogues(values: Values) -> Ranking:
    """The row of two whole conversations. The turns that both begin with are the prompt."""
    return _pair_of_turns(None, "chosen", values)


def build_ranking(values: Values) -> Ranking:
    """The row of a prompt and several answers, ordered by their grades, or as they are: best first."""
    graded = _listed_answers(values["answers"], values.needs_gold)
    bare = _without_grades(graded)
    is_alpaca = "instruction" in values
    prompt = alpaca_prompt(values) if is_alpaca else parse_prompt(values, _are_plain(bare))
    names = [f"answers[{index}]" for index in range(len(bare))]
    answers: list[str | Turns]
    if isinstance(prompt, str):
        answers = [_answer_text(answer, name) for answer, name in zip(bare, names)]
    else:
        check_prompt_end(prompt, "instruction" if is_alpaca else "prompt")
        answers = [_check_answer(_parse_side(answer, name), name) for answer, name in zip(bare, names)]
    ranks, scores = ratings.ranks_and_scores(values, graded)
    return _ranking(prompt, answers, ranks, scores, values, names)


def build_prompt_completion(values: Values) -> PromptCompletion | Chat:
    """Return the row of a prompt and a completion: two texts, or a conversation if one of them is turns or a
    dialogue. A completion that is a whole conversation may repeat the prompt."""
    if not values.needs_answer:
        asked = parse_prompt(values, plain_answers=True)
        return (
            PromptCompletion(asked, "")
            if isinstance(asked, str)
            else Chat(tuple(asked), parse_tools(values.get("tools")))
        )
    prompt, completion = turns_from_json(values["prompt"]), turns_from_json(values["completion"])
    is_text = isinstance(completion, str) and not is_dialogue(completion)
    if is_text and not isinstance(prompt, list | tuple) and not values.optional_text("system").strip():
        return PromptCompletion(require_text(prompt, "prompt"), require_text(completion, "completion"))
    before, answer = parse_prompt(values, plain_answers=False), _parse_side(completion, "completion")
    if not any(message["role"] == "assistant" for message in answer):
        fix = "Add the answer to learn, or delete the row."
        raise FieldFault("completion", "a turn of the assistant", "none", fix)
    assert not isinstance(before, str)
    tools = parse_tools(values.get("tools"))
    if strip_contents(answer[: len(before)]) == strip_contents(before):
        return Chat(tuple(answer), tools)
    if answer[0]["role"] != "assistant" and isinstance(prompt, str):
        fix = "Correct it, or map the conversation alone: columns: {messages: COLUMN}."
        raise FieldFault("prompt", "the first turns of 'completion'", shorten(prompt), fix)
    return Chat((*before, *answer), tools)


def _are_plain(answers: Sequence[object]) -> bool:
    """True if every answer is a text, and neither turns as JSON text nor a dialogue."""
    return all(
        isinstance(answer, str) and not is_dialogue(answer) for answer in map(turns_from_json, answers)
    )


def parse_prompt(values: Values, plain_answers: bool) -> str | list[Message]:
    """The turns before the answers; a text if the answers are plain text, without system prompt and tools."""
    value = turns_from_json(values["prompt"])
    if _are_turns(value):
        return with_system(parse_turns(value, "prompt"), values)
    text = require_text(value, "prompt")
    if DIALOGUE.match(text) and text.rstrip().endswith("Assistant:"):
        turns = parse_dialogue(text.rstrip().removesuffix("Assistant:"), "prompt")
    elif (
        plain_answers and not values.optional_text("system").strip() and not parse_tools(values.get("tools"))
    ):
        return text
    else:
        turns = [{"role": "user", "content": text}]
    return with_system(turns, values)


def _pair_of_turns(prompt: list[Message] | None, field: str, values: Values) -> Ranking:
    """The row of two sides: answers to ``prompt``, or whole conversations. Only the latter need no prompt."""
    sides = [_parse_side(values[name], name, whole=prompt is None) for name in SIDE_NAMES]
    are_answers = [side[0]["role"] == "assistant" for side in sides]
    if prompt is not None and all(are_answers):
        check_prompt_end(prompt, field)
        return _pair(prompt, [_check_answer(side, name) for side, name in zip(sides, SIDE_NAMES)], values)
    if any(are_answers):
        odd = SIDE_NAMES[are_answers.index(prompt is None)]
        got = "an answer alone" if prompt is None else "a whole conversation"
        fix = "Write both as whole conversations, or both as answers with their prompt in a separate column."
        raise FieldFault(odd, SAME_PROMPT, got, fix)
    shared, answers = _split_conversations(sides, values.needs_gold)
    if prompt is None:
        return _pair(with_system(shared, values), answers, values)
    questions = [message["content"].strip() for message in prompt if message["role"] == "user"]
    question = questions[-1] if questions else ""
    if question not in [message["content"].strip() for message in shared]:
        fix = "Correct it, or set format: preference_dialogues, which takes the prompt from both sides."
        raise FieldFault(field, "the question in 'chosen' and 'rejected'", shorten(question), fix)
    keeps_system = prompt[0]["role"] == "system" and shared[0]["role"] != "system"
    return _pair([*prompt[:1], *shared] if keeps_system else shared, answers, values)


def _split_conversations(sides: list[list[Message]], gold: bool) -> tuple[list[Message], list[list[Message]]]:
    """(the turns that both conversations begin with, the answers that follow)."""
    chosen, rejected = sides
    common = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected)))
    if common == len(chosen) == len(rejected):
        if gold:
            raise _same_answers("rejected", rejected[-1]["content"], "chosen")
        asked = [index for index, message in enumerate(chosen) if message["role"] in BEFORE_ANSWER]
        common = asked[-1] + 1 if asked else 0
    shared, answers = chosen[:common], [chosen[common:], rejected[common:]]
    if not shared or shared[-1]["role"] not in BEFORE_ANSWER or not all(map(_is_answer, answers)):
        first, second = map(_first_words, answers)
        fix = "Write the same turns up to the answers on both sides, or delete the row."
        got = f"different turns from turn {common + 1} on: {first} and {second}"
        raise FieldFault("rejected", SAME_PROMPT, got, fix)
    return shared, answers


def _is_answer(turns: Turns) -> bool:
    """True for turns of the assistant and its tools. Another question would make it another prompt."""
    roles = [message["role"] for message in turns]
    return bool(roles) and roles[0] == roles[-1] == "assistant" and not {"user", "system"} & set(roles)


def check_prompt_end(prompt: Turns, field: str) -> None:
    if prompt[-1]["role"] not in BEFORE_ANSWER:
        got = f"a turn of {prompt[-1]['role']} at the end"
        fix = "Remove that turn: the answers follow the prompt."
        raise FieldFault(field, "a prompt that ends with a turn of the user", got, fix)


def _check_answer(turns: Turns, field: str) -> Turns:
    if not _is_answer(turns):
        got = "turns of " + ", ".join(message["role"] for message in turns)
        expected = "an answer: turns of the assistant and its tools"
        raise FieldFault(field, expected, got, "Write the answer only.")
    return turns


def _parse_side(value: object, field: str, whole: bool = False) -> list[Message]:
    """The turns of an answer or a ``whole`` conversation, from turns, one turn, a text or a dialogue."""
    value = turns_from_json(value)
    last = f"{field}[{len(value) - 1}]" if isinstance(value, list | tuple) and value else field
    try:
        if isinstance(value, Mapping) and {"role", "from"} & value.keys():
            return [parse_turn(dict(value), field)]
        if _are_turns(value):
            return parse_turns(value, field)
        text = require_text(value, field)
    except FieldFault as fault:
        if fault.got in EMPTY and fault.field.startswith(last):
            raise FieldFault(fault.field, NONEMPTY_ANSWER, fault.got, fault.fix) from None
        raise
    if is_dialogue(text) or (whole and DIALOGUE.match(text)):
        return parse_dialogue(text, field)
    if not whole:
        return [{"role": "assistant", "content": text}]
    fix = "Add a column with the prompt, or name it: columns: {prompt: COLUMN}."
    expected = "a conversation, because the row has no prompt (a list of turns, or '\\n\\nHuman: ... \\n\\nAssistant: ...')"
    raise FieldFault(field, expected, shorten(value), fix)


def _answer_text(value: object, field: str) -> str:
    try:
        return require_text(value, field)
    except FieldFault as fault:
        expected = NONEMPTY_ANSWER if fault.got in EMPTY else fault.expected
        raise FieldFault(field, expected, fault.got, fault.fix) from None


def turns_from_json(value: object) -> object:
    """Parse one turn or several that came as text of JSON or Python, as in a csv; any other value is returned
    as it is."""
    parsed = parse_collection(value)
    if parsed is None:
        return value
    turns = parsed if isinstance(parsed, list) else [parsed]
    is_turns = all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in turns)
    return parsed if is_turns else value


def _are_turns(value: object) -> bool:
    """Return whether a value is a list, and not of texts."""
    return isinstance(value, list | tuple) and not (value and all(isinstance(item, str) for item in value))


def _listed_answers(value: object, gold: bool) -> Sequence[object]:
    """The answers as the file has them: with ``gold`` two at least, so that one can be better."""
    fix = "Write the answers in a list, the best one first."
    answers = parse_list(value, "answers", "a list of answers", fix)
    if len(answers) < (2 if gold else 1):
        expected = "two answers or more" if gold else "an answer or more"
        raise FieldFault("answers", expected, str(len(answers)), "Add an answer, or delete the row.")
    return answers


def _without_grades(answers: Sequence[object]) -> Sequence[object]:
    """The texts or turns of answers, which may be objects with grades."""
    objects = [item for item in answers if isinstance(item, Mapping)]
    if len(objects) < len(answers):
        return answers
    if any({"role", "from"} & item.keys() for item in objects):
        return [{key: item[key] for key in item if key not in ratings.GRADE_KEYS} for item in objects]
    for key in ANSWER_KEYS:
        if all(key in item for item in objects):
            return [item[key] for item in objects]
    fix = 'Write texts, turns, or objects such as {"answer": "...", "score": 4.5}.'
    raise FieldFault("answers", f"objects with one of {', '.join(ANSWER_KEYS)}", shorten(answers[0]), fix)


def _pair(prompt: str | Turns, answers: Sequence[str | Turns], values: Values) -> Ranking:
    return _ranking(prompt, answers, (0, 1), ratings.pair_scores(values), values, SIDE_NAMES)


def _ranking(
    prompt: str | Turns, answers: Sequence[str | Turns], ranks: tuple[int, ...], scores: tuple[float, ...] | None,
    values: Values, names: Sequence[str],
) -> Ranking:  # fmt: skip
    if values.needs_gold:
        _check_ranks(answers, ranks, names)
    else:
        ranks = (0,) * len(answers)
    rows = tuple(answer if isinstance(answer, str) else tuple(answer) for answer in answers)
    if isinstance(prompt, str):
        return Ranking(prompt, rows, ranks, scores)
    return Ranking(tuple(prompt), rows, ranks, scores, parse_tools(values.get("tools")))


def _check_ranks(answers: Sequence[str | Turns], ranks: Sequence[int], names: Sequence[str]) -> None:
    """Equal answers must have equal ranks, and one answer must be better than another."""
    contents = [strip_contents(answer) for answer in answers]
    for index, content in enumerate(contents):
        first = contents.index(content)
        if ranks[first] != ranks[index]:
            raise _same_answers(names[index], answers[index], names[first])
    if len(set(ranks)) == 1:
        fix = "Write which answer is better, or delete the row: a ranking of equals trains nothing."
        raise FieldFault("answers", "an answer that is better than another", "the same rank for all", fix)


def strip_contents(part: str | Turns) -> str | list[Message]:
    """A prompt or an answer without the spaces around its text, which templates strip."""
    if isinstance(part, str):
        return part.strip()
    return [{**message, "content": message["content"].strip()} for message in part]


def _same_answers(field: str, answer: str | Turns, other: str) -> FieldFault:
    got = f"{_first_words(answer)} in {other!r}, too"
    return FieldFault(field, DIFFERENT_ANSWERS, got, "Write another answer, or delete the row.")


def _first_words(part: str | Turns) -> str:
    if isinstance(part, str):
        return shorten(part)
    return shorten(part[0]["content"]) if part else "nothing"


SCORES = (
    optional("chosen_score", "score_chosen", "chosen_rating", "rating_chosen", "chosen-rating"),
    optional("rejected_score", "score_rejected", "rejected_rating", "rating_rejected", "rejected-rating"),
    optional("scores", "ratings", "rating"),
    optional("margin"),
)
SIDES = (required("chosen"), required("rejected"), TOOLS, SYSTEM, *SCORES)
GRADES = (
    optional("ranks", "rank"),
    optional("scores", "score", "ratings"),
    optional("labels"),
    TOOLS,
    SYSTEM,
)
ALPACA_CONTEXT = (optional("input", "context"), optional("history"))
ANSWERS = required("answers", "responses", "completions")
CONVERSATION = required("messages", "conversations", "conversation")
REJECTED = required("rejected", "rejected_response", "rejected_messages")
CONVERSATIONS = required("conversations", "conversation", "messages")
INSTRUCTION = required("instruction", "question", "query")

PAIR_ANSWER = (*SIDE_NAMES, *(field.name for field in SCORES))
RANKING_ANSWER = ("answers", "ranks", "scores", "labels")

ANSWERED = (CONVERSATION, REJECTED, TOOLS, SYSTEM)
PAIRS = tuple(
    replace(form, better=ratings.better_side)
    for form in (
        Format("preference", Ranking, (required("prompt"), *SIDES), build_preference, "prompt", PAIR_ANSWER),
        Format("preference_turns", Ranking, (CONVERSATIONS, *SIDES), build_preference_turns),
        Format("preference_alpaca", Ranking, (INSTRUCTION, *ALPACA_CONTEXT, *SIDES), build_preference_alpaca),
        Format("preference_dialogues", Ranking, SIDES, build_preference_dialogues),
        Format(
            "preference_answered", Ranking, ANSWERED, build_preference_answered, marks=REJECTED.columns[1:]
        ),
    )
)
RANKINGS = tuple(
    Format(name, Ranking, fields, build_ranking, prompt, answer, better=ratings.better_answer)
    for name, fields, prompt, answer in (
        ("ranking", (required("prompt"), ANSWERS, *GRADES), "prompt", RANKING_ANSWER),
        ("ranking_alpaca", (required("instruction"), ANSWERS, *ALPACA_CONTEXT, *GRADES), None, ()),
    )
)
