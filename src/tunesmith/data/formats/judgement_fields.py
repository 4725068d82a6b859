"""Unpaired preference as files write it: a prompt, one response, and whether the response is desirable.

Two ways lead here. A file may have a label for each response. A file of pairs gives two rows for each pair when the
recipe names a format that begins with ``unpaired``. Prompts and responses are read as ``preference_fields`` reads those
of a ranking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tunesmith.data.formats import preference_fields
from tunesmith.data.formats.fields import (
    SYSTEM,
    TOOLS,
    Field,
    FieldFault,
    Format,
    Values,
    optional_text,
    parsed,
)
from tunesmith.data.formats.turns import conversation
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Judged, Ranking

DESIRABLE = {"true", "yes", "good", "desirable", "up", "thumbs_up", "chosen", "1"}
UNDESIRABLE = {"false", "no", "bad", "undesirable", "down", "thumbs_down", "rejected", "0"}
"""Labels written as text, in lower case."""


def judged(values: Values) -> Judged:
    """Build the row of a prompt (text, turns or an alpaca instruction), a response and a label."""
    return _row(values, values["completion"], "completion")


def judged_turns(values: Values) -> Judged:
    """Build the row of a whole conversation and a label.

    The response is everything after the last turn of the user, calls of tools included.
    """
    turns = conversation(parsed(values["messages"], "messages", "a list of turns"), "messages")
    end = 1 + max((place for place, message in enumerate(turns) if message["role"] == "user"), default=-1)
    if not end:
        raise FieldFault("messages", "a turn of the user", "none", "Add what was asked, or delete the row.")
    if end == len(turns):
        got = "a turn of user at the end"
        raise FieldFault(
            "messages",
            "the response after the last turn of the user",
            got,
            "Add the response that the label is about.",
        )
    system = optional_text(values.get("system"), "system")
    if system.strip() and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
        end += 1
    return _row({**values, "prompt": turns[:end], "system": None}, turns[end:], "messages")


def _row(values: Values, response: Any, field: str) -> Judged:
    """The row of ``response``; faults in it are reported under ``field``."""
    try:
        found = preference_fields.ranking({**values, "answers": [response], "gold": False})
    except FieldFault as fault:
        place, fix = (text.replace("answers[0]", field) for text in (fault.field, fault.fix))
        raise FieldFault(place, fault.expected, fault.got, fix) from None
    known = values.get("gold", True)
    return Judged(found.prompt, found.answers[0], desirable(values["label"]) if known else None, found.tools)


def desirable(value: Any) -> bool:
    """Return what a label says: true or false, 1 or 0, or one of the words in DESIRABLE and UNDESIRABLE."""
    said = value
    if isinstance(value, str):
        word = "_".join(value.strip().lower().replace("-", " ").replace("_", " ").split())
        said = 1 if word in DESIRABLE | {"1.0"} else 0 if word in UNDESIRABLE | {"0.0"} else None
    if isinstance(said, int | float) and said in (0, 1):
        return bool(said)
    expected = "true or false (also 1 or 0, yes or no, good or bad, thumbs_up or thumbs_down)"
    fix = (
        "Write whether the response is desirable, or name the column that says it: columns: {label: COLUMN}."
    )
    raise FieldFault("label", expected, shorten(value), fix)


def unpaired(row: Ranking) -> tuple[Judged, Judged]:
    """Make two rows of a pair: its chosen answer is desirable, its rejected one is not.

    Where the ranks are equal, neither is known.
    """
    known = row.ranks[0] != row.ranks[1]
    first, second = (
        Judged(row.prompt, row.answers[place], row.ranks[place] == 0 if known else None, row.tools)
        for place in (0, 1)
    )
    return first, second


def unpaired_name(form: Format) -> str:
    """Return the name of the format that makes two rows of each pair of ``form``."""
    return form.name.replace("preference", "unpaired")


LABEL = Field("label", ("label", "kto_tag", "desirable", "thumbs_up", "rating"))
RESPONSE = ("completion", "response", "output", "answer")
MARKS = ("kto_tag", "desirable", "thumbs_up")
"""Columns that only unpaired preference has. ``label`` and ``rating`` may also belong to a text to be classified."""

ANSWER = ("completion", "label")


def _format(
    name: str, build: Callable[[Values], Judged], *fields: Field, prompt: str | None = None
) -> Format:
    return Format(
        name, Judged, (*fields, LABEL, TOOLS, SYSTEM), build, prompt, ANSWER, gold="label", marks=MARKS
    )


FORMATS = (
    _format("judged", judged, Field("prompt", ("prompt",)), Field("completion", RESPONSE), prompt="prompt"),
    _format("judged_turns", judged_turns, Field("messages", ("messages", "conversations", "conversation"))),
    _format(
        "judged_alpaca",
        judged,
        Field("instruction", ("instruction", "question", "query")),
        Field("completion", ("output", "response", "completion", "answer")),
        *preference_fields.MORE,
    ),
)

UNPAIRED = tuple(
    replace(form, name=unpaired_name(form), row=Judged, by_name=True) for form in preference_fields.PAIRS
)
"""Pairs as two rows each. These formats are never detected: in a pair one answer was only preferred to the other, and
the recipe has to say that this is to mean desirable and undesirable."""
