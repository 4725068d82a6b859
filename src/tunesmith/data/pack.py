"""From examples to one micro-batch of a language model: side by side without padding, or padded on the right.

Pure functions of numpy arrays. Targets are given as places, so nothing downstream ever looks at a token's identity: position
``positions[i]`` of the flattened batch predicts ``labels[i]``. The first token of a row has nothing before it and is no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def pack(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """One sequence of segments: input_ids, position_ids (1, tokens); segments (lengths); positions, labels (targets,)."""
    import torch

    lengths = [len(example["input_ids"]) for example in examples]
    ids = np.concatenate([example["input_ids"] for example in examples]).astype(np.int64)
    learnt = np.concatenate([example["supervised"] for example in examples])
    learnt[np.cumsum([0, *lengths[:-1]])] = False
    targets = np.flatnonzero(learnt)
    return {
        "input_ids": torch.from_numpy(ids[None]),
        "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])[None]),
        "segments": tuple(lengths),
        "positions": torch.from_numpy(targets - 1),
        "labels": torch.from_numpy(ids[targets]),
    }


def pad(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Rows padded on the right: input_ids, position_ids, attention_mask (rows, longest); positions, labels (targets,)."""
    import torch

    lengths = np.array([len(example["input_ids"]) for example in examples])
    shape = (len(examples), int(lengths.max()))
    ids, learnt = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for row, example in enumerate(examples):
        ids[row, : lengths[row]] = example["input_ids"]
        learnt[row, : lengths[row]] = example["supervised"]
    learnt[:, 0] = False
    targets = np.flatnonzero(learnt)
    places = np.broadcast_to(np.arange(shape[1]), shape)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(np.minimum(places, lengths[:, None] - 1)),
        "attention_mask": torch.from_numpy((places < lengths[:, None]).astype(np.int64)),
        "positions": torch.from_numpy(targets - 1),
        "labels": torch.from_numpy(ids.reshape(-1)[targets]),
    }


def to_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """The batch with its tensors on ``device``; everything else stays as it is."""
    return {name: value.to(device, non_blocking=True) if hasattr(value, "to") else value for name, value in batch.items()}
