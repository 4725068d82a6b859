"""From a question about a text to windows of tokens, and from tokens back to the characters of that text.

An encoder gets question and context as a pair, as its tokenizer joins them; a network whose tokenizer puts nothing between two
texts gets both in a named template. The question is in every window, the context slides (Devlin et al. 2019, section 4.2;
"no answer" as in 4.3). Answers are found by characters, never by searching for their tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.encode.templates import special_ends
from tunesmith.data.encode.texts import separates
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Question
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "{question}\n\n{context}"
"""How both become one text. The line breaks share no token with a letter before or after them in any byte-level vocabulary."""

FEWEST = 8
"""Tokens of context that must fit beside the question, unless all of them do."""

Example = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """``ids`` and ``types`` of a whole row; its context is at ``first`` to ``end``, with ``offsets`` int64[end - first, 2]."""

    ids: np.ndarray
    types: np.ndarray | None
    first: int
    end: int
    offsets: np.ndarray


def encode(
    rows: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    causal: bool,
    max_length: int,
    stride: int,
    longest_answer: int,
) -> list[list[Example]]:
    """For each row its windows of at most ``max_length`` tokens.

    ``input_ids`` int32[n], ``token_type_ids`` uint8[n] where the tokenizer has them; ``offsets`` int32[2n]: the characters of
    the whole context that each token stands for, without white space, -1 for all other tokens; ``span`` int32[2]: first and
    last token of the first answer, the null place twice where this window does not hold all of it, -1 where none is known;
    ``null`` int32[1]: the place of "no answer", the first token, in a ``causal`` network the last, which has seen everything;
    ``context`` uint8: the characters of this window's context in UTF-8, from the first one that ``offsets`` names; ``golds``
    uint8: JSON of all answers' texts, in the first window of a row; empty where none is known.

    Windows overlap by ``stride`` tokens, and by as many as keep an answer of ``longest_answer`` tokens whole in one of them,
    both as far as there is room beside the question.

    Raises RowFault (a DataError) whose ``index`` is the position in ``rows``.
    """
    _, after = special_ends(tokenizer)
    closing: tuple[int, ...] = ()
    if causal and not after:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token, where 'no answer' is read. Set eos_token in the model's tokenizer."
            )
        closing = (tokenizer.eos_token_id,)
    found = _pairs(rows, tokenizer) if separates(tokenizer) else _templated(rows, tokenizer, template)
    return [
        _windows(row, index, tokens, closing, causal, max_length, stride, longest_answer)
        for index, (row, tokens) in enumerate(zip(rows, found, strict=True))
    ]


def text_of(context: np.ndarray, offsets: np.ndarray, start: int, end: int) -> str:
    """Characters ``start`` to ``end`` of the whole context, from the piece of it that a window holds (see :func:`encode`)."""
    first = int(offsets[offsets >= 0].min())
    return context.tobytes().decode()[start - first : end - first]


def _pairs(rows: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[_Tokens]:
    encoded = _call(tokenizer, [row.question for row in rows], [row.context for row in rows])
    out = []
    for number, encoding in enumerate(encoded.encodings):
        second = np.array([part == 1 for part in encoding.sequence_ids], np.bool_)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        out.append(
            _found(encoded["input_ids"][number], encoded.get("token_type_ids"), number, second, offsets)
        )
    return out


def _templated(rows: Sequence[Question], tokenizer: PreTrainedTokenizerBase, template: str) -> list[_Tokens]:
    head, _, tail = template.partition("{context}")
    starts = [head.replace("{question}", row.question) for row in rows]
    ends = [tail.replace("{question}", row.question) for row in rows]
    encoded = _call(tokenizer, [one + row.context + other for one, row, other in zip(starts, rows, ends)])
    out = []
    for number, (row, encoding) in enumerate(zip(rows, encoded.encodings)):
        first, end = len(starts[number]), len(starts[number]) + len(row.context)
        own = np.array([part == 0 for part in encoding.sequence_ids], np.bool_)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        text = starts[number] + row.context + ends[number]
        if _fused(text, offsets[own], first) or _fused(text, offsets[own], end):
            out.append(_in_parts(starts[number], row.context, ends[number], tokenizer))
            continue
        inside = own & (offsets[:, 1] > first) & (offsets[:, 0] < end)
        shifted = np.clip(offsets - first, 0, len(row.context))
        out.append(
            _found(encoded["input_ids"][number], encoded.get("token_type_ids"), number, inside, shifted)
        )
    return out


def _fused(text: str, offsets: np.ndarray, seam: int) -> bool:
    """Whether a token has something visible on both sides of a seam."""
    across = offsets[(offsets[:, 0] < seam) & (seam < offsets[:, 1])]
    return any(text[start:seam].strip() and text[seam:end].strip() for start, end in across)


def _in_parts(start: str, context: str, end: str, tokenizer: PreTrainedTokenizerBase) -> _Tokens:
    """What stands before the context, the context, and what follows, each tokenised on its own."""
    before, after = special_ends(tokenizer)
    parts = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        for text in (start, end)
    ]
    encoded = _call(tokenizer, [context], special=False)
    (ids,), (encoding,) = encoded["input_ids"], encoded.encodings
    first = len(before) + len(parts[0])
    whole = np.array([*before, *parts[0], *ids, *parts[1], *after], np.int32)
    types = np.zeros(len(whole), np.uint8) if "token_type_ids" in tokenizer.model_input_names else None
    return _Tokens(whole, types, first, first + len(ids), np.array(encoding.offsets, np.int64).reshape(-1, 2))


def _call(
    tokenizer: PreTrainedTokenizerBase,
    first: list[str],
    second: list[str] | None = None,
    special: bool = True,
) -> Any:
    return tokenizer(
        first, second, add_special_tokens=special, return_attention_mask=False, padding=False, truncation=False, verbose=False,
        return_token_type_ids="token_type_ids" in tokenizer.model_input_names,
    )  # fmt: skip


def _found(ids: list[int], types: Any, number: int, inside: np.ndarray, offsets: np.ndarray) -> _Tokens:
    """The row whose context has the tokens ``inside``, which are neighbours."""
    places = np.flatnonzero(inside)
    first, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
    kinds = None if types is None else np.array(types[number], np.uint8)
    return _Tokens(np.array(ids, np.int32), kinds, first, end, offsets[first:end])


def _windows(
    row: Question,
    index: int,
    tokens: _Tokens,
    closing: tuple[int, ...],
    causal: bool,
    max_length: int,
    stride: int,
    longest_answer: int,
) -> list[Example]:
    offsets = _visible(tokens.offsets, row.context)
    if not row.question.strip():
        raise RowFault(
            index, "a question", repr(row.question), "Write the question, or delete the row.", "question"
        )
    if not (offsets >= 0).any():
        raise RowFault(
            index,
            "a context with words in it",
            repr(row.context[:40]),
            "Write the context, or delete the row.",
            "context",
        )
    count, others = len(offsets), len(tokens.ids) - len(offsets) + len(closing)
    room = max_length - others
    if count > room < FEWEST:
        got = f"{others} tokens of a question that begins {row.question[:40]!r}"
        fix = f"Shorten it, or set train.max_length and objective.window to at least {others + FEWEST}."
        raise RowFault(
            index,
            f"a question that leaves room for {FEWEST} tokens of context in {max_length}",
            got,
            fix,
            "question",
        )
    answer = _answer(row, index, offsets)
    golds = (
        b""
        if row.answers is None
        else json.dumps([text for text, _ in row.answers], ensure_ascii=False).encode()
    )
    tail = np.array(closing, np.int32)
    out: list[Example] = []
    for start, end in stretches(count, room, max(stride, longest_answer - 1)):
        left, right = tokens.first + start, tokens.first + end
        parts = (slice(0, tokens.first), slice(left, right), slice(tokens.end, None))
        ids = np.concatenate([*(tokens.ids[part] for part in parts), tail])
        null = len(ids) - 1 if causal else 0
        span = [null, null]
        if answer is None:
            span = [-1, -1]
        elif answer and start <= answer[0] and answer[1] < end:
            span = [tokens.first + place - start for place in answer]
        places = np.full((len(ids), 2), -1, np.int32)
        places[tokens.first : tokens.first + end - start] = offsets[start:end]
        seen = places[places[:, 0] >= 0]
        piece = row.context[seen.min() : seen.max()] if len(seen) else ""
        example: Example = {"input_ids": ids.astype(np.int32)}
        if tokens.types is not None:
            example["token_type_ids"] = np.concatenate(
                [*(tokens.types[part] for part in parts), np.zeros(len(tail), np.uint8)]
            )
        out.append(
            {
                **example,
                "offsets": places.reshape(-1),
                "span": np.array(span, np.int32),
                "null": np.array([null], np.int32),
                "context": np.frombuffer(piece.encode(), np.uint8),
                "golds": np.frombuffer(golds if not out else b"", np.uint8),
            }
        )
    return out


def stretches(count: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of pieces of at most ``room`` that cover ``count`` and overlap by ``overlap``; a quarter of each is new."""
    if count <= room:
        return [(0, count)]
    step = max(1, room // 4, room - overlap)
    starts = range(0, count - room + step, step)
    return [(start, min(count, start + room)) for start in starts]


def _visible(offsets: np.ndarray, context: str) -> np.ndarray:
    """int32[n, 2]: the characters of each token without white space at either end; -1 where nothing is left."""
    blank = np.array([character.isspace() for character in context], np.bool_)
    places = np.arange(len(context))
    after = np.minimum.accumulate(np.where(blank, len(context), places)[::-1])[
        ::-1
    ]  # the next that is visible
    before = np.maximum.accumulate(np.where(blank, -1, places))
    start = np.append(after, len(context))[offsets[:, 0]]
    end = np.concatenate([[-1], before])[offsets[:, 1]] + 1
    return np.where((start < end)[:, None], np.stack([start, end], axis=1), -1).astype(np.int32)


def _answer(row: Question, index: int, offsets: np.ndarray) -> tuple[int, int] | tuple[()] | None:
    """First and last token of the context that share a character with the first answer; () for no answer, None for unknown."""
    if not row.answers:
        return None if row.answers is None else ()
    text, start = row.answers[0]
    begin, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    inside = np.flatnonzero((offsets[:, 0] >= 0) & (offsets[:, 1] > begin) & (offsets[:, 0] < end))
    if not len(inside):
        raise RowFault(
            index,
            "an answer that gives a token",
            f"{text!r} at {start}",
            "Write another answer, or delete the row.",
            "answers[0]",
        )
    return int(inside[0]), int(inside[-1])
