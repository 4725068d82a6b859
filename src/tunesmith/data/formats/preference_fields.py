"""What a row says of answers that were compared: one chosen over another, or several in an order, as files write them.

Where ``values["gold"]`` is False the answers are to be scored: which is better, and whether they differ at all, is not looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from tunesmith.data.formats import ratings
from tunesmith.data.formats.fields import (
    SYSTEM,
    TOOLS,
    Field,
    FieldFault,
    Format,
    Values,
    optional_text,
    parsed,
    text,
)
from tunesmith.data.formats.turns import conversation, opening_of, tool_schemas, turn
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Message, Ranking

EMPTY_SIDE = "an answer with something in it"
SAME_PROMPT = "two answers to the same prompt"
ANOTHER = "two answers that differ"
"""What is expected of rows with the faults that ``lint`` counts."""

NOTHING = ("empty text", "only spaces", "nothing (null)", "an empty list")

ASKS = ("user", "tool", "ipython", "document")
"""Roles after which the assistant may speak."""

DIALOGUE = re.compile(r"\s*Human:")
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
"""How the dialogues of hh-rlhf (Bai et al. 2022) name who speaks."""

WORDS = ("answer", "response", "completion", "text")
"""Keys of answers that are objects, as in {"answer": "...", "rank": 1}."""

Prompt = str | list[Message]


def preference(values: Values) -> Ranking:
    """A prompt, and one answer chosen over another. Strings alone are plain text, as a prompt and its completion are."""
    sides = _listed(values["chosen"]), _listed(values["rejected"])
    prompt = _prompt(
        values["prompt"], values, all(isinstance(side, str) and not _is_dialogue(side) for side in sides)
    )
    if isinstance(prompt, str):
        return _pair(
            prompt, [_text(values["chosen"], "chosen"), _text(values["rejected"], "rejected")], values
        )
    return _of_turns(prompt, "prompt", values)


def turns(values: Values) -> Ranking:
    """Turns, and two answers to the last."""
    opening = conversation(
        parsed(values["conversations"], "conversations", "a list of turns"), "conversations"
    )
    return _of_turns(_with_system(opening, values), "conversations", values)


def alpaca(values: Values) -> Ranking:
    """An instruction, what belongs to it, and two answers."""
    return _of_turns(opening_of(values), "instruction", values)


def dialogues(values: Values) -> Ranking:
    """Two whole conversations, whose common turns are the prompt."""
    return _of_turns(None, "chosen", values)


def ranking(values: Values) -> Ranking:
    """A prompt and several answers: the best one first, or as ``ranks`` (lower = better), ``scores`` or ``labels`` (higher =
    better) say."""
    graded = _answers(values["answers"], values.get("gold", True))
    said = _said(graded)
    plain = all(isinstance(one, str) and not _is_dialogue(one) for one in map(_listed, said))
    prompt = opening_of(values) if "instruction" in values else _prompt(values["prompt"], values, plain)
    names = [f"answers[{place}]" for place in range(len(said))]
    answers: list[Any]
    if isinstance(prompt, str):
        answers = [_text(answer, name) for answer, name in zip(said, names)]
    else:
        _check_asked(prompt, "instruction" if "instruction" in values else "prompt")
        answers = [_checked(_side(answer, name), name) for answer, name in zip(said, names)]
    ranks, scores = ratings.of_ranking(values, graded)
    return _row(prompt, answers, ranks, scores, values, names)


def _prompt(value: Any, values: Values, plain: bool) -> Prompt:
    """A text to continue, when the answers are ``plain`` too and nothing asks for turns; else the turns before the answers."""
    value = _listed(value)
    if value is None or isinstance(value, str):
        said = text(value, "prompt")
        if DIALOGUE.match(said) and said.rstrip().endswith("Assistant:"):
            opening = dialogue(said.rstrip().removesuffix("Assistant:"), "prompt")
        elif (
            plain
            and not optional_text(values.get("system"), "system").strip()
            and not tool_schemas(values.get("tools"))
        ):
            return said
        else:
            opening = [{"role": "user", "content": said}]
    else:
        opening = conversation(value, "prompt")
    return _with_system(opening, values)


def _with_system(opening: list[Message], values: Values) -> list[Message]:
    system = optional_text(values.get("system"), "system")
    if not system.strip() or opening[0]["role"] == "system":
        return opening
    return [{"role": "system", "content": system}, *opening]


def _of_turns(opening: list[Message] | None, field: str, values: Values) -> Ranking:
    """A pair of answers to ``opening``, or of whole conversations (which may begin with it, too)."""
    whole = opening is None
    sides = [_side(values[name], name, whole) for name in ("chosen", "rejected")]
    begins = [side[0]["role"] == "assistant" for side in sides]
    if opening is not None and all(begins):
        _check_asked(opening, field)
        return _pair(
            opening, [_checked(side, name) for side, name in zip(sides, ("chosen", "rejected"))], values
        )
    if any(begins):
        odd = ("chosen", "rejected")[begins.index(whole)]
        fix = (
            "Write both as whole conversations, or both as answers with their prompt in a column of its own."
        )
        raise FieldFault(odd, SAME_PROMPT, "an answer alone" if whole else "a whole conversation", fix)
    common = _common(*sides)
    if common == len(sides[0]) == len(sides[1]):
        if values.get("gold", True):
            raise _same("rejected", sides[1][-1]["content"])
        common = 1 + max(
            (place for place, message in enumerate(sides[0]) if message["role"] in ASKS), default=-1
        )
    prompt, answers = sides[0][:common], [side[common:] for side in sides]
    if not prompt or prompt[-1]["role"] not in ASKS or not all(map(_answers_it, answers)):
        got = f"other turns from the {common + 1}. on: {_shown(answers[0])} and {_shown(answers[1])}"
        raise FieldFault(
            "rejected",
            SAME_PROMPT,
            got,
            "Give both sides the same turns up to their answers, or delete the row.",
        )
    if opening is None:
        return _pair(_with_system(prompt, values), answers, values)
    last = next(
        (message["content"].strip() for message in reversed(opening) if message["role"] == "user"), ""
    )
    if last not in [message["content"].strip() for message in prompt]:
        fix = "Mend it, or say format: preference_dialogues, which reads the prompt from the two sides."
        raise FieldFault(field, "what is asked in 'chosen' and 'rejected'", shorten(last), fix)
    kept = opening[:1] if opening[0]["role"] == "system" and prompt[0]["role"] != "system" else []
    return _pair([*kept, *prompt], answers, values)


def _common(one: Sequence[Message], other: Sequence[Message]) -> int:
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other)))


def _answers_it(answer: Sequence[Message]) -> bool:
    """Whether these turns are what the assistant says and what its tools give it: another question would be another prompt."""
    roles = [message["role"] for message in answer]
    return (
        bool(roles) and roles[0] == roles[-1] == "assistant" and "user" not in roles and "system" not in roles
    )


def _check_asked(opening: Sequence[Message], field: str) -> None:
    if opening[-1]["role"] not in ASKS:
        got = f"a turn of {opening[-1]['role']} at the end"
        raise FieldFault(
            field,
            "a prompt that ends with a turn of the user",
            got,
            "Take it out: the answers follow the prompt.",
        )


def _checked(answer: list[Message], field: str) -> list[Message]:
    if not _answers_it(answer):
        got = ", ".join(message["role"] for message in answer)
        raise FieldFault(
            field,
            "an answer: turns of the assistant and its tools",
            f"turns of {got}",
            "Write the answer only.",
        )
    return answer


def _side(value: Any, field: str, whole: bool = False) -> list[Message]:
    """An answer, or a ``whole`` conversation, as turns: from a list of them, one of them, a text or a dialogue."""
    value = _listed(value)
    last = f"{field}[{len(value) - 1}]" if isinstance(value, list | tuple) and value else field
    try:
        if isinstance(value, Mapping):
            return [turn(dict(value), field)]
        if isinstance(value, list | tuple):
            return conversation(value, field)
        said = text(value, field)
    except FieldFault as fault:
        if fault.got in NOTHING and fault.field.startswith(last):
            raise FieldFault(fault.field, EMPTY_SIDE, fault.got, fault.fix) from None
        raise
    if _is_dialogue(said) or (whole and DIALOGUE.match(said)):
        return dialogue(said, field)
    if not whole:
        return [{"role": "assistant", "content": said}]
    fix = "Add the prompt in a column of its own, or name it: columns: {prompt: COLUMN}."
    expected = "a conversation, because the row has no prompt (a list of turns, or '\\n\\nHuman: ... \\n\\nAssistant: ...')"
    raise FieldFault(field, expected, shorten(value), fix)


def _is_dialogue(said: str) -> bool:
    """Whether a text is a conversation of its own, which has a prompt, and no answer to one."""
    return bool(DIALOGUE.match(said)) and "\n\nAssistant:" in said


def _text(value: Any, field: str) -> str:
    try:
        return text(value, field)
    except FieldFault as fault:
        expected = EMPTY_SIDE if fault.got in NOTHING else fault.expected
        raise FieldFault(field, expected, fault.got, fault.fix) from None


def dialogue(value: str, field: str) -> list[Message]:
    """The turns of ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``. Spaces around what is said are no part of it."""
    before, *parts = SPEAKER.split(value)
    if before.strip():
        raise FieldFault(field, "a dialogue that begins with Human:", shorten(before), "Name who says it.")
    messages: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2]):
        if not said.strip():
            place, fix = 2 * len(messages), f"Fill turn {len(messages) + 1} in or delete the row."
            expected = (
                EMPTY_SIDE if place == len(parts) - 2 and speaker == "Assistant" else f"what {speaker} says"
            )
            raise FieldFault(f"{field}[{len(messages)}]", expected, "empty text", fix)
        messages.append(
            {"role": "user" if speaker == "Human" else "assistant", "content": text(said, field).strip()}
        )
    return messages


def _listed(value: Any) -> Any:
    """Turns that came as JSON text, as columns of a csv do; all else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        found = json.loads(value)
    except (RecursionError, ValueError):
        return value
    turns = isinstance(found, list) and all(
        isinstance(item, dict) and {"role", "from"} & item.keys() for item in found
    )
    return found if turns else value


