"""Rows with labels, in the ways that files write them: one label, or the list of labels that hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

from tunesmith.data.formats.fields import FieldFault, Values, check_text, flag, parse_json, require_text
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Labelled
from tunesmith.json_types import JsonObject


def build_labelled(values: Values) -> Labelled:
    """The row of a text or a pair, and its label. Without the field ``label`` it is a row to predict."""
    label = _label(values["label"]) if "label" in values else None
    return Labelled(values.text("text"), _text_pair(values), label=label)


def build_multilabel(values: Values) -> Labelled:
    """The row of a text or a pair, and all labels that hold. ``vectors``: length of lists of 0 and 1."""
    labels: tuple[str, ...] | None = None
    known: tuple[str, ...] = ()
    if "labels" in values:
        given, size = values["labels"], values.get("vectors")
        labels = _labels(given, values.get("separator"), size)
        known = tuple(map(str, given)) if isinstance(given, Mapping) else _indices(size or 0)
    return Labelled(values.text("text"), _text_pair(values), labels=labels, known=known)


def scan_vectors(sample: Sequence[Values]) -> JsonObject:
    """Return the length of label vectors: most of the first rows are lists of 0 and 1, two or more, of one
    length.

    Other rows are then bad rows. Raises FieldFault for objects of scores. A list of label numbers never repeats
    a number. So if lists have different lengths and none repeats a number, they are label numbers: [0, 1] and
    [1]."""
    lengths: Counter[int] = Counter()
    rows = numbers = repeats = 0
    for values in sample:
        value = values.get("labels")
        if value is None:
            continue
        rows += 1
        _refuse_scores(value)
        try:
            listed = parse_json(value, "labels", "a list")
        except FieldFault:
            continue
        if isinstance(listed, list | tuple) and all(type(item) in (int, float, bool) for item in listed):
            numbers += 1
            repeats += len(set(listed)) < len(listed)
            lengths[len(listed)] += set(listed) <= {0, 1}
    size, count = lengths.most_common(1)[0] if lengths else (0, 0)
    return {"vectors": size} if size > 1 and 2 * count > rows and (count == numbers or repeats) else {}


def _refuse_scores(value: object) -> None:
    """Raise FieldFault for an object with numbers other than 0 and 1: {"label": 4.6, "binary-label": 1}."""
    if not isinstance(value, Mapping):
        return
    scores = [name for name, mark in value.items() if isinstance(mark, int | float) and mark not in (0, 1)]
    if scores:
        column = f"labels.{scores[0]}"
        fix = (
            f"Name one of them: columns: {{label: {column}}} (on the command line: --column label={column})."
        )
        raise FieldFault(
            "labels", "0 or 1 for each label", f"scores, such as {scores[0]}: {value[scores[0]]}", fix
        )


def _text_pair(values: Values) -> str | None:
    return values.text("text_pair") if "text_pair" in values else None


def _label(value: object) -> str | float:
    """The name of a class, or a number unchanged."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if not math.isfinite(value):
            fix = "Write the number, or delete the row."
            raise FieldFault("label", "a label or a number", shorten(value), fix)
        return value
    if isinstance(value, list | tuple | dict):
        fix = "For rows with several labels map the column to labels: columns: {labels: COLUMN}."
        raise FieldFault("label", "one label", shorten(value), fix)
    if value is None:
        raise FieldFault("label", "a label", shorten(value), "Fill 'label' in or delete the row.")
    return require_text(value, "label").strip()


def _labels(value: object, separator: str | None, size: int | None) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        return tuple(str(name) for name, mark in value.items() if _holds(mark, f"labels.{name}"))
    listed = _split_labels(value, separator) if isinstance(value, str) else value
    if not isinstance(listed, list | tuple):
        none = "Write [] for no label, or delete the row."
        fix = none if listed is None else "Write the labels in a list, also a single label."
        raise FieldFault("labels", "a list of labels", shorten(listed), fix)
    if size is None:
        return _label_names(listed)
    if len(listed) != size:
        got = f"{len(listed)}: {shorten(listed)}"
        fix = "Write one per label, as in the first rows."
        raise FieldFault("labels", f"{size} numbers 0 or 1", got, fix)
    return tuple(str(index) for index, mark in enumerate(listed) if _holds(mark, f"labels[{index}]"))


def _split_labels(value: str, separator: str | None) -> object:
    """The labels of a cell: separated by ``separator``, a JSON list, or none."""
    check_text(value, "labels")
    if separator is not None:
        return [name.strip() for name in value.split(separator) if name.strip()]
    if value.lstrip().startswith("["):
        return parse_json(value, "labels", "a JSON list of labels")
    if value.strip():
        fix = "Write a JSON list, or set the separator: separator: ',' in a recipe, --separator ',' to evaluate."
        raise FieldFault("labels", "a list of labels", shorten(value), fix)
    return []


def _label_names(listed: Sequence[object]) -> tuple[str, ...]:
    """The labels of a list of names, or of a list of label numbers."""
    for index, item in enumerate(listed):
        if isinstance(item, str):
            require_text(item, f"labels[{index}]")
        elif type(item) is not int:
            fix = "Write its name, or remove it."
            raise FieldFault(f"labels[{index}]", "the name of a label", shorten(item), fix)
    types = set(map(type, listed))
    if len(types) > 1:
        fix = "Write all labels as names, or all as numbers."
        raise FieldFault("labels", "names only or numbers only", shorten(listed), fix)
    if types == {int} and len(set(listed)) < len(listed):
        fix = "Write each number once. A list of 0 and 1 is a vector only if most of the first rows have its length."
        raise FieldFault("labels", "numbers of labels, each once", shorten(listed), fix)
    return tuple(dict.fromkeys(str(item).strip() for item in listed))


@lru_cache
def _indices(size: int) -> tuple[str, ...]:
    return tuple(map(str, range(size)))


def _holds(mark: object, field: str) -> bool:
    if isinstance(mark, int | float) and mark in (0, 1):
        return bool(mark)
    holds = flag(mark)
    if holds is None:
        raise FieldFault(field, "0 or 1", shorten(mark), "Write 1 if the label holds, else 0.")
    return holds
