"""A ranking to tokens: the prompt that its responses share once, then each response."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np

from tunesmith.data.batch.pack import Example
from tunesmith.data.encode import conversations
from tunesmith.data.encode.templates import special_ends
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Ranking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["error", "drop", "truncate"]


def encode(
    rows: Sequence[Ranking], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, overlong: Overlong
) -> list[list[Example]]:
    """Tokenise rankings in one batch: for each row one example, or none when it is dropped.

    ``input_ids``  int32[P + A_1 + ... + A_K]: the common prefix once, then the rest of each response
    ``answers``    int32[K + 1]: P, A_1, ..., A_K; P is the longest prefix without a supervised token that
                   leaves each A at least 1; it may be 0
    ``supervised`` bool, for each token: its loss mask, as ``conversations.encode`` marks every assistant turn
                   (tool calls included, what the tools return not)
    ``pairs``      int32[2 n]: better, worse, better, worse, ...: every two responses whose ranks differ
    ``margins``    float32[n]: score of the better response minus that of the worse; 0 without scores
    ``cut``        int32[1]: tokens that were cut from the prompt's left

    P and A_k end to end equal ``conversations.encode`` of the prompt with response k. ``max_length`` (None =
    any) limits each of these sequences. For a longer row, ``error`` raises and ``drop`` leaves it out.
    ``truncate`` cuts the prompt's left, after the tokens that the tokenizer puts first, until the longest
    sequence fits; it drops a row whose prompt would lose all its tokens. Responses are never cut.

    Raises RowFault (a DataError) whose ``index`` is the position in ``rows``.
    """
    written = [row.written() for row in rows]
    owners = [(index, place) for index, row in enumerate(written) for place in range(len(row))]
    begins = [len(row.prompt) for row in rows for _ in row.answers]
    try:
        encoded = iter(conversations.encode(list(chain.from_iterable(written)), tokenizer, train_on=begins))
    except RowFault as fault:
        index, place = owners[fault.index]
        which = f" (answer {place + 1})" if len(written[index]) > 1 else ""
        raise RowFault(index, fault.expected, fault.got + which, fault.fix) from None
    first = np.array(special_ends(tokenizer)[0], np.int32)
    out: list[list[Example]] = []
    for index, (row, parts) in enumerate(zip(rows, written)):
        sequences = [next(encoded)[0] for _ in parts]
        made = [_example(row, sequences)]
        longest = max(len(sequence["input_ids"]) for sequence in sequences)
        if max_length is not None and longest > max_length:
            if overlong == "error":
                fix = "Shorten it, choose objective.overlong=drop or truncate, or set "
                fix += f"train.max_length={longest} if the model's window is that long."
                raise RowFault(index, f"at most {max_length} tokens", f"{longest} tokens", fix)
            made = _truncate(made[0], longest - max_length, first) if overlong == "truncate" else []
        out.append(made)
    return out


def _example(row: Ranking, sequences: Sequence[Example]) -> Example:
    """The example of a row; ``sequences``: the prompt with each response, encoded."""
    shared = _shared_length(sequences)
    pairs = row.pairs()
    scores = row.scores or (0.0,) * len(row.answers)
    ids, supervised = (
        np.concatenate([sequences[0][name][:shared], *(sequence[name][shared:] for sequence in sequences)])
        for name in ("input_ids", "supervised")
    )
    return {
        "input_ids": ids,
        "answers": np.array([shared, *(len(one["input_ids"]) - shared for one in sequences)], np.int32),
        "supervised": supervised,
        "pairs": np.array(pairs, np.int32).reshape(-1),
        "margins": np.array([scores[better] - scores[worse] for better, worse in pairs], np.float32),
        "cut": np.zeros(1, np.int32),
    }


def _shared_length(sequences: Sequence[Example]) -> int:
    """Length of the common prefix without supervised tokens; it leaves a token or more of each sequence."""
    end = min(len(sequence["input_ids"]) - 1 for sequence in sequences)
    for sequence in sequences:
        supervised = np.flatnonzero(sequence["supervised"][:end])
        differs = np.flatnonzero(sequence["input_ids"][:end] != sequences[0]["input_ids"][:end])
        end = min([end, *supervised[:1].tolist(), *differs[:1].tolist()])
    return end


def _truncate(example: Example, surplus: int, first: np.ndarray) -> list[Example]:
    """Cut ``surplus`` tokens from the prompt's left, but not ``first``; no example if none would be left."""
    ids, shared = example["input_ids"], int(example["answers"][0])
    kept = len(first) if np.array_equal(ids[: len(first)], first) else 0
    if shared - kept - surplus < 1:
        return []
    rest = np.r_[0:kept, kept + surplus : len(ids)]
    answers, cut = example["answers"].copy(), np.array([surplus], np.int32)
    answers[0] -= surplus
    return [
        {
            **example,
            "input_ids": ids[rest],
            "supervised": example["supervised"][rest],
            "answers": answers,
            "cut": cut,
        }
    ]