def _answers(value: Any, gold: bool) -> Sequence[Any]:
    """The answers as the file has them: ``gold`` = so many that one can be better."""
    value = parsed(value, "answers", "a list of answers")
    if not isinstance(value, list | tuple):
        raise FieldFault(
            "answers", "a list of answers", shorten(value), "Write the answers in a list, the best one first."
        )
    if len(value) < (2 if gold else 1):
        expected = "two answers or more" if gold else "an answer or more"
        raise FieldFault("answers", expected, str(len(value)), "Add another one, or delete the row.")
    return value


def _said(answers: Sequence[Any]) -> Sequence[Any]:
    """Texts or turns of answers that may be objects with grades."""
    if not all(isinstance(item, Mapping) for item in answers):
        return answers
    if any({"role", "from"} & item.keys() for item in answers):
        return [{key: said for key, said in item.items() if key not in ratings.NAMES} for item in answers]
    word = next((key for key in WORDS if all(key in item for item in answers)), None)
    if word is None:
        fix = 'Write texts, turns, or objects such as {"answer": "...", "score": 4.5}.'
        raise FieldFault("answers", f"objects with one of {', '.join(WORDS)}", shorten(answers[0]), fix)
    return [item[word] for item in answers]


def _pair(prompt: Prompt, answers: list[Any], values: Values) -> Ranking:
    return _row(prompt, answers, (0, 1), ratings.of_pair(values), values, ("chosen", "rejected"))


