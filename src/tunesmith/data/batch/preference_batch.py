"""Judged answers as one micro-batch: what is read of each answer, which answers are compared, and what a row is known by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tunesmith.data.batch import shared_prompts
from tunesmith.data.batch.pack import Example

Batch = dict[str, Any]


def of_targets(examples: Sequence[Example], packed: bool, shared: bool) -> Batch:
    """:func:`pairs.layout` with the learnt tokens of all answers.

    positions, labels, owners (targets,): the place that predicts, the token, the answer's number in the batch; ``tokens``
    (answers,): how many of each. And what :func:`_compared` gives.
    """
    import torch

    batch, places = shared_prompts.layout(examples, packed, shared)
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


def of_ends(examples: Sequence[Example], packed: bool, shared: bool) -> Batch:
    """:func:`pairs.layout` with the last token of each answer.

    positions (answers,); places: 1 for each answer. ``tokens`` (answers,): how many each has of its own. And what
    :func:`_compared` gives.
    """
    import torch

    batch, places = shared_prompts.layout(examples, packed, shared)
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

    ``of`` (n,): which of ``rows`` a pair is of; ``rows``: (source, row of the file); ``keys``: 63 bits of each row's content;
    ``counts``: answers of each row.
    """
    import torch

    counts = [len(example["answers"]) - 1 for example in examples]
    first = np.cumsum(counts) - counts
    several = [example["pairs"].reshape(-1, 2) + start for example, start in zip(examples, first)]
    numbers = [len(one) for one in several]
    return {
        "pairs": torch.from_numpy(np.concatenate(several).astype(np.int64)),
        "margins": torch.from_numpy(np.concatenate([example["margins"] for example in examples]).astype(np.float32)),
        "weights": torch.from_numpy(np.repeat([1 / max(n, 1) for n in numbers], numbers).astype(np.float32)),
        "of": np.repeat(np.arange(len(examples)), numbers).tolist(),
        "rows": [tuple(int(part) for part in example.get("row", (0, 0))) for example in examples],
        "keys": [key_of(example) for example in examples],
        "counts": counts,
    }


def key_of(example: Example) -> int:
    """63 bits of what a row says to the network."""
    content = hashlib.blake2b(np.asarray(example["input_ids"], np.int32).tobytes(), digest_size=8)
    content.update(np.asarray(example["answers"], np.int32).tobytes())
    return int.from_bytes(content.digest(), "little") >> 1


class Reference:
    """Log-probabilities of the answers of rows, as the policy gave them before its first step. Empty until it is taken.

    It is known by a row's content, so any order, split and number of processes finds it.
    """

    def __init__(self) -> None:
        self._known: dict[int, np.ndarray] = {}
        self.taken = False

    def __contains__(self, key: int) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(self, found: Mapping[int, Sequence[float]]) -> None:
        self._known |= {key: np.array(values, np.float64) for key, values in found.items()}

    def of(self, batch: Batch) -> Any:
        """float64 (answers,) of a batch. Raises KeyError for a row that was not there when it was taken."""
        import torch

        return torch.from_numpy(np.concatenate([self._known[key] for key in batch["keys"]]))

    def tensors(self) -> dict[str, Any]:
        """Everything, for a checkpoint; nothing where nothing was taken."""
        import torch

        if not self.taken:
            return {}
        keys = sorted(self._known)
        return {
            "reference.keys": torch.tensor(keys, dtype=torch.int64),
            "reference.counts": torch.tensor([len(self._known[key]) for key in keys], dtype=torch.int64),
            "reference.values": torch.from_numpy(np.concatenate([self._known[key] for key in keys] or [np.zeros(0)])),
        }

    def load(self, tensors: Mapping[str, Any]) -> bool:
        """Take it from a checkpoint's tensors; whether it is there."""
        if "reference.keys" not in tensors:
            return False
        counts = tensors["reference.counts"].tolist()
        values = np.split(tensors["reference.values"].numpy(), np.cumsum(counts)[:-1])
        self._known = dict(zip(tensors["reference.keys"].tolist(), values, strict=True))
        self.taken = True
        return True
