"""Examples to one micro-batch: packed into one sequence without padding, or padded on the right.

Functions of numpy arrays. Targets are positions, so no later code looks at a token's identity: position
``positions[i]`` of the flattened batch predicts ``labels[i]``. The first token of a row is never a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

Example: TypeAlias = dict[str, np.ndarray]
"""One row, ready for a loss: name -> 1-D array. Language models: ``input_ids`` int32, ``supervised`` bool."""

Batch: TypeAlias = dict[str, Any]
"""One micro-batch: tensors by name. Row lengths and numbers are lists and tuples of int."""


@dataclass(frozen=True)
class Layout:
    """Layout of a batch: ``packed`` into one sequence, or padded on the right. ``shared``: a packed
    batch holds once what several sequences begin with (``data.batch.shared_prompts``).

    ``lanes``: how many packed batches go through the network at the same time (``models.lanes``), each of at least
    ``lane_tokens`` tokens."""

    packed: bool
    shared: bool = False
    lanes: int = 1
    lane_tokens: int = 0


PACKED, PADDED = Layout(packed=True, shared=True), Layout(packed=False)


def tensors(**arrays: np.ndarray) -> Batch:
    """Wrap arrays as tensors that share their memory. Imports torch, which preparation does not need."""
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def arrange(examples: Sequence[Example], packed: bool) -> tuple[Batch, np.ndarray]:
    """Return the batch, and where each row begins in its flattened tokens.

    Packed: input_ids and position_ids (1, tokens), and ``segments``, the length of each row. Padded on the
    right: input_ids, position_ids and attention_mask (rows, longest row). Plus any token_type_ids.

    """
    lengths = np.array([len(example["input_ids"]) for example in examples])
    names = [name for name in ("input_ids", "token_type_ids") if name in examples[0]]
    arrays: dict[str, np.ndarray] = {
        name: np.concatenate([example[name] for example in examples]).astype(np.int64) for name in names
    }
    if packed:
        arrays["position_ids"] = np.concatenate([np.arange(length) for length in lengths])
        batch = tensors(**{name: array[None] for name, array in arrays.items()})
        return {**batch, "segments": tuple(lengths.tolist())}, np.cumsum(lengths) - lengths
    shape = (len(examples), int(lengths.max()))
    columns = np.broadcast_to(np.arange(shape[1]), shape)
    inside = columns < lengths[:, None]
    for name, tokens in arrays.items():
        arrays[name] = np.zeros(shape, np.int64)
        arrays[name][inside] = tokens
    arrays["position_ids"] = np.minimum(columns, lengths[:, None] - 1)
    return tensors(**arrays, attention_mask=inside.astype(np.int64)), np.arange(len(examples)) * shape[1]


def with_positions(examples: Sequence[Example], layout: Layout, read: Sequence[np.ndarray]) -> Batch:
    """:func:`arrange`, with the positions whose hidden states a head reads.

    ``read``: for each example, ascending token indices. The batch gets positions (read tokens,), indices into
    the flattened batch; ``places``, how many of them each row has; and ``rows``, see :func:`file_rows`.
    """
    batch, starts = arrange(examples, layout.packed)
    positions = np.concatenate([start + tokens for start, tokens in zip(starts, read)]).astype(np.int64)
    batch |= tensors(positions=positions)
    return {**batch, "places": [len(tokens) for tokens in read], "rows": file_rows(examples)}


def file_rows(examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """(source, row of its file) of each example; (0, 0) for an example that no file holds."""
    return [tuple(int(number) for number in example.get("row", (0, 0))) for example in examples]


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Copy the tensors of a batch to ``device``; everything else stays as it is."""
    import torch

    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