def _row(
    prompt: Prompt,
    answers: list[Any],
    ranks: tuple[int, ...],
    scores: tuple[float, ...] | None,
    values: Values,
    names: Sequence[str],
) -> Ranking:
    if values.get("gold", True):
        _check_judged(answers, ranks, names)
    else:
        ranks = (0,) * len(answers)
    if isinstance(prompt, str):
        return Ranking(prompt, tuple(answers), ranks, scores)
    return Ranking(
        tuple(prompt), tuple(map(tuple, answers)), ranks, scores, tool_schemas(values.get("tools"))
    )


def _check_judged(answers: list[Any], ranks: tuple[int, ...], names: Sequence[str]) -> None:
    said = [bare(answer) for answer in answers]
    for place, one in enumerate(said):
        first = said.index(one)
        if ranks[first] != ranks[place]:
            raise _same(names[place], answers[place], names[first])
    if len(set(ranks)) == 1:
        fix = "Say which is better, or delete the row: nothing can be learnt of it."
        raise FieldFault("answers", "an answer that is better than another", "the same rank for all", fix)


def bare(answer: str | Sequence[Message]) -> Any:
    """A prompt or an answer without the spaces around what it says, which templates strip."""
    if isinstance(answer, str):
        return answer.strip()
    return [{**message, "content": message["content"].strip()} for message in answer]


