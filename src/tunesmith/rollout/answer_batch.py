"""Sampled answers as one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch import pack
from tunesmith.data.batch.pack import Batch, Example, Layout
from tunesmith.models.heads.log_probs import with_entropies

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NOT_OF_TOKENS = ("input_ids", "supervised", "row", "content", "cut")
"""Arrays of an example that do not belong to the tokens of its answer."""


def with_answers(examples: Sequence[Example], layout: Layout) -> Batch:
    """``pack.with_targets``, whose targets are the tokens of the answers, (tokens,); a prompt that has no
    answer, in the parity check of an evaluation, is a target itself.

    Arrays of the answers' tokens (``old_logps``, ``advantages``, ...) are joined, (tokens,). ``owners``
    (tokens,): the answer of each token. ``lengths``: tokens of each answer, on the host. ``rows``: see
    ``pack.file_rows``.
    """
    examples = [
        {"supervised": np.ones(len(example["input_ids"]), np.bool_), **example} for example in examples
    ]
    batch = pack.with_targets(examples, layout)
    # the first token of a row is no target, so a prompt without a token would shift the arrays
    lengths = [int(np.count_nonzero(example["supervised"][1:])) for example in examples]
    names = [name for name in examples[0] if name not in NOT_OF_TOKENS]
    joined = {name: np.concatenate([example[name] for example in examples]) for name in names}
    owners = np.repeat(np.arange(len(examples)), lengths)
    rows = pack.file_rows(examples)
    return {**batch, **pack.tensors(**joined, owners=owners), "lengths": lengths, "rows": rows}


def measure(model: PreTrainedModel, batch: Batch, temperature: float) -> list[dict[str, np.ndarray]]:
    """Return ``old_logps`` and ``entropies`` (tokens,) of each answer, at ``temperature``."""
    logps, entropies, _ = with_entropies(model, batch, temperature)
    return arrays(batch, old_logps=logps, entropies=entropies)


def arrays(batch: Batch, **values: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """Return ``values``, (tokens,) each, as arrays of each answer, by name."""
    columns = zip(*(by_answer(one, batch) for one in values.values()), strict=True)
    return [dict(zip(values, of_answer, strict=True)) for of_answer in columns]


def by_answer(values: torch.Tensor, batch: Batch) -> list[np.ndarray]:
    """Split ``values`` (tokens,) into an array for each answer."""
    ends = np.cumsum(batch["lengths"])[:-1]
    return np.split(values.detach().cpu().numpy(), ends)


def sums_of_answers(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum ``values`` (tokens,) over the tokens of each answer, (answers,)."""
    return values.new_zeros(len(batch["lengths"])).index_add(0, batch["owners"].to(values.device), values)
