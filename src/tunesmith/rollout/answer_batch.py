"""Sampled answers as one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch import pack, shared_prompts
from tunesmith.data.batch.pack import Batch, Example, Layout
from tunesmith.models.heads.log_probs import at_targets

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NOT_OF_TOKENS = ("input_ids", "supervised", "shared", "row", "content", "cut")
"""Arrays of an example that do not belong to the tokens of its answer."""


def with_answers(examples: Sequence[Example], layout: Layout) -> Batch:
    """``shared_prompts.with_targets``, whose targets are the tokens of the answers, (tokens,); a prompt that has no
    answer, in the parity check of an evaluation, is a target itself.

    Arrays of the answers' tokens (``old_logps``, ``advantages``, ...) are joined, (tokens,). ``owners``
    (tokens,): the answer of each token. ``rows``: see ``pack.file_rows``.
    """
    examples = [
        {"supervised": np.ones(len(example["input_ids"]), np.bool_), **example} for example in examples
    ]
    batch = shared_prompts.with_targets(examples, layout)
    names = [name for name in examples[0] if name not in NOT_OF_TOKENS]
    joined = {name: np.concatenate([example[name] for example in examples]) for name in names}
    owners = np.repeat(np.arange(len(examples)), batch["lengths"])
    return {**batch, **pack.tensors(**joined, owners=owners), "rows": pack.file_rows(examples)}


def with_prefixes(examples: Sequence[Example]) -> list[Example]:
    """Add ``shared``, the number of first tokens to compute once for neighbours."""
    prompts = [example["input_ids"][~example["supervised"]] for example in examples]
    found = shared_prompts.prefixes(prompts)
    return [{**one, "shared": np.array([tokens])} for one, tokens in zip(examples, found, strict=True)]


def by_prompt(answers: np.ndarray, num_generations: int) -> np.ndarray:
    """Return the indices of answers with those to a prompt together, in the order of each prompt's first."""
    _, first, prompt = np.unique(answers // num_generations, return_index=True, return_inverse=True)
    return answers[np.argsort(first[prompt], kind="stable")]


def measure(model: PreTrainedModel, batch: Batch, temperature: float) -> list[dict[str, np.ndarray]]:
    """Return ``old_logps`` and ``entropies`` (tokens,) of each answer, at ``temperature``."""
    found = at_targets(model, batch, temperature, entropies=True)
    return arrays(batch, old_logps=found.logps, entropies=found.entropies)


def arrays(batch: Batch, **values: torch.Tensor | None) -> list[dict[str, np.ndarray]]:
    """Return ``values``, (tokens,) each, as arrays of each answer, by name; None is left out."""
    given = {name: one for name, one in values.items() if one is not None}
    columns = zip(*(by_answer(one, batch) for one in given.values()), strict=True)
    return [dict(zip(given, of_answer, strict=True)) for of_answer in columns]


def by_answer(values: torch.Tensor, batch: Batch) -> list[np.ndarray]:
    """Split ``values`` (tokens,) into an array for each answer."""
    ends = np.cumsum(batch["lengths"])[:-1]
    return np.split(values.detach().cpu().numpy(), ends)


def sums_of_answers(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum ``values`` (tokens,) over the tokens of each answer, (answers,)."""
    return values.new_zeros(len(batch["lengths"])).index_add(0, batch["owners"].to(values.device), values)
