"""Check, before training, that batches do not change a row's hidden states.

The expected states are those of transformers' own forward, which gets one row's tokens and chooses the
position ids itself. The batches of a run also have position ids, padding and a mask. Each of them can change
the hidden states: roberta's family begins at another position, and a convolution reads the padding. The check
runs the model, because the name of its architecture proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith import machine
from tunesmith.errors import ModelError
from tunesmith.models.fast.self_check import describe
from tunesmith.models.heads import lm_head
from tunesmith.models.heads.lm_head import Batch
from tunesmith.models.network import FORWARD_ERRORS, attribute, base, first_position, padding_ids, pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 24
"""Tokens of the longer of the two rows."""
SAME = 1e-5
"""Largest relative difference if only the position ids are given: the operations are the same."""
CLOSE = {torch.float32: 1e-4}
"""Largest relative difference between batches of different shapes."""
CLOSE_IN_HALF = 0.15


class RowCheck:
    """Compares the hidden states of two rows. The first has tokens of ``ids``, the second is its first half.

    ``model`` must be in eval mode."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], device: torch.device) -> None:
        self.model = model
        padding = padding_ids(model)
        tokens = [int(token) for token in ids if int(token) not in padding] or [max(padding, default=0) + 1]
        tokens = (tokens * 4)[: max(4, min(len(tokens), TOKENS))]
        self.long = torch.tensor([tokens], device=device)
        self.short = self.long[:, : len(tokens) // 2]
        self.name = base(model).config.model_type
        self.close = CLOSE.get(model.dtype, CLOSE_IN_HALF)
        self.expected = [self._stock(row, row is self.short) for row in (self.long, self.short)]

    def number_tokens(self) -> str | None:
        """Find the first position id of transformers' own forward, and let batches begin there. Return None.

        If no position ids reproduce its hidden states, batches have no position ids; return the difference.
        """
        columns = torch.arange(self.long.shape[1], device=self.long.device)
        found: list[str] = []
        for first in dict.fromkeys((first_position(base(self.model)), 0, 1, 2)):
            lm_head.number_from(self.model, first)
            different = self._differs(self.long, {"position_ids": columns[None]}, self.expected[:1], SAME)
            if different is None:
                return None
            found.append(different)
        lm_head.number_from(self.model, None)
        return found[0]

    def require_causal(self) -> None:
        """Raise ModelError if a token's hidden states depend on the tokens after it."""
        whole, part = self.expected
        if (
            whole.dim() == part.dim() == 2
            and len(part) <= len(whole)
            and _distance(whole[: len(part)], part) > self.close
        ):
            raise ModelError(
                f"{self.name}: a token sees the tokens after it, so this model cannot learn to predict the next one.\n"
                "  Take a decoder such as smollm2-135m, or objective: classify, tag or qa. If it was trained as a "
                "decoder, set is_decoder: true in its config.json."
            )

    def require_padding_ignored(self) -> None:
        """Raise ModelError if a padded batch of both rows changes the hidden states of a row."""
        ids = self.long.repeat(2, 1)
        ids[1, self.short.shape[1] :] = 0
        mask = torch.ones_like(ids)
        mask[1, self.short.shape[1] :] = 0
        columns = torch.arange(ids.shape[1], device=ids.device)
        positions = torch.minimum(columns, mask.sum(dim=1, keepdim=True) - 1)
        batch = {"attention_mask": mask, "position_ids": positions}
        if (found := self._differs(ids, batch, self.expected, self.close)) is not None:
            raise ModelError(
                f"{self.name} gives a row other hidden states next to padding than alone ({found}), so what it learns and "
                "predicts would depend on the other rows of a batch.\n  Take another model."
            )

    def _stock(self, ids: Tensor, from_tokens_alone: bool) -> Tensor:
        """Return a row's hidden states by transformers' own forward, from its tokens and a mask of ones.

        ``from_tokens_alone``: also run it without a mask, as users of the saved model do."""
        inner = base(self.model)
        # no head of transformers pools by the mean, so such a model is checked without its head
        stock = inner.base_model if pooling(inner.config) == "mean" else inner
        try:
            with torch.no_grad():
                if from_tokens_alone:
                    stock(input_ids=ids)
            return self._states({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
        except FORWARD_ERRORS as error:
            if machine.is_out_of_memory(error):
                raise
            raise ModelError(
                f"{self.name}: transformers' own forward fails on the first row ({describe(error)}), so tunesmith "
                "cannot train this model.\n  Check its config.json, or take another model."
            ) from error

    def _states(self, batch: Batch) -> Tensor:
        """Return the hidden states of a padded batch (rows, tokens, width), or logits if there is no body."""
        inner = base(self.model)
        with torch.no_grad():
            out = inner.base_model(**lm_head.inputs(self.model, batch))
        states: Tensor = attribute(out, "last_hidden_state", "logits")
        return states.float()

    def _differs(self, ids: Tensor, batch: Batch, expected: Sequence[Tensor], limit: float) -> str | None:
        """Describe an error, or the largest difference from ``expected``; None if it is at most ``limit``."""
        try:
            found = self._states({"input_ids": ids, "attention_mask": torch.ones_like(ids), **batch})
        except FORWARD_ERRORS as error:
            if machine.is_out_of_memory(error):
                raise
            return describe(error)
        pairs = zip(found, expected, strict=True)
        distance = max(_distance(ours[: len(theirs)], theirs) for ours, theirs in pairs)
        return None if distance <= limit else f"by {distance:.1e} of their norm"


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference, relative to that of ``theirs``.

    It is infinite if the shapes differ or if the norm is not a number."""
    if ours.shape != theirs.shape:
        return float("inf")
    distance = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-6))
    return distance if distance == distance else float("inf")
