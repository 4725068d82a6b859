"""Rows of unpaired preference, in the ways that files write them: a prompt, one response, and whether it is
desirable.

A file may label each response. A file of pairs becomes two rows per pair, if the recipe names a format that
begins with ``unpaired``. ``preference_fields`` reads prompts and responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tunesmith.data.formats.fields import SYSTEM, TOOLS, Field, FieldFault, Format, Values, required
from tunesmith.data.formats.preference_fields import ALPACA_CONTEXT, INSTRUCTION, PAIRS, build_ranking
from tunesmith.data.formats.turns import turns_field, with_system
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Judged, Ranking
from tunesmith.json_types import JsonObject

DESIRABLE = {"true", "yes", "good", "desirable", "up", "thumbs_up", "chosen", "1", "1.0"}
UNDESIRABLE = {"false", "no", "bad", "undesirable", "down", "thumbs_down", "rejected", "0", "0.0"}
"""Labels written as text, in lower case."""


def build_judged(values: Values) -> Judged:
    """The row of a prompt (text, turns or an alpaca instruction), a response and a label."""
    return _row(values, values["completion"], "completion")


def build_judged_turns(values: Values) -> Judged:
    """The row of a conversation and a label. The response is everything after the last turn of the user."""
    turns = turns_field(values, "messages")
    users = [index for index, message in enumerate(turns) if message["role"] == "user"]
    if not users:
        raise FieldFault("messages", "a turn of the user", "none", "Add the question, or delete the row.")
    prompt, response = turns[: users[-1] + 1], turns[users[-1] + 1 :]
    if not response:
        expected, got = "the response after the last turn of the user", "a turn of user at the end"
        raise FieldFault("messages", expected, got, "Add the response that the label is about.")
    prompt = with_system(prompt, values)
    return _row(Values(values | {"prompt": prompt, "system": None}), response, "messages")


def _row(values: Values, response: object, field: str) -> Judged:
    """The row of ``response``. Its faults are reported under ``field``."""
    try:
        row = build_ranking(Values(values | {"answers": [response], "gold": False}))
    except FieldFault as fault:
        place, fix = (text.replace("answers[0]", field) for text in (fault.field, fault.fix))
        raise FieldFault(place, fault.expected, fault.got, fix) from None
    desirable = parse_judgement(values["label"]) if values.needs_gold else None
    return Judged(row.prompt, row.answers[0], desirable, row.tools)


def parse_judgement(value: object) -> bool:
    """The meaning of a label: true or false, 1 or 0, or a word of DESIRABLE or UNDESIRABLE."""
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str):
        word = "_".join(value.lower().replace("-", " ").replace("_", " ").split())
        if word in DESIRABLE | UNDESIRABLE:
            return word in DESIRABLE
    expected = "true or false (also 1 or 0, yes or no, good or bad, thumbs_up or thumbs_down)"
    fix = "Write whether it is desirable, or name the column of the label: columns: {label: COLUMN}."
    raise FieldFault("label", expected, shorten(value), fix)


def judgement_column(rows: Sequence[JsonObject]) -> str | None:
    """Return the column that labels each answer as desirable or not; None if there is none.

    Every value of the column must be such a label. The numbers 0 and 1 count only in a column whose name
    means nothing else, such as ``thumbs_up``: in ``label`` or ``rating`` they may be classes."""
    for name in LABEL.columns:
        keys = [next((key for key in row if str(key).strip().casefold() == name), None) for row in rows]
        values = [row[key] for key, row in zip(keys, rows) if key is not None and row[key] not in (None, "")]
        numbers = name not in MARKS and any(_is_number(value) for value in values)
        if values and not numbers and all(map(_is_judgement, values)):
            return next(key for key in keys if key is not None)
    return None


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and str(value).strip().replace(".", "", 1).isdigit()


def _is_judgement(value: object) -> bool:
    try:
        parse_judgement(value)
    except FieldFault:
        return False
    return True


def split_pair(row: Ranking) -> tuple[Judged, Judged]:
    """The two rows of a pair: chosen is desirable, rejected is not. With equal ranks neither is known."""
    known = row.ranks[0] != row.ranks[1]
    first, second = (
        Judged(row.prompt, answer, rank == 0 if known else None, row.tools)
        for answer, rank in zip(row.answers, row.ranks, strict=True)
    )
    return first, second


def unpaired_name(form: Format) -> str:
    """The name of the format that makes two rows of each pair of ``form``."""
    return form.name.replace("preference", "unpaired")


LABEL = required("label", "kto_tag", "desirable", "thumbs_up", "rating")
MARKS = ("kto_tag", "desirable", "thumbs_up")
"""Columns of unpaired preference alone. A text to classify may have ``label`` and ``rating`` as well."""


def _format(
    name: str, build: Callable[[Values], Judged], *fields: Field, prompt: str | None = None
) -> Format:
    fields = (*fields, LABEL, TOOLS, SYSTEM)
    return Format(
        name, Judged, fields, build, prompt, ("completion", "label"), gold="label", marks=MARKS, better=_good_label,
    )  # fmt: skip


def _good_label(names: Mapping[str, object]) -> str:
    return f"answers are good where {names.get('label')} is true (1, yes, good), else bad"


FORMATS = (
    _format(
        "judged",
        build_judged,
        required("prompt"),
        required("completion", "response", "output", "answer"),
        prompt="prompt",
    ),
    _format("judged_turns", build_judged_turns, required("messages", "conversations", "conversation")),
    _format(
        "judged_alpaca",
        build_judged,
        INSTRUCTION,
        required("completion", "output", "response", "completion", "answer"),
        *ALPACA_CONTEXT,
    ),
)

UNPAIRED = tuple(replace(form, name=unpaired_name(form), row=Judged, by_name=True) for form in PAIRS)
"""Formats of pairs that become two rows each. They are never detected, because in a pair one answer is only
preferred to the other; the recipe has to declare it desirable, and the other one undesirable."""
