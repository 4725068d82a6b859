"""Figures of tagged words by row: accuracy, entities, each type, and the loss of the tags' frequencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tunesmith.json_types import JsonObject
from tunesmith.metrics import entities
from tunesmith.metrics.intervals import Place, RowFigure

Answers = Sequence[JsonObject]
"""Rows with their place ``row``, their true tags ``gold`` and their predicted tags ``prediction``."""


def ratios(answers: Answers, scheme: str | None, always: str | None = None) -> dict[str, RowFigure]:
    """Return accuracy and the entities' F1, precision and recall.

    ``always``: a tag that is predicted for every word, in place of the answers' predictions."""
    figures: dict[str, dict[Place, tuple[float, ...]]] = {}
    for answer in answers:
        tags = answer["prediction"] if always is None else [always] * len(answer["gold"])
        for name, sums in entities.sums_of_row(answer["gold"], tags, scheme).items():
            figures.setdefault(f"eval_{name}", {})[_place(answer)] = sums
    return {name: RowFigure(rows) for name, rows in figures.items()}


def f1_by_type(answers: Answers) -> dict[str, RowFigure]:
    """Return the F1 of each entity type. Rows without the type have terms too: of zero."""
    zeros = dict.fromkeys(map(_place, answers), (0.0, 0.0))
    by_type: dict[str, dict[Place, tuple[float, ...]]] = {}
    for answer in answers:
        for name, sums in entities.f1_terms_by_type(answer["gold"], answer["prediction"]).items():
            by_type.setdefault(name, dict(zeros))[_place(answer)] = sums
    return {name: RowFigure(rows) for name, rows in by_type.items()}


def frequency_loss(targets: Mapping[Place, np.ndarray]) -> RowFigure:
    """Return the loss if the probability of each tag is its share of all words.

    ``targets``: the tag ids of each row, -1 or less where the tag is not known."""
    known = {place: ids[ids >= 0] for place, ids in targets.items()}
    counts = np.bincount(np.concatenate(list(known.values())))
    losses = -np.log(np.maximum(counts, 1) / counts.sum())
    return RowFigure({place: (float(losses[ids].sum()), float(len(ids))) for place, ids in known.items()})


def _place(answer: JsonObject) -> Place:
    return answer["row"][0], answer["row"][1]
