"""Ranked or labelled responses as one micro-batch: tokens to read, and responses to compare."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tunesmith.data.batch import shared_prompts
from tunesmith.data.batch.pack import Batch, Example, Layout, file_rows, tensors


def with_targets(examples: Sequence[Example], layout: Layout) -> Batch:
    """:func:`shared_prompts.arrange`, with the supervised tokens of all responses.

    positions, labels, owners (targets,): the position that predicts the token, the token, and the response's
    number in the batch; ``tokens`` (responses,): how many each has. :func:`_comparisons` adds the rest.
    """
    batch, places = shared_prompts.arrange(examples, layout)
    positions, labels, counts = [], [], []
    for (example, part), where in zip(_responses(examples), places, strict=True):
        prefix = len(where) - (part.stop - part.start)
        supervised = np.flatnonzero(example["supervised"][part]) + prefix
        supervised = supervised[supervised > 0]  # no token predicts a sequence's first one
        positions.append(where[supervised - 1])
        labels.append(example["input_ids"][part][supervised - prefix])
        counts.append(len(supervised))
    targets = tensors(
        positions=np.concatenate(positions).astype(np.int64), labels=np.concatenate(labels).astype(np.int64),
        owners=np.repeat(np.arange(len(counts)), counts), tokens=np.array(counts),
    )  # fmt: skip
    return {**batch, **targets, **_comparisons(examples)}


def with_last_tokens(examples: Sequence[Example], layout: Layout) -> Batch:
    """:func:`shared_prompts.arrange`, with the last token of each response.

    positions (responses,); ``places``: 1 for each response; ``tokens`` (responses,): tokens that each does
    not share with the others. :func:`_comparisons` adds the rest.
    """
    batch, places = shared_prompts.arrange(examples, layout)
    ends = tensors(
        positions=np.array([where[-1] for where in places]),
        tokens=np.array([part.stop - part.start for _, part in _responses(examples)]),
    )
    return {**batch, **ends, "places": [1] * len(places), **_comparisons(examples)}


def shorten(example: Example, prefix: int, own: int) -> Example:
    """Keep the last ``prefix`` tokens of the common prefix and the first ``own`` of each response.

    Where this removes all supervised tokens of a response, the tokens that it keeps are supervised.
    """
    common = int(example["answers"][0])
    parts = [slice(max(common - prefix, 0), common)]
    parts += [slice(part.start, min(part.stop, part.start + own)) for _, part in _responses([example])]
    supervised = [example["supervised"][part] for part in parts]
    supervised[1:] = [part if part.any() else np.ones_like(part) for part in supervised[1:]]
    return {
        **example,
        "input_ids": np.concatenate([example["input_ids"][part] for part in parts]),
        "supervised": np.concatenate(supervised),
        "answers": np.array([part.stop - part.start for part in parts], example["answers"].dtype),
    }


def _responses(examples: Sequence[Example]) -> list[tuple[Example, slice]]:
    """Each response of the batch: its example, and the slice of ``input_ids`` that it does not share."""
    return [
        (example, slice(int(start), int(end)))
        for example in examples
        for start, end in pairwise(np.cumsum(example["answers"]))
    ]


def _comparisons(examples: Sequence[Example]) -> Batch:
    """The pairs of responses that are compared.

    pairs (n, 2): the better and the worse response; margins, weights (n,): the weights of a row's pairs sum
    to 1 (Ouyang et al. 2022, equation 1); ``of`` (n,): index into ``rows`` of each pair; ``rows``: see
    ``pack.file_rows``; ``counts``: responses of each row; reference_logps float64 (responses,), computed
    before the first step, if the examples have them.
    """
    counts = [len(example["answers"]) - 1 for example in examples]
    first = np.cumsum(counts) - counts
    pairs = [example["pairs"].reshape(-1, 2) + start for example, start in zip(examples, first)]
    numbers = [len(row) for row in pairs]
    arrays: dict[str, np.ndarray] = {
        "pairs": np.concatenate(pairs).astype(np.int64),
        "margins": np.concatenate([example["margins"] for example in examples]).astype(np.float32),
        "weights": np.repeat([1 / max(number, 1) for number in numbers], numbers).astype(np.float32),
    }
    if all("reference_logps" in example for example in examples):
        arrays["reference_logps"] = np.concatenate([example["reference_logps"] for example in examples])
    of = np.repeat(np.arange(len(examples)), numbers).tolist()
    return {**tensors(**arrays), "of": of, "rows": file_rows(examples), "counts": counts}