def _same(field: str, answer: Any, other: str = "chosen") -> FieldFault:
    return FieldFault(
        field, ANOTHER, f"{_shown(answer)} in {other!r}, too", "Write the other answer, or delete the row."
    )


def _shown(answer: str | list[Message]) -> str:
    if isinstance(answer, str):
        return shorten(answer)
    return shorten(answer[0]["content"]) if answer else "nothing"


SCORES = (
    Field(
        "chosen_score",
        ("chosen_score", "score_chosen", "chosen_rating", "rating_chosen", "chosen-rating"),
        required=False,
    ),
    Field(
        "rejected_score",
        ("rejected_score", "score_rejected", "rejected_rating", "rating_rejected", "rejected-rating"),
        required=False,
    ),
    Field("scores", ("scores", "ratings", "rating"), required=False),
    Field("margin", ("margin",), required=False),
)
SIDES = (Field("chosen", ("chosen",)), Field("rejected", ("rejected",)), TOOLS, SYSTEM, *SCORES)
GIVEN = (
    Field("ranks", ("ranks", "rank"), required=False),
    Field("scores", ("scores", "score", "ratings"), required=False),
    Field("labels", ("labels",), required=False),
    TOOLS,
    SYSTEM,
)
MORE = (Field("input", ("input", "context"), required=False), Field("history", ("history",), required=False))
ANSWERS = Field("answers", ("answers", "responses", "completions"))

COMPARED = ("chosen", "rejected", *(field.name for field in SCORES))
JUDGED = ("answers", "ranks", "scores", "labels")

PAIRS = (
    Format(
        "preference",
        Ranking,
        (Field("prompt", ("prompt",)), *SIDES),
        preference,
        prompt="prompt",
        answer=COMPARED,
    ),
    Format(
        "preference_turns",
        Ranking,
        (Field("conversations", ("conversations", "conversation", "messages")), *SIDES),
        turns,
    ),
    Format(
        "preference_alpaca",
        Ranking,
        (Field("instruction", ("instruction", "question", "query")), *MORE, *SIDES),
        alpaca,
    ),
    Format("preference_dialogues", Ranking, SIDES, dialogues),
)
RANKINGS = (
    Format(
        "ranking",
        Ranking,
        (Field("prompt", ("prompt",)), ANSWERS, *GIVEN),
        ranking,
        prompt="prompt",
        answer=JUDGED,
    ),
    Format(
        "ranking_alpaca", Ranking, (Field("instruction", ("instruction",)), ANSWERS, *MORE, *GIVEN), ranking
    ),
)
