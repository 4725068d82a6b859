"""Metrics of tagged words: entities as seqeval counts them, and the share of correct tags."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from tunesmith.json_types import JsonObject

Span = tuple[str, int, int]
"""(type, first word, last word + 1)."""

PROBLEMS = {
    "inside_without_begin": "an I- with no B- before it",
    "end_without_begin": "an E- with no B- before it",
    "type_change": "an entity whose type changes inside it",
    "no_end": "an entity with no E- at its end",
}
"""The kinds that :func:`problems` counts, in words."""


ENTITY_TAG = re.compile(r"O|[BIESLUMW](-\S.*)?")
"""Matches a tag of IOB, BIOES, BILOU or BMES."""


def scheme_of(tags: Iterable[str]) -> str | None:
    """Return the scheme of a set of tags: "BIO" (IOB2), "BIOES" (IOBES) or "IO"; None for other tags.

    ``B-PER`` has the type PER; a bare ``B``, ``I``, ``E`` or ``S`` has the type "_". Parts of speech, BILOU
    and O alone are no entities. One tag of another form is enough for None.
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

    An I- or E- continues an entity of its type that a B- or I- left open; any other tag but O starts an
    entity. The tags must be of a scheme that :func:`scheme_of` knows: seqeval warns about others.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    return [(name, first, last + 1) for name, first, last in get_entities(list(tags))]


def odd_tags(tags: Iterable[str]) -> tuple[str | None, list[str]]:
    """Return the scheme of the tags with a type, and the tags that no entity scheme has.

    Parts of speech have no scheme, so none of them is odd."""
    names = list(dict.fromkeys(tags))
    scheme = scheme_of(tag for tag in names if tag == "O" or tag[1:2] == "-")
    return scheme, [tag for tag in names if scheme and not ENTITY_TAG.fullmatch(tag)]


def is_iob1(rows: Iterable[Sequence[str]]) -> bool:
    """Return whether the rows' tags follow IOB1.

    There an entity begins with I-, or with B- if an entity of the same type is right before it. Tags without
    any B- are not taken for IOB1: they are IO, which has the same entities."""
    begins_inside = begins = False
    for tags in rows:
        before = ""
        for tag in tags:
            kind, _, name = tag.partition("-")
            follows = before in (f"B-{name}", f"I-{name}") if name else before in ("B", "I")
            if kind == "B" and not follows:
                return False
            begins |= kind == "B"
            begins_inside |= kind == "I" and not follows
            before = tag
    return begins and begins_inside


def to_iob2(tags: Sequence[str]) -> tuple[str, ...]:
    """Convert IOB1 tags to IOB2, where every entity begins with B-."""
    converted, before = [], ""
    for tag in tags:
        inside = tag == "I" or tag.startswith("I-")
        begins = inside and before[1:] != tag[1:]
        converted.append("B" + tag[1:] if begins or (inside and before[:1] not in ("B", "I")) else tag)
        before = tag
    return tuple(converted)


def complete(names: Iterable[str]) -> set[str]:
    """Add the tags that complete each type in its scheme: B- and I-; in BIOES also E- and S-."""
    found = set(names)
    kinds = {"BIO": "BI", "BIOES": "BIES"}.get(scheme_of(found) or "", "")
    return found | {kind + tag[1:] for tag in found if tag != "O" for kind in kinds}


def problems(tags: Sequence[str], scheme: str | None = "BIO") -> Counter[str]:
    """Count by the kinds of PROBLEMS how often one row's tags break their scheme.

    :func:`spans` still reads such tags. Only BIOES has ``no_end``. IO and plain tags (None) have nothing to
    break.
    """
    counts: Counter[str] = Counter()
    if scheme not in ("BIO", "BIOES"):
        return counts
    open_type: str | None = None
    for tag in [*tags, "O"]:
        kind, _, name = tag.partition("-")
        name = name or "_"
        if kind in ("I", "E") and name != open_type:
            without_begin = "inside_without_begin" if kind == "I" else "end_without_begin"
            counts[without_begin if open_type is None else "type_change"] += 1
        elif open_type is not None and kind not in ("I", "E") and scheme == "BIOES":
            counts["no_end"] += 1
        open_type = name if kind in ("B", "I") else None
    return counts


