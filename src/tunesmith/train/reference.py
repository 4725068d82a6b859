"""The reference: what the policy gives for every example before its first step, which later steps are compared with.

It is computed once, for the examples that the run will see, by the same data path and the same forward pass as training,
and is part of every checkpoint. So it is the policy at step 0 whatever the adaptation is: adapters that are switched off
are something else where they began as something else (a continued adapter, PiSSA, a random prefix), and a second model
would cost its memory.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    """63 bits of an example's tokens: any order, split and number of processes finds it by them."""
    content = hashlib.blake2b(digest_size=8)
    for name in NAMES:
        if name in example:
            content.update(np.asarray(example[name], np.int32).tobytes())
    return int.from_bytes(content.digest(), "little") >> 1


class Reference:
    """Log-probabilities float64 (n,) of examples, by :func:`key_of`. Empty until it is taken or loaded."""

    def __init__(self) -> None:
        self._known: dict[int, np.ndarray] = {}
        self.taken = False

    def __len__(self) -> int:
        return len(self._known)

    def add(self, found: Mapping[int, Sequence[float]]) -> None:
        self._known |= {key: np.array(values, np.float64) for key, values in found.items()}

    def attach(self, data: Encoded, index: int, example: Example) -> Example:
        """The example with ``reference_logps``, once they are taken. Raises KeyError for one that was not there then."""
        return {**example, "reference_logps": self._known[key_of(example)]} if self.taken else example

    def tensors(self) -> dict[str, Any]:
        """Everything, for a checkpoint; nothing where nothing was taken."""
        if not self.taken:
            return {}
        keys = sorted(self._known)
        return {
            "reference.keys": torch.tensor(keys, dtype=torch.int64),
            "reference.counts": torch.tensor([len(self._known[key]) for key in keys], dtype=torch.int64),
            "reference.values": torch.from_numpy(
                np.concatenate([self._known[key] for key in keys] or [np.zeros(0)])
            ),
        }

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Take it from a checkpoint. Raises RecipeError when it is not there: the weights of step 0 are gone by then."""
        if "reference.keys" not in tensors:
            raise RecipeError(
                "the checkpoint lacks the reference that this objective compares with, and the weights have moved since.\n"
                "  Start another run with --out DIR."
            )
        counts = tensors["reference.counts"].tolist()
        values = np.split(tensors["reference.values"].numpy(), np.cumsum(counts)[:-1])
        self._known = dict(zip(tensors["reference.keys"].tolist(), values, strict=True))
        self.taken = True


def take(
    reference: Reference,
    objective: Objective,
    session: Session,
    steps: Sequence[Step],
    say: Callable[[str], None],
) -> float:
    """Fill the reference with what the model gives now, unless a checkpoint has filled it. Returns the seconds it took.

    ``steps``: every example of the run, each once (``Source.distinct``), and the held-out ones.
    """
    if reference.taken:
        return 0.0
    started = time.perf_counter()
    session.model.eval()
    rows = tokens = 0
    for step in steps:
        rows, tokens = rows + len(step), tokens + int(step.lengths.sum())

        def measured(model: PreTrainedModel, batch: Batch) -> list[Any]:
            return [values.tolist() for values in objective.reference_logps(model, batch)]

        found = session.forward(measured, step)
        mine = {key_of(step.data[int(step.rows[place])]): values for place, values in found.items()}
        for part in distributed.gather([mine]):
            reference.add(part)
    reference.taken = True
    say(
        f"the reference is the policy before its first step: {rows:,} rows, {figure_format.count(tokens)} tokens, computed once"
    )
    return time.perf_counter() - started


def check_known(reference: Reference, steps: Sequence[Step], folder: Any) -> None:
    """Raise RecipeError where an example of the run is not among those that the checkpoint's reference was taken of."""
    for step in steps:
        for place in range(len(step)):
            try:
                step.examples([place])
            except KeyError:  # of ``attach``: an example is given its reference as soon as it is read
                raise RecipeError(
                    f"{step.name(place)} has other tokens than when the run was started, so the reference that the "
                    "checkpoint holds is not its own: the tokenizer, its chat template or the model's window changed.\n"
                    f"  Put the files of {folder} back as they were, or start another run with --out DIR."
                ) from None
