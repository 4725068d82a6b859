"""Prompts to tokens: the text before a generated answer, and the row itself for the rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch.pack import Example
from tunesmith.data.encode import conversations
from tunesmith.data.encode.rankings import Overlong
from tunesmith.data.encode.spans import SpanError
from tunesmith.data.encode.templates import RENDER_ERRORS, Renderer, special_ends
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    rows: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    overlong: Overlong = "error",
) -> list[list[Example]]:
    """Tokenise prompts in one batch: for each row one example, or none when it is dropped.

    ``input_ids``  int32[P]: the prompt with the beginning of the answer's turn, as generation reads it
    ``content``    uint8[...]: the row as JSON in UTF-8, see :func:`decode_row`
    ``cut``        int32[1]: tokens that were cut from the prompt's left

    ``max_length`` (None = any) limits P: the window without the room for the answer. For a longer prompt,
    ``error`` raises, ``drop`` leaves the row out, and ``truncate`` cuts its left, after the tokens that the
    tokenizer puts first.

    Raises RowFault (a DataError) whose ``index`` is the position in ``rows``.
    """
    renderer = Renderer(tokenizer)
    texts = []
    for index, row in enumerate(rows):
        try:
            texts.append(conversations.render_prompt(row.asked(bool(tokenizer.chat_template)), renderer))
        except SpanError as error:
            raise RowFault(index, error.expected, error.got, error.fix) from None
        except RENDER_ERRORS as error:
            got, fix = f"{type(error).__name__}: {error}", "Change the row or data.template."
            raise RowFault(index, "a conversation that the chat template accepts", got, fix) from None
    first = np.array(special_ends(tokenizer)[0], np.int32)
    out = []
    for index, (row, tokens) in enumerate(zip(rows, conversations.tokenise(texts, renderer), strict=True)):
        ids = tokens["input_ids"]
        if not len(ids):
            fix = "Fill it in or delete the row."
            raise RowFault(index, "a prompt with at least one token", "none", fix)
        surplus = 0 if max_length is None else max(0, len(ids) - max_length)
        if surplus and overlong == "error":
            fix = "Shorten it, choose objective.overlong=drop or truncate, or leave less room for the answer "
            fix += "(objective.max_new_tokens)."
            raise RowFault(index, f"a prompt of at most {max_length} tokens", f"{len(ids)} tokens", fix)
        ids = _without_left(ids, surplus, first)
        keeps = bool(len(ids)) and (overlong == "truncate" or not surplus)
        content = np.frombuffer(_json(row).encode(), np.uint8)
        cut = np.array([surplus], np.int32)
        out.append([{"input_ids": ids, "content": content, "cut": cut}] if keeps else [])
    return out


def decode_row(example: Example) -> Prompt:
    """Return the row that an example of :func:`encode` was made from."""
    stored = json.loads(bytes(example["content"]))
    prompt = stored["prompt"] if isinstance(stored["prompt"], str) else tuple(stored["prompt"])
    return Prompt(prompt, stored["columns"], tuple(stored["tools"]))


def _json(row: Prompt) -> str:
    stored = {"prompt": row.prompt, "columns": row.columns, "tools": row.tools}
    return json.dumps(stored, ensure_ascii=False)


def _without_left(ids: np.ndarray, surplus: int, first: np.ndarray) -> np.ndarray:
    """Cut ``surplus`` tokens from the left, but not ``first``; empty if no token would be left."""
    kept = len(first) if np.array_equal(ids[: len(first)], first) else 0
    rest = ids[kept + surplus :]
    return np.concatenate([ids[:kept], rest]) if len(rest) else rest
