"""From examples to one micro-batch: side by side without padding, or padded on the right.

Pure functions of numpy arrays. Targets are given as places, so nothing downstream ever looks at a token's identity: position
``positions[i]`` of the flattened batch predicts ``labels[i]``. The first token of a row has nothing before it and is no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Example = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """How examples become a batch: side by side in one sequence (``packed``) or padded on the right; ``shared``: several
    answers to one prompt have it once in a packed batch (``data.batch.shared_prompts``)."""

    packed: bool
    shared: bool = False


PACKED, PADDED = Layout(packed=True, shared=True), Layout(packed=False)


def with_targets(examples: Sequence[Example], layout: Layout) -> dict[str, Any]:
    """:func:`arrange`, with the targets of a language model: positions, labels (targets,)."""
    import torch

    batch, starts = arrange(examples, layout.packed)
    ids = batch["input_ids"].numpy().reshape(-1)
    learnt = np.zeros(len(ids), np.bool_)
    for start, example in zip(starts, examples):
        learnt[start : start + len(example["supervised"])] = example["supervised"]
    learnt[starts] = False
    targets = np.flatnonzero(learnt)
    return {**batch, "positions": torch.from_numpy(targets - 1), "labels": torch.from_numpy(ids[targets])}


def arrange(examples: Sequence[Example], packed: bool) -> tuple[dict[str, Any], np.ndarray]:
    """(batch, where each row begins in its flattened tokens).

    Packed, one sequence: input_ids, position_ids (1, tokens); segments (lengths). Padded on the right: input_ids, position_ids,
    attention_mask (rows, longest). With token_type_ids where the examples have some.
    """
    import torch

    lengths = np.array([len(example["input_ids"]) for example in examples])
    names = [name for name in ("input_ids", "token_type_ids") if name in examples[0]]
    if packed:
        batch: dict[str, Any] = {
            name: torch.from_numpy(
                np.concatenate([example[name] for example in examples]).astype(np.int64)[None]
            )
            for name in names
        }
        batch["position_ids"] = torch.from_numpy(
            np.concatenate([np.arange(length) for length in lengths])[None]
        )
        batch["segments"] = tuple(lengths.tolist())
        return batch, np.cumsum(lengths) - lengths
    shape = (len(examples), int(lengths.max()))
    batch = {}
    for name in names:
        filled = np.zeros(shape, np.int64)
        for row, example in enumerate(examples):
            filled[row, : lengths[row]] = example[name]
        batch[name] = torch.from_numpy(filled)
    places = np.broadcast_to(np.arange(shape[1]), shape)
    batch["position_ids"] = torch.from_numpy(np.minimum(places, lengths[:, None] - 1))
    batch["attention_mask"] = torch.from_numpy((places < lengths[:, None]).astype(np.int64))
    return batch, np.arange(len(examples)) * shape[1]


def of_rows(examples: Sequence[Example], layout: Layout, read: Sequence[np.ndarray]) -> dict[str, Any]:
    """:func:`arrange`, with the places whose outputs a head reads. ``read``: those of each example, ascending, within its tokens.

    positions (places,) in the flattened batch; places (how many of each row); rows: (source, row of the file) of each.
    """
    import torch

    batch, starts = arrange(examples, layout.packed)
    positions = np.concatenate([start + places for start, places in zip(starts, read)]).astype(np.int64)
    return {
        **batch,
        "positions": torch.from_numpy(positions),
        "places": [len(places) for places in read],
        "rows": [tuple(int(part) for part in example.get("row", (0, 0))) for example in examples],
    }


def to_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """The batch with its tensors on ``device``; everything else stays as it is."""
    return {
        name: value.to(device, non_blocking=True) if hasattr(value, "to") else value
        for name, value in batch.items()
    }
