"""Unpaired preference to tokens: prompt, response, and whether the response is desirable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.encode import rankings
from tunesmith.data.encode.rankings import Example, Overlong
from tunesmith.data.formats.preference_fields import strip_contents
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Judged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    rows: Sequence[Judged], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, overlong: Overlong
) -> list[list[Example]]:
    """Tokenise rows in one batch: for each row one example, or none when it is dropped.

    ``input_ids``  int32[P + A]: prompt and response, exactly what ``chat.encode`` gives of them
    ``answers``    int32[2]: P, A. The first supervised token is the first of the A
    ``learnt``     bool[P + A]: supervised tokens, those of the response with its end token; none of the P is
    ``desirable``  bool[1]
    ``prompt_key`` int64[1]: 63 bits of what the prompt says, see :func:`prompt_key`
    ``cut``        int32[1]: tokens that were cut from the prompt's left
    ``pairs``, ``margins``  empty: the example is a ranking of one, and ``batch.preference_batch`` takes it

    ``max_length`` and ``overlong`` as in ``rankings.encode``: the response is never cut.

    Raises RowFault (a DataError) whose ``index`` is the position in ``rows``.
    """
    for index, row in enumerate(rows):
        if row.desirable is None:
            fix = "Write true or false, or delete the row."
            raise RowFault(index, "a label that says whether the response is desirable", "none", fix, "label")
    made = rankings.encode(
        [row.ranking() for row in rows], tokenizer, max_length=max_length, overlong=overlong
    )
    return [
        [_example(row, example) for example in examples] for row, examples in zip(rows, made, strict=True)
    ]


def _example(row: Judged, example: Example) -> Example:
    label, key = np.array([row.desirable], np.bool_), np.array([prompt_key(row)], np.int64)
    return {**example, "desirable": label, "prompt_key": key}


def prompt_key(row: Judged) -> int:
    """Return 63 bits of what the prompt says. Spaces around its turns and the order of their keys do not matter."""
    said = json.dumps([strip_contents(row.prompt), row.tools], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little") >> 1
