"""Mismatched pairs: each example's prompt with another example's response, for an estimate of the KL.

KTO (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1) compares a reward with the divergence of policy
and reference, and estimates it from prompts with responses to other prompts.
"""

from __future__ import annotations

import numpy as np

from tunesmith.data.batch.pack import Example
from tunesmith.data.store.encoded_rows import Encoded


def attach_other_response(data: Encoded, max_length: int | None, prefix: np.ndarray) -> Encoded:
    """Attach ``other_ids``, ``other_supervised``, ``other_answers``: its prompt with its partner's response.

    A pair above ``max_length`` tokens (None = any) loses tokens from the left of its prompt, but keeps
    ``prefix``, the tokens that the tokenizer puts first, if the prompt begins with them.
    """
    partners = find_partners(data)

    def attach(rows: Encoded, index: int, example: Example) -> Example:
        other = rows.stored(int(partners[index]))
        start = int(other["answers"][0])
        response, supervised = other["input_ids"][start:], other["supervised"][start:]
        prompt = example["input_ids"][: int(example["answers"][0])]
        if max_length is not None:
            prompt = _shorten_prompt(prompt, max(0, max_length - len(response)), prefix)
        return {
            **example,
            "other_ids": np.concatenate([prompt, response]),
            "other_supervised": np.concatenate([np.zeros(len(prompt), np.bool_), supervised]),
            "other_answers": np.array([len(prompt), len(response)], np.int32),
        }

    return data.attach(attach)


def mismatched_pair(example: Example) -> Example:
    """The example with its partner's response in place of its own."""
    arrays = {name: example[f"other_{name}"] for name in ("supervised", "answers")}
    return {**example, "input_ids": example["other_ids"], **arrays}


def find_partners(data: Encoded) -> np.ndarray:
    """int (n,): for each example the index of the nearest one before it, cyclically, that has another prompt.

    The partner is from the same source, so the metrics of an evaluation set do not depend on the other sets.
    Only where a source has a single prompt is it from another source.
    """
    keys = np.zeros(len(data), np.int64)
    partners = np.zeros(len(data), np.int64)
    members = [np.flatnonzero(data.source == number) for number in range(len(data.entries))]
    for entry, mine in zip(data.entries, members, strict=True):
        if len(mine):
            keys[mine] = entry.values["prompt_key"][entry.starts["prompt_key"][data.views.example[mine]]]
    for mine in members:
        if len(mine):
            several = (keys[mine] != keys[mine[0]]).any()
            partners[mine] = (
                mine[_nearest_other_key(keys[mine])] if several else _nearest_other_key(keys)[mine]
            )
    return partners


def _shorten_prompt(prompt: np.ndarray, room: int, prefix: np.ndarray) -> np.ndarray:
    """The last ``room`` tokens of a prompt; it keeps ``prefix`` if one more token has room."""
    if len(prompt) <= room:
        return prompt
    kept = len(prefix) if len(prefix) < room and np.array_equal(prompt[: len(prefix)], prefix) else 0
    return np.concatenate([prompt[:kept], prompt[len(prompt) - (room - kept) :]])


def _nearest_other_key(keys: np.ndarray) -> np.ndarray:
    """For each index the nearest one before it, cyclically, with another key; its neighbour if all are equal.

    An index whose predecessor has the same key takes its predecessor's partner.
    """
    count = len(keys)
    before = (np.arange(count) - 1) % count
    if not (keys != keys[0]).any():
        return before
    partner = before.copy()
    start = int(
        np.flatnonzero(keys != keys[before])[0]
    )  # its partner is its neighbour, so the walk begins here
    for index in (np.arange(count) + start) % count:
        if keys[partner[index]] == keys[index]:
            partner[index] = partner[before[index]]
    return partner
