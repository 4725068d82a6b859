"""Unpaired preference to tokens: prompt, response, and a label that is true for a desirable response."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch.pack import Example
from tunesmith.data.encode import rankings
from tunesmith.data.encode.rankings import Overlong
from tunesmith.data.formats.preference_fields import strip_contents
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Judged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    rows: Sequence[Judged], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, overlong: Overlong
) -> list[list[Example]]:
    """Tokenise rows in one batch: for each row one example, or none when it is dropped.

    An example is ``rankings.encode`` of a ranking of one, with the same policies: ``input_ids`` int32[P + A],
    ``answers`` int32[2] = P, A, ``supervised`` bool[P + A], ``cut`` int32[1], and empty ``pairs`` and
    ``margins``. The first supervised token is the first of the A. In addition:

    ``desirable``  bool[1]
    ``prompt_key`` int64[1]: see :func:`prompt_key`

    Raises RowFault (a DataError) whose ``index`` is the position in ``rows``.
    """
    for index, row in enumerate(rows):
        if row.desirable is None:
            fix = "Write true or false, or delete the row."
            raise RowFault(index, "a label, true if the response is desirable", "none", fix, "label")
    made = rankings.encode(
        [row.ranking() for row in rows], tokenizer, max_length=max_length, overlong=overlong
    )
    for row, examples in zip(rows, made, strict=True):
        for example in examples:
            example["desirable"] = np.array([row.desirable], np.bool_)
            example["prompt_key"] = np.array([prompt_key(row)], np.int64)
    return made


def prompt_key(row: Judged) -> int:
    """Return a 63-bit hash of the prompt. It ignores spaces around turns and the order of keys."""
    content = json.dumps([strip_contents(row.prompt), row.tools], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little") >> 1
