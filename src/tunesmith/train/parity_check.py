"""The parity check: loss and gradients of a fast path, compared with those of transformers' own forward.

Trained tensors that start at zero (the B of a LoRA) hold small random numbers during the check: with zeros
half of the gradients would be zero on every path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tunesmith import machine
from tunesmith.data.batch import preference_batch
from tunesmith.data.batch.pack import PACKED, PADDED, Layout, to_device
from tunesmith.errors import ModelError
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.fast import attention, varlen
from tunesmith.models.fast.self_check import describe
from tunesmith.models.heads import noise
from tunesmith.models.network import FORWARD_ERRORS, base
from tunesmith.objectives import Example, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECK_TOKENS = 192
"""Most tokens of each row in the parity check: enough to use every layer."""
FEWEST_TOKENS = 32
"""Tokens of a row of a large network in fp32."""
CHECK_WORK = 4e9
"""Tokens of a row times parameters of the network, in fp32: the check costs about a second."""
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 0.15), torch.float16: (1e-3, 3e-2)}
"""Largest relative difference of the loss, and of all gradients together.

In bf16 the plain path itself differs from fp32 by some 4% of the gradient (SmolLM2-135M), in either
direction. In fp16 it differs by 0.7%, and by 6e-5 of the loss; the fast path differs from the plain one by
0.7% and 1e-4."""
REWARD_TOLERANCE = 3.0
"""Factor on the half-precision limits for a reward. A reward is trained on differences: the common part of
two answers cancels in the gradient, and its rounding does not. In bf16 the plain path itself is 11% from fp32
(SmolLM2-135M), its loss up to 1.5%."""
ZERO_STD = 0.02
"""Standard deviation of the numbers that replace zeros: that of transformers' initialisation."""
CALL_TOKENS = 24
"""Tokens of a row that shows how often, and with which arguments, the model calls attention."""
LOSS_SCALE = {torch.float16: 2.0**10}
"""Factor on the loss. Without it much of the gradient underflows in fp16, and equal paths differ by 1.6%."""


LossAndGradients = tuple[float, list[torch.Tensor]]


@dataclass(frozen=True)
class ParityCheck:
    """Compares loss and gradients of the first two rows on two paths."""

    model: PreTrainedModel
    objective: Objective
    rows: Sequence[Example]
    device: torch.device

    @classmethod
    def of_first_rows(
        cls, model: PreTrainedModel, objective: Objective, examples: Sequence[Example], device: torch.device
    ) -> ParityCheck:
        most = check_tokens(model)
        return cls(model, objective, [shorten(example, most) for example in list(examples)[:2]], device)

    def measure(self, layout: Layout) -> LossAndGradients:
        """Return the mean loss over the rows' units, and its gradients, which are cleared from the model.

        Padded rows go through the network one at a time, so that there is no padding.
        """
        objective, dtype = self.objective, self.model.dtype
        groups = [self.rows] if layout.packed else [[row] for row in self.rows]
        batches = [objective.collate(group, layout) for group in groups]
        total = sum(objective.count(batch) for batch in batches)
        value = 0.0
        for batch in batches:
            # also for a caller under no_grad: layers may take another path there for this few tokens
            with torch.enable_grad():
                loss, _ = objective.loss(self.model, to_device(batch, self.device))
            if loss.requires_grad:  # not in evaluation, where the check compares the loss alone
                (loss / total * LOSS_SCALE.get(dtype, 1.0)).backward()  # type: ignore[no-untyped-call]
            value += loss.item() / total
        gradients = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
                parameter.grad = None
        return value, gradients

    def may_share(self) -> bool:
        """Return whether a batch may hold once what several of its rows begin with.

        Not where noise or virtual tokens of its own make a row's hidden states there differ from another's, nor where the
        rows of this check, which has to prove it, begin differently."""
        objective = self.objective
        if not objective.traits.shares_beginnings:
            return objective.traits.shares_prompts
        if noise.of(self.model) is not None or virtual_tokens.count(self.model):
            return False
        return any(prefix >= 0 for prefix in objective.collate(self.rows, PACKED)["behind"])

    def measure_plain(self) -> LossAndGradients:
        """Run :meth:`measure` with the model's own forward on padded rows. Raises ModelError if it fails."""
        try:
            return self.measure(PADDED)
        except FORWARD_ERRORS as error:
            if machine.is_out_of_memory(error):
                raise
            name = base(self.model).config.model_type
            raise ModelError(
                f"{name}: the model's own forward and backward fail on the first rows ({describe(error)}), so "
                "tunesmith cannot train it.\n  Take another model, or another objective."
            ) from error

    def why_not_equal(self, expected: LossAndGradients, layout: Layout) -> str | None:
        """Return how the current path fails on the rows, or differs from ``expected``; None if equal."""
        try:
            measured = self.measure(layout)
        except (attention.CannotPack, *FORWARD_ERRORS) as error:
            if machine.is_out_of_memory(error):
                raise
            self.model.zero_grad()
            return f"failed ({describe(error)})"
        found = self.compare(expected, measured)
        return None if found is None else f"differed from the plain path ({found})"

    def measure_training(self, layout: Layout) -> LossAndGradients:
        """:meth:`measure` with the same random numbers at each call, for a network in training mode."""
        with machine.fork_rng(self.device), without_zeros(self.model):
            torch.manual_seed(0)  # some models draw dropout from torch's own stream
            return self.measure(layout)

    def compare(self, expected: LossAndGradients, found: LossAndGradients) -> str | None:
        """Describe a difference larger than the network's dtype explains; None otherwise.

        An expected loss that is not finite is accepted: the run itself stops at it.
        """
        dtype, traits = self.model.dtype, self.objective.traits
        reward = traits.deterministic and traits.head == "score"
        return difference(expected, found, dtype, REWARD_TOLERANCE if reward else 1.0)

    def why_not_packed(self, name: str, layout: Layout, longest: int) -> str | None:
        """Set the model's attention to ``name``; return why packing is not exact with it, or None."""
        inner = base(self.model)
        try:
            inner.set_attn_implementation(name)
            with torch.no_grad(), attention.watch() as calls:
                rows = [shorten(row, CALL_TOKENS) for row in self.rows]
                self.objective.loss(self.model, to_device(self.objective.collate(rows, layout), self.device))
        except attention.CannotPack as reason:
            return str(reason)
        except FORWARD_ERRORS as error:
            if machine.is_out_of_memory(error):
                raise
            return f"its forward fails on packed rows ({describe(error)})"
        if len(calls) != inner.config.num_hidden_layers:
            return f"it called attention {len(calls)} times in {inner.config.num_hidden_layers} layers"
        windows = [window for window in calls if window is not None and window < longest]
        if windows and name != varlen.NAME:
            return f"its attention window is {min(windows)} tokens and the longest row has {longest}"
        return None


