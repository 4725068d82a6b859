"""Figures of tagged words: entities, as seqeval counts them, and the share of right tags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Span = tuple[str, int, int]
"""(type, first word, last word + 1)."""

PROBLEMS = {
    "inside_without_begin": "an I- with no B- before it",
    "end_without_begin": "an E- with no B- before it",
    "type_change": "an entity whose type changes inside it",
    "no_end": "an entity with no E- at its end",
}
"""The kinds that :func:`problems` counts, in words."""


def scheme_of(tags: Iterable[str]) -> str | None:
    """What a set of tags is written in: "BIO" (IOB2), "BIOES" (IOBES) or "IO"; None where tags are no entities (parts of speech,
    BILOU, O alone), so that only single tags can be right or wrong.

    ``B-PER`` and the like have a type; plain ``B``, ``I``, ``E``, ``S`` are entities of the type "_". One tag of another kind
    makes all of them plain tags.
    """
    kinds = set()
    for tag in set(tags):
        kind, dash, name = tag.partition("-")
        if kind not in ("B", "I", "E", "S", "O") or (dash and not name) or (kind == "O" and dash):
            return None
        kinds.add(kind)
    if kinds & {"E", "S"}:
        return "BIOES"
    return "BIO" if "B" in kinds else "IO" if "I" in kinds else None


def spans(tags: Sequence[str]) -> list[Span]:
    """Return the entities of one row's tags in order, by seqeval in conlleval's lenient reading.

    I- and E- continue an entity of their type that a B- or I- left open; whatever else is not O starts one. The
    tags must be of a scheme that :func:`scheme_of` knows: seqeval warns about others.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    return [(name, first, last + 1) for name, first, last in get_entities(list(tags))]


def problems(tags: Sequence[str], scheme: str | None = "BIO") -> Counter[str]:
    """How often one row's tags break their scheme, by the kinds of PROBLEMS; :func:`spans` reads such tags all the same.

    ``no_end`` is for BIOES alone; IO and plain tags (None) have nothing to break.
    """
    found: Counter[str] = Counter()
    if scheme not in ("BIO", "BIOES"):
        return found
    open_type: str | None = None
    for tag in [*tags, "O"]:
        kind, name = _parts(tag)
        goes_on = open_type is not None and kind in ("I", "E") and name == open_type
        if kind in ("I", "E") and not goes_on:
            if open_type is not None:
                found["type_change"] += 1
            else:
                found["inside_without_begin" if kind == "I" else "end_without_begin"] += 1
        elif open_type is not None and kind not in ("I", "E") and scheme == "BIOES":
            found["no_end"] += 1
        open_type = name if kind in ("B", "I") else None
    return found


def score(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], scheme: str | None = None
) -> dict[str, Any]:
    """Entity figures over rows of tags, and ``token_accuracy``, the share of words whose tag is right.

    Returns precision, recall and f1 (over all entities: micro), support (entities in ``gold``), by_type {type: {precision,
    recall, f1, support}} by seqeval, token_accuracy, words, missing and scheme. An entity is right when its type and both ends
    are. ``scheme``: what the tags are written in, where these rows may not show it (O alone); None = found in them. A
    figure without anything to divide by is 0; entity figures are None where the tags are no entities (``scheme`` None).
    A row may have fewer predictions than words: what is missing is wrong, and "O" for the entities. Raises ValueError when there
    are more predictions than words, or other rows.
    """
    if len(gold) != len(predicted):
        raise ValueError(f"{len(gold)} rows of tags, but {len(predicted)} rows of predictions")
    for row, (tags, said) in enumerate(zip(gold, predicted)):
        if len(said) > len(tags):
            raise ValueError(f"row {row} has {len(tags)} words, but {len(said)} predictions")
    words = sum(map(len, gold))
    right = sum(tag == other for tags, said in zip(gold, predicted) for tag, other in zip(tags, said))
    scheme = scheme or scheme_of(tag for rows in (gold, predicted) for tags in rows for tag in tags)
    return {
        **(
            _entities(gold, predicted)
            if scheme
            else dict.fromkeys(("precision", "recall", "f1", "support", "by_type"))
        ),
        "token_accuracy": right / words if words else 0.0,
        "words": words,
        "missing": words - sum(map(len, predicted)),
        "scheme": scheme,
    }


def _entities(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    truth = [list(tags) for tags in gold]
    said = [[*tags, *["O"] * (len(full) - len(tags))] for full, tags in zip(gold, predicted)]
    types = sorted({name for rows in (truth, said) for tags in rows for name, _, _ in spans(tags)})
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, said, average="micro", zero_division=0
    )
    columns = precision_recall_fscore_support(truth, said, average=None, zero_division=0)
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "support": int(support),
        "by_type": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for name, p, r, f, s in zip(types, *columns, strict=True)
        },
    }


def _parts(tag: str) -> tuple[str, str]:
    """``B-PER`` -> (B, PER); ``B`` -> (B, _)."""
    kind, _, name = tag.partition("-")
    return kind, name or "_"
