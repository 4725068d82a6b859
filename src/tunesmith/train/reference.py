"""The reference: log-probabilities of every example under the policy at step 0.

It is computed once for all examples of the run, by the same data path and forward pass as training, and is
part of every checkpoint. So it is the policy at step 0 for every adaptation. A network with its adapters
switched off is not, where the adapters did not start as the identity (a continued adapter, PiSSA, a random
prefix); a second model would cost its memory.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tunesmith.data.batch.step import Batch, Example, Step
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.errors import RecipeError
from tunesmith.objectives import Objective, Session
from tunesmith.runs import figure_format
from tunesmith.train import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("input_ids", "answers", "other_ids")
"""Arrays of an example that its log-probabilities depend on, where it has them."""


def key_of(example: Example) -> int:
    """Hash an example's tokens to 63 bits, so that any order, split and number of processes finds it."""
    content = hashlib.blake2b(digest_size=8)
    for name in NAMES:
        if name in example:
            content.update(np.asarray(example[name], np.int32).tobytes())
    return int.from_bytes(content.digest(), "little") >> 1


class Reference:
    """Log-probabilities of examples, float64 (n,), by :func:`key_of`. Empty until computed or loaded."""

    def __init__(self) -> None:
        self._logps: dict[int, np.ndarray] = {}
        self.complete = False

    def __len__(self) -> int:
        return len(self._logps)

    def add(self, logps: Mapping[int, Sequence[float]]) -> None:
        self._logps |= {key: np.array(values, np.float64) for key, values in logps.items()}

    def attach(self, data: Encoded, index: int, example: Example) -> Example:
        """Add ``reference_logps`` to the example, once complete. Raises KeyError for an unknown example."""
        return {**example, "reference_logps": self._logps[key_of(example)]} if self.complete else example

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything for a checkpoint; nothing before the reference is complete."""
        if not self.complete:
            return {}
        keys = sorted(self._logps)
        values = np.concatenate([self._logps[key] for key in keys] or [np.zeros(0)])
        return {
            "reference.keys": torch.tensor(keys, dtype=torch.int64),
            "reference.counts": torch.tensor([len(self._logps[key]) for key in keys], dtype=torch.int64),
            "reference.values": torch.from_numpy(values),
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load from a checkpoint. Raises RecipeError if it contains no reference."""
        if "reference.keys" not in tensors:
            raise RecipeError(
                "the checkpoint lacks the reference (reference.keys) that this objective compares with, and the weights of "
                "step 0 are gone.\n"
                "  Start another run with --out DIR."
            )
        counts = tensors["reference.counts"].tolist()
        values = np.split(tensors["reference.values"].numpy(), np.cumsum(counts)[:-1])
        self._logps = dict(zip(tensors["reference.keys"].tolist(), values, strict=True))
        self.complete = True


def compute(
    reference: Reference,
    objective: Objective,
    session: Session,
    steps: Sequence[Step],
    note: Callable[[str], None],
) -> float:
    """Fill the reference with the log-probabilities of the current model, unless a checkpoint has filled it.

    ``steps``: every training example once (``Source.distinct``), and the held-out ones. Returns seconds.
    """
    if reference.complete:
        return 0.0
    started = time.perf_counter()
    session.model.eval()

    def logps(model: PreTrainedModel, batch: Batch) -> list[list[float]]:
        return [values.tolist() for values in objective.reference_logps(model, batch)]

    rows = tokens = 0
    for step in steps:
        rows, tokens = rows + len(step), tokens + int(step.lengths.sum())
        by_place = session.forward(logps, step)
        mine = {key_of(step.data[int(step.rows[place])]): values for place, values in by_place.items()}
        for part in distributed.gather([mine]):
            reference.add(part)
    reference.complete = True
    count = figure_format.count(tokens)
    note(f"the reference is the policy before its first step: {rows:,} rows, {count} tokens, computed once")
    return time.perf_counter() - started


def check_complete(reference: Reference, steps: Sequence[Step], folder: Path) -> None:
    """Raise RecipeError for an example of the run that the checkpoint's reference does not contain.

    ``folder``: the model folder, for the message.
    """
    for step in steps:
        for place in range(len(step)):
            try:
                step.examples([place])
            except KeyError:  # raised by ``attach``, which runs when an example is read
                raise RecipeError(
                    f"{step.name(place)} has other tokens than when the run was started, so the checkpoint has no "
                    "reference for it: the tokenizer, its chat template or the model's window changed.\n"
                    f"  Restore the files of {folder}, or start another run with --out DIR."
                ) from None