def score(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], scheme: str | None = None
) -> JsonObject:
    """Return entity metrics over rows of tags.

    Keys: precision, recall and f1 (micro, over all entities), support (entities in ``gold``), by_type {type:
    {precision, recall, f1, support}}, token_accuracy (share of words whose tag is correct), words, missing,
    scheme. An entity is correct when its type and both ends are. A metric with nothing to divide by is 0. The
    entity metrics are None where the tags are no entities.

    ``scheme``: the scheme of the tags, for rows that may not show it (O alone); None = :func:`scheme_of`
    these rows. A row may have fewer predictions than words: a missing one is wrong, and counts as "O" for the
    entities. Raises ValueError when a row has more predictions than words, or the numbers of rows differ.
    """
    if len(gold) != len(predicted):
        raise ValueError(f"{len(gold)} rows of tags, but {len(predicted)} rows of predictions")
    for row, (tags, answers) in enumerate(zip(gold, predicted)):
        if len(answers) > len(tags):
            raise ValueError(f"row {row} has {len(tags)} words, but {len(answers)} predictions")
    words = sum(map(len, gold))
    correct = sum(tag == answer for rows in zip(gold, predicted) for tag, answer in zip(*rows))
    scheme = scheme or scheme_of(tag for rows in (gold, predicted) for tags in rows for tag in tags)
    none = dict.fromkeys(("precision", "recall", "f1", "support", "by_type"))
    return {
        **(_entity_metrics(gold, predicted) if scheme else none),
        "token_accuracy": correct / words if words else 0.0,
        "words": words,
        "missing": words - sum(map(len, predicted)),
        "scheme": scheme,
    }


def sums_of_row(
    gold: Sequence[str], predicted: Sequence[str], scheme: str | None
) -> dict[str, tuple[float, float]]:
    """Return a row's terms of accuracy, F1, precision and recall, each a ratio of two sums over rows."""
    right = sum(tag == true for tag, true in zip(predicted, gold))
    sums = {"accuracy": (float(right), float(len(gold)))}
    if scheme is None:
        return sums
    found, true_spans = set(spans(predicted)), set(spans(gold))
    hits = float(len(found & true_spans))
    marks = {"f1": len(found) + len(true_spans), "precision": len(found), "recall": len(true_spans)}
    return sums | {name: (2 * hits if name == "f1" else hits, float(below)) for name, below in marks.items()}


def f1_terms_by_type(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return a row's two terms of the F1 of each entity type that is true or predicted in it."""
    true_spans, found = set(spans(gold)), set(spans(predicted))
    hits = Counter(name for name, _, _ in found & true_spans)
    marks = Counter(name for name, _, _ in [*found, *true_spans])
    return {name: (2.0 * hits[name], float(count)) for name, count in marks.items()}


def _entity_metrics(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> JsonObject:
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    truth = [list(tags) for tags in gold]
    padded = [[*answers, *["O"] * (len(tags) - len(answers))] for tags, answers in zip(gold, predicted)]
    types = sorted({name for rows in (truth, padded) for tags in rows for name, _, _ in spans(tags)})
    overall = precision_recall_fscore_support(truth, padded, average="micro", zero_division=0)
    by_type = precision_recall_fscore_support(truth, padded, average=None, zero_division=0)
    rows = zip(types, *by_type, strict=True)
    return {**_named(*overall), "by_type": {name: _named(*metrics) for name, *metrics in rows}}


def _named(precision: float, recall: float, f1: float, support: int) -> dict[str, float]:
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(support)}