def difference(
    expected: LossAndGradients, found: LossAndGradients, dtype: torch.dtype, factor: float = 1.0
) -> str | None:
    """See :meth:`ParityCheck.compare`. ``factor``: multiplies the limits of half precision."""
    loss_limit, gradient_limit = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if dtype in (torch.bfloat16, torch.float16):
        loss_limit, gradient_limit = loss_limit * factor, gradient_limit * factor
    if not np.isfinite(expected[0]):
        return None
    loss = abs(expected[0] - found[0]) / max(abs(expected[0]), 1e-6)
    pairs = zip(expected[1], found[1], strict=True)
    distance = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs) ** 0.5
    norm = sum(float(a.float().square().sum()) for a in expected[1]) ** 0.5
    gradient = distance / norm if norm else distance
    if loss <= loss_limit and gradient <= gradient_limit:
        return None
    return f"loss by {loss:.1e}, gradients by {gradient:.1e} of their norm"


@contextmanager
def without_zeros(model: PreTrainedModel) -> Iterator[None]:
    """Fill trained tensors that are all zero with small fixed numbers inside the block."""
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    zeros = [(parameter, parameter.detach().clone()) for parameter in trained if not parameter.detach().any()]
    with torch.no_grad():
        for parameter, zero in zeros:
            parameter.copy_(torch.randn(zero.shape, generator=generator) * ZERO_STD)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, zero in zeros:
                parameter.copy_(zero)


def check_tokens(model: PreTrainedModel) -> int:
    """Return the most tokens of a row in the check of ``model``.

    In 16 bits it is always ``CHECK_TOKENS``: the fewer tokens a gradient is summed over, the larger is its
    rounding error. With 16 tokens, the gradients of SmolLM2-135M in bf16 differed by up to 14%, with 60 by 8%.
    In fp32 they differed by 6e-6 with 24 tokens, by 4e-6 with 60.
    """
    if model.dtype != torch.float32:
        return CHECK_TOKENS
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return int(min(CHECK_TOKENS, max(FEWEST_TOKENS, CHECK_WORK // max(1, parameters))))


def shorten(example: Example, most: int) -> Example:
    """Return the row's first tokens, with some around the first supervised one; rows of task heads stay whole.

    ``most``: number of tokens that are left."""
    if "answers" in example:
        return preference_batch.shorten(example, most // 2, most // 4)
    if "supervised" not in example:
        return example
    supervised = np.flatnonzero(example["supervised"][1:]) + 1
    places = np.arange(len(example["input_ids"]))
    kept = places < most
    if len(supervised) and supervised[0] >= most:  # the answer to a long prompt
        kept = (places < most // 2) | (abs(places - supervised[0]) < most // 4)
    short = {
        name: np.array(values[kept] if len(values) == len(places) else values)
        for name, values in example.items()
    }
    if "shared" in example:
        short["shared"] = np.array([kept[: int(example["shared"][0])].sum()])
    if not len(supervised):
        short["supervised"][:] = True
    return short
