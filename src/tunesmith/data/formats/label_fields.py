"""What a row says of its classes: one label, or the labels that hold, in the ways files write them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tunesmith.data.formats.fields import FieldFault, clean, parsed, text
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Labelled

MARKS = {"0": False, "1": True, "false": False, "true": True}
"""What may stand in a column that says whether a label holds."""


def labelled(values: Mapping[str, Any]) -> Labelled:
    """A text, maybe a second one, and its label; without the field ``label`` it is to be predicted."""
    label = _label(values["label"]) if "label" in values else None
    return Labelled(text(values["text"], "text"), _pair(values), label=label)


def multilabel(values: Mapping[str, Any]) -> Labelled:
    """A text, maybe a second one, and all labels that hold. ``vectors``: how many 0 and 1 a list has, if it is one."""
    labels: tuple[str, ...] | None = None
    known: tuple[str, ...] = ()
    if "labels" in values:
        given, size = values["labels"], values.get("vectors")
        labels = _labels(given, values.get("separator"), size)
        known = tuple(map(str, given)) if isinstance(given, Mapping) else _places(size or 0)
    return Labelled(text(values["text"], "text"), _pair(values), labels=labels, known=known)


def vectors(sample: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether the ``labels`` of the first rows are vectors: more than half are lists of 0 and 1 of one length, two or more.

    The others are bad rows then. Numbers of labels never repeat; where nothing does, lists of unlike length are numbers: [0, 1]
    beside [1].
    """
    lengths: Counter[int] = Counter()
    rows = numbers = repeats = 0
    for values in sample:
        value = values.get("labels")
        if value is None:
            continue
        rows += 1
        try:
            listed = parsed(value, "labels", "a list")
        except FieldFault:
            continue
        if isinstance(listed, list | tuple) and all(type(one) in (int, float, bool) for one in listed):
            numbers += 1
            repeats += len(set(listed)) < len(listed)
            lengths[len(listed)] += set(listed) <= {0, 1}
    size, count = lengths.most_common(1)[0] if lengths else (0, 0)
    return {"vectors": size} if size > 1 and 2 * count > rows and (count == numbers or repeats) else {}


def _pair(values: Mapping[str, Any]) -> str | None:
    return text(values["text_pair"], "text_pair") if "text_pair" in values else None


def _label(value: Any) -> str | float:
    """A name, or the number as it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise FieldFault(
                "label", "a label or a number", shorten(value), "Write the number, or delete the row."
            )
        return value
    if isinstance(value, list | tuple | dict):
        fix = "Map the column to labels, where several may hold: columns: {labels: COLUMN}."
        raise FieldFault("label", "one label", shorten(value), fix)
    if value is None:
        raise FieldFault("label", "a label", "nothing (null)", "Fill 'label' in or delete the row.")
    return text(value, "label").strip()


def _labels(value: Any, separator: str | None, size: int | None) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        return tuple(str(name) for name, mark in value.items() if _holds(mark, f"labels.{name}"))
    if isinstance(value, str):
        clean(value, "labels")
        if separator is not None:
            value = [name.strip() for name in value.split(separator) if name.strip()]
        elif value.lstrip().startswith("["):
            value = parsed(value, "labels", "a JSON list of labels")
        elif value.strip():
            fix = "Write a JSON list, or name what stands between labels: separator: ',' in a recipe, --separator ',' to evaluate."
            raise FieldFault("labels", "a list of labels", shorten(value), fix)
        else:
            value = []
    if value is None:
        raise FieldFault(
            "labels", "a list of labels", "nothing (null)", "Write [] where none holds, or delete the row."
        )
    if not isinstance(value, list | tuple):
        raise FieldFault(
            "labels",
            "a list of labels",
            shorten(value),
            "Write the labels in a list; one label is a list, too.",
        )
    if size is not None:
        return _held(value, size)
    kinds = {str if isinstance(item, str) else int if type(item) is int else None for item in value}
    for position, item in enumerate(value):
        if isinstance(item, str):
            text(item, f"labels[{position}]")
        elif type(item) is not int:
            raise FieldFault(
                f"labels[{position}]", "the name of a label", shorten(item), "Write its name, or take it out."
            )
    if len(kinds) > 1:
        raise FieldFault(
            "labels", "names only or numbers only", shorten(value), "Write all labels in one way."
        )
    if kinds == {int} and len(set(value)) < len(value):
        fix = (
            "Write each number once; a list of 0 and 1 is a vector where most of the first rows are as long."
        )
        raise FieldFault("labels", "numbers of labels, each once", shorten(value), fix)
    return tuple(dict.fromkeys(str(item).strip() for item in value))


@lru_cache
def _places(size: int) -> tuple[str, ...]:
    return tuple(map(str, range(size)))


def _held(value: Sequence[Any], size: int) -> tuple[str, ...]:
    """The places of the ones in a vector of 0 and 1."""
    if len(value) != size:
        fix = "Write one for each label, as in the first rows."
        raise FieldFault("labels", f"{size} numbers 0 or 1", f"{len(value)}: {shorten(value)}", fix)
    return tuple(str(place) for place, mark in enumerate(value) if _holds(mark, f"labels[{place}]"))


def _holds(mark: Any, field: str) -> bool:
    if mark in (0, 1) and isinstance(mark, int | float):
        return bool(mark)
    said = MARKS.get(str(mark).strip().lower())
    if said is None:
        raise FieldFault(field, "0 or 1", shorten(mark), "Write 1 where the label holds, else 0.")
    return said
