"""For each example the response to another prompt: a pair that the policy did not choose, whose log-probability estimates how
far it has moved from the reference (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1).
"""

from __future__ import annotations

import numpy as np

from tunesmith.data.batch.step import Example
from tunesmith.data.store.encoded import Encoded


def attached(data: Encoded, max_length: int | None) -> Encoded:
    """The same examples with ``other_ids``, ``other_learnt``, ``other_answers``: the prompt with the response of the nearest
    example before it, cyclically, that has another prompt (by ``prompt_key``). A longer prompt is cut from the left."""
    partners = _partners(np.array([data[index]["prompt_key"][0] for index in range(len(data))]))

    def attach(rows: Encoded, index: int, example: Example) -> Example:
        other = rows.bare(int(partners[index]))
        prompt, theirs = int(example["answers"][0]), int(other["answers"][0])
        room = prompt if max_length is None else max_length - int(other["answers"][1])
        first = max(0, prompt - max(1, room))
        return {
            **example,
            "other_ids": np.concatenate([example["input_ids"][first:prompt], other["input_ids"][theirs:]]),
            "other_learnt": np.concatenate([np.zeros(prompt - first, np.bool_), other["learnt"][theirs:]]),
            "other_answers": np.array([prompt - first, len(other["input_ids"]) - theirs], np.int32),
        }

    return data.attaching(attach)


def of(example: Example) -> Example:
    """The example whose response is the other one."""
    swapped = {name: example[f"other_{name}"] for name in ("learnt", "answers")}
    return {**example, "input_ids": example["other_ids"], **swapped}


def _partners(keys: np.ndarray) -> np.ndarray:
    """For each example the index of the nearest one before it, cyclically, with another key; its neighbour where all are equal.

    Examples with equal keys that stand together look past their run, so runs are what is stepped over.
    """
    count = len(keys)
    before = (np.arange(count) - 1) % count
    if not (keys != keys[0]).any():
        return before
    partner = before.copy()
    start = int(np.flatnonzero(keys != keys[before])[0])  # a run begins here: whoever follows may look at its predecessor
    for index in (np.arange(count) + start) % count:
        if keys[partner[index]] == keys[index]:
            partner[index] = partner[before[index]]
    return partner
