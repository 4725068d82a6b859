"""From a ranking to tokens: the prompt that its answers share once, then each answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np

from tunesmith.data.encode import conversations
from tunesmith.data.encode.templates import special_ends
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Ranking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, np.ndarray]
Overlong = Literal["error", "drop", "truncate"]


def encode(
    rows: Sequence[Ranking], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, overlong: Overlong
) -> list[list[Example]]:
    """Tokenise rankings in one batch: for each row one example, or none when it is dropped.

    ``input_ids``  int32[P + A_1 + ... + A_K]: what all answers begin with once, then what each has after it
    ``answers``    int32[K + 1]: P, A_1, ..., A_K. P is as long as may be, without a token that is learnt and so that each A is
                   at least 1; it may be 0
    ``learnt``     bool, for each token: supervised, as ``chat.encode`` says of all that the assistant says in this answer (of
                   an answer with calls of tools these too, but not what the tools give)
    ``pairs``      int32[2 n]: better, worse, better, worse, ...: every two answers whose ranks differ, as places from 0
    ``margins``    float32[n]: how much higher the better one's score is, 0 where there are no scores
    ``cut``        int32[1]: tokens that were cut from the prompt's left

    P and A_k end to end are exactly what ``chat.encode`` gives of the prompt with answer k. ``max_length`` (None = any) is for
    each of these. Longer rows: ``error`` raises; ``drop``; ``truncate`` cuts the prompt's left until the longest fits, behind
    what the tokenizer puts first, and drops a row of which no token of the prompt would stay: answers are never cut, and
    none is left out.

    Raises RowFault (a DataError) whose ``index`` is the position in ``rows``.
    """
    written = [row.written() for row in rows]
    owners = [(index, place) for index, row in enumerate(written) for place in range(len(row))]
    try:
        answers_begin = [len(row.prompt) for row in rows for _ in row.answers]
        encoded = iter(
            conversations.encode(list(chain.from_iterable(written)), tokenizer, train_on=answers_begin)
        )
    except RowFault as fault:
        index, place = owners[fault.index]
        which = f" (answer {place + 1})" if len(written[index]) > 1 else ""
        raise RowFault(index, fault.expected, fault.got + which, fault.fix) from None
    first = np.array(special_ends(tokenizer)[0], np.int32)
    out: list[list[Example]] = []
    for index, (row, parts) in enumerate(zip(rows, written)):
        wholes = [next(encoded)[0] for _ in parts]
        made = [_example(row, wholes)]
        longest = max(len(whole["input_ids"]) for whole in wholes)
        if max_length is not None and longest > max_length:
            if overlong == "error":
                fix = f"Shorten it, choose objective.overlong=drop or truncate, or set train.max_length={longest} if the model's "
                fix += "window is that long."
                raise RowFault(index, f"at most {max_length} tokens", f"{longest} tokens", fix)
            made = _truncated(made[0], longest - max_length, first) if overlong == "truncate" else []
        out.append(made)
    return out


def _example(row: Ranking, wholes: Sequence[Example]) -> Example:
    """The example of a row whose answers are each encoded with the prompt."""
    shared = _shared(wholes)
    pairs = row.pairs()
    scores = row.scores or (0.0,) * len(row.answers)
    return {
        "input_ids": np.concatenate(
            [wholes[0]["input_ids"][:shared], *(whole["input_ids"][shared:] for whole in wholes)]
        ),
        "answers": np.array([shared, *(len(whole["input_ids"]) - shared for whole in wholes)], np.int32),
        "learnt": np.concatenate(
            [wholes[0]["supervised"][:shared], *(whole["supervised"][shared:] for whole in wholes)]
        ),
        "pairs": np.array(pairs, np.int32).reshape(-1),
        "margins": np.array([scores[better] - scores[worse] for better, worse in pairs], np.float32),
        "cut": np.zeros(1, np.int32),
    }


def _shared(wholes: Sequence[Example]) -> int:
    """How many tokens all sequences begin with, none of them learnt, with one or more left of each."""
    end = min(len(whole["input_ids"]) - 1 for whole in wholes)
    for whole in wholes:
        learnt = np.flatnonzero(whole["supervised"][:end])
        differs = np.flatnonzero(whole["input_ids"][:end] != wholes[0]["input_ids"][:end])
        end = min([end, *learnt[:1].tolist(), *differs[:1].tolist()])
    return end


def _truncated(example: Example, surplus: int, first: np.ndarray) -> list[Example]:
    """``example`` without the ``surplus`` first tokens of the prompt, but with ``first`` if it begins so; nothing when no token
    of the prompt would be left."""
    ids, shared = example["input_ids"], int(example["answers"][0])
    kept = len(first) if np.array_equal(ids[: len(first)], first) else 0
    if shared - kept - surplus < 1:
        return []
    rest = np.r_[0:kept, kept + surplus : len(ids)]
    answers = example["answers"].copy()
    answers[0] -= surplus
    cut = np.array([surplus], np.int32)
    return [
        {**example, "input_ids": ids[rest], "learnt": example["learnt"][rest], "answers": answers, "cut": cut}
    ]
