"""Judged answers as one micro-batch: what is read of each answer, which answers are compared, and what a row is known by."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tunesmith.data.batch import shared_prompts
from tunesmith.data.batch.pack import Example, Layout

Batch = dict[str, Any]


def of_targets(examples: Sequence[Example], layout: Layout) -> Batch:
    """:func:`shared_prompts.arrange` with the learnt tokens of all answers.

    positions, labels, owners (targets,): the place that predicts, the token, the answer's number in the batch; ``tokens``
    (answers,): how many of each. And what :func:`_compared` gives.
    """
    import torch

    batch, places = shared_prompts.arrange(examples, layout)
    positions, labels, counts = [], [], []
    for (example, part), where in zip(_parts(examples), places, strict=True):
        ahead = len(where) - (part.stop - part.start)
        learnt = np.flatnonzero(example["learnt"][part]) + ahead
        learnt = learnt[learnt > 0]  # nothing stands before a first token
        positions.append(where[learnt - 1])
        labels.append(example["input_ids"][part][learnt - ahead])
        counts.append(len(learnt))
    return {
        **batch,
        "positions": torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        "labels": torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        "owners": torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        "tokens": torch.tensor(counts),
        **_compared(examples),
    }


def of_ends(examples: Sequence[Example], layout: Layout) -> Batch:
    """:func:`shared_prompts.arrange` with the last token of each answer.

    positions (answers,); places: 1 for each answer. ``tokens`` (answers,): how many each has of its own. And what
    :func:`_compared` gives.
    """
    import torch

    batch, places = shared_prompts.arrange(examples, layout)
    return {
        **batch,
        "positions": torch.tensor([int(where[-1]) for where in places]),
        "places": [1] * len(places),
        "tokens": torch.tensor([part.stop - part.start for _, part in _parts(examples)]),
        **_compared(examples),
    }


def shortened(example: Example, prefix: int, own: int) -> Example:
    """The last ``prefix`` tokens of what the answers have in common, and the first ``own`` of each; all of these learnt when the
    cut left none to learn."""
    common = int(example["answers"][0])
    parts = [slice(max(common - prefix, 0), common)]
    parts += [slice(part.start, min(part.stop, part.start + own)) for _, part in _parts([example])]
    learnt = [example["learnt"][part] for part in parts]
    learnt[1:] = [part if part.any() else np.ones_like(part) for part in learnt[1:]]
    return {
        **example,
        "input_ids": np.concatenate([example["input_ids"][part] for part in parts]),
        "learnt": np.concatenate(learnt),
        "answers": np.array([part.stop - part.start for part in parts], example["answers"].dtype),
    }


def _parts(examples: Sequence[Example]) -> list[tuple[Example, slice]]:
    """Every answer of the batch: its example, and where in ``input_ids`` its own tokens stand."""
    found = []
    for example in examples:
        ends = np.cumsum(example["answers"])
        found += [(example, slice(int(start), int(end))) for start, end in pairwise(ends)]
    return found


def _compared(examples: Sequence[Example]) -> Batch:
    """pairs (n, 2): better and worse answer; margins, weights (n,): a row's sum to 1 (Ouyang et al. 2022, equation 1).

    ``of`` (n,): which of ``rows`` a pair is of; ``rows``: (source, row of the file); ``counts``: answers of each row. And
    what :func:`reference_logps` gives.
    """
    import torch

    counts = [len(example["answers"]) - 1 for example in examples]
    first = np.cumsum(counts) - counts
    several = [example["pairs"].reshape(-1, 2) + start for example, start in zip(examples, first)]
    numbers = [len(one) for one in several]
    return {
        "pairs": torch.from_numpy(np.concatenate(several).astype(np.int64)),
        "margins": torch.from_numpy(
            np.concatenate([example["margins"] for example in examples]).astype(np.float32)
        ),
        "weights": torch.from_numpy(np.repeat([1 / max(n, 1) for n in numbers], numbers).astype(np.float32)),
        "of": np.repeat(np.arange(len(examples)), numbers).tolist(),
        "rows": [tuple(int(part) for part in example.get("row", (0, 0))) for example in examples],
        "counts": counts,
        **reference_logps(examples),
    }


def reference_logps(examples: Sequence[Example]) -> Batch:
    """``reference_logps`` float64 (answers,) where the examples have them: what the policy gave before its first step."""
    import torch

    if any("reference_logps" not in example for example in examples):
        return {}
    return {
        "reference_logps": torch.from_numpy(
            np.concatenate([example["reference_logps"] for example in examples])
        )
    }
