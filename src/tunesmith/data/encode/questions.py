"""A question about a context to windows of tokens, and tokens back to characters of the context.

An encoder gets question and context as its tokenizer joins a pair; where the tokenizer has no separator, both
are put into a template. The question is in every window, the context slides (Devlin et al. 2019, section 4.2;
"no answer" as in 4.3). Answers are found by characters, never by a search for their tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch.pack import Example
from tunesmith.data.encode.templates import end_id, special_ends
from tunesmith.data.encode.texts import call_tokenizer, has_separator, has_token_types
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Question

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

TEMPLATE = "{question}\n\n{context}"
"""Template that makes one text of both. No byte-level vocabulary has a token of a line break and a letter next to it."""

FEWEST_CONTEXT_TOKENS = 8  # tokens of context that must have room next to the question, unless all of them do


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A whole row; its context is at ``first`` to ``end``, with ``offsets`` int64[end - first, 2]."""

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

    ``input_ids`` int32[n], and ``token_type_ids`` uint8[n] if the tokenizer has them; ``offsets`` int32[2n]:
    start and end of each token in characters of the whole context, without white space at its ends, -1 for
    all other tokens; ``span`` int32[2]: first and last token of the first answer, the null position twice
    where this window does not hold all of it, -1 if the answer is unknown; ``null`` int32[1]: the position of
    "no answer", the first token, in a ``causal`` network the last, which sees all; ``context`` uint8: UTF-8
    of this window's context, from the first character that ``offsets`` names; ``golds`` uint8: JSON of all
    answers' texts, in the first window of a row, empty if they are unknown.

    Windows overlap by ``stride`` tokens, and by as many as keep an answer of ``longest_answer`` tokens whole
    in one of them, both as far as the question leaves room.

    Raises RowFault (a DataError) whose ``index`` is the position in ``rows``.
    """
    closing: tuple[int, ...] = ()
    if causal and not special_ends(tokenizer)[1]:
        closing = (end_id(tokenizer, "at which 'no answer' is predicted"),)
    tokens = _pairs(rows, tokenizer) if has_separator(tokenizer) else _templated(rows, tokenizer, template)
    overlap = max(stride, longest_answer - 1)
    return [
        _windows(row, index, whole, closing, causal, max_length, overlap)
        for index, (row, whole) in enumerate(zip(rows, tokens, strict=True))
    ]


def answer_text(context: np.ndarray, offsets: np.ndarray, start: int, end: int) -> str:
    """Characters ``start`` to ``end`` of the whole context, from ``context`` and ``offsets`` of a window."""
    first = int(offsets[offsets >= 0].min())
    return context.tobytes().decode()[start - first : end - first]


def _pairs(rows: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[_Tokens]:
    questions, contexts = [row.question for row in rows], [row.context for row in rows]
    encoded = call_tokenizer(tokenizer, questions, contexts, special_tokens=True)
    return [
        _tokens(encoded, number, _part(encoded, number, 1), _offsets(encoded, number))
        for number in range(len(rows))
    ]


def _templated(rows: Sequence[Question], tokenizer: PreTrainedTokenizerBase, template: str) -> list[_Tokens]:
    head, _, tail = template.partition("{context}")
    starts = [head.replace("{question}", row.question) for row in rows]
    ends = [tail.replace("{question}", row.question) for row in rows]
    texts = [start + row.context + end for start, row, end in zip(starts, rows, ends)]
    encoded = call_tokenizer(tokenizer, texts, special_tokens=True)
    out = []
    for number, (row, text) in enumerate(zip(rows, texts)):
        first, end = len(starts[number]), len(starts[number]) + len(row.context)
        own, offsets = _part(encoded, number, 0), _offsets(encoded, number)
        if _crosses(text, offsets[own], first) or _crosses(text, offsets[own], end):
            out.append(_in_parts(starts[number], row.context, ends[number], tokenizer))
            continue
        inside = own & (offsets[:, 1] > first) & (offsets[:, 0] < end)
        out.append(_tokens(encoded, number, inside, np.clip(offsets - first, 0, len(row.context))))
    return out


def _crosses(text: str, offsets: np.ndarray, seam: int) -> bool:
    """True if a token has visible characters on both sides of a seam."""
    across = offsets[(offsets[:, 0] < seam) & (seam < offsets[:, 1])]
    return any(text[start:seam].strip() and text[seam:end].strip() for start, end in across)


def _in_parts(start: str, context: str, end: str, tokenizer: PreTrainedTokenizerBase) -> _Tokens:
    """The text before the context, the context, and the text after it, each tokenised alone."""
    before, after = special_ends(tokenizer)
    encoded = call_tokenizer(tokenizer, [start, context, end])
    head, ids, tail = encoded["input_ids"]
    head, tail = head if start else [], tail if end else []  # whatever it makes of an empty text
    whole = np.array([*before, *head, *ids, *tail, *after], np.int32)
    types = np.zeros(len(whole), np.uint8) if has_token_types(tokenizer) else None
    first = len(before) + len(head)
    return _Tokens(whole, types, first, first + len(ids), _offsets(encoded, 1))


def _offsets(encoded: BatchEncoding, number: int) -> np.ndarray:
    """int64[n, 2]: start and end of each token of a text, in characters."""
    return np.array(encoded.encodings[number].offsets, np.int64).reshape(-1, 2)


def _part(encoded: BatchEncoding, number: int, part: int) -> np.ndarray:
    """bool[n]: which tokens belong to the first (0) or second (1) text of a pair."""
    return np.array([sequence == part for sequence in encoded.encodings[number].sequence_ids], np.bool_)


def _tokens(encoded: BatchEncoding, number: int, inside: np.ndarray, offsets: np.ndarray) -> _Tokens:
    """The row whose context has the tokens ``inside``, which are neighbours."""
    places = np.flatnonzero(inside)
    first, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
    types = encoded.get("token_type_ids")
    kinds = None if types is None else np.array(types[number], np.uint8)
    return _Tokens(np.array(encoded["input_ids"][number], np.int32), kinds, first, end, offsets[first:end])


def _windows(
    row: Question,
    index: int,
    tokens: _Tokens,
    closing: tuple[int, ...],
    causal: bool,
    max_length: int,
    overlap: int,
) -> list[Example]:
    offsets = _visible(tokens.offsets, row.context)
    if not row.question.strip():
        fix = "Write the question, or delete the row."
        raise RowFault(index, "a question", repr(row.question), fix, "question")
    if not (offsets >= 0).any():
        fix = "Write the context, or delete the row."
        raise RowFault(index, "a context with words in it", repr(row.context[:40]), fix, "context")
    count, others = len(offsets), len(tokens.ids) - len(offsets) + len(closing)
    room = max_length - others
    if count > room < FEWEST_CONTEXT_TOKENS:
        expected = (
            f"a question that leaves room for {FEWEST_CONTEXT_TOKENS} tokens of context in {max_length}"
        )
        got = f"{others} tokens of a question that begins {row.question[:40]!r}"
        least = others + FEWEST_CONTEXT_TOKENS
        fix = f"Shorten it, or set train.max_length and objective.window to at least {least}."
        raise RowFault(index, expected, got, fix, "question")
    answer = _answer(row, index, offsets)
    texts = None if row.answers is None else [text for text, _ in row.answers]
    golds = b"" if texts is None else json.dumps(texts, ensure_ascii=False).encode()
    tail = np.array(closing, np.int32)
    out: list[Example] = []
    for start, end in stretches(count, room, overlap):
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
        context = row.context[seen.min() : seen.max()] if len(seen) else ""
        example: Example = {"input_ids": ids}
        if tokens.types is not None:
            types = [*(tokens.types[part] for part in parts), np.zeros(len(tail), np.uint8)]
            example["token_type_ids"] = np.concatenate(types)
        example |= {
            "offsets": places.reshape(-1),
            "span": np.array(span, np.int32),
            "null": np.array([null], np.int32),
            "context": np.frombuffer(context.encode(), np.uint8),
            "golds": np.frombuffer(golds if not out else b"", np.uint8),
        }
        out.append(example)
    return out


def stretches(count: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of stretches of ``room`` that cover ``count``; they overlap by at most three quarters."""
    if count <= room:
        return [(0, count)]
    step = max(1, room // 4, room - overlap)
    starts = range(0, count - room + step, step)
    return [(start, min(count, start + room)) for start in starts]


def _visible(offsets: np.ndarray, context: str) -> np.ndarray:
    """int32[n, 2]: the characters of each token without white space at either end; -1 if nothing is left."""
    blank = np.array([character.isspace() for character in context], np.bool_)
    places = np.arange(len(context))
    following = np.minimum.accumulate(np.where(blank, len(context), places)[::-1])[::-1]
    preceding = np.maximum.accumulate(np.where(blank, -1, places))
    start = np.append(following, len(context))[offsets[:, 0]]
    end = np.concatenate([[-1], preceding])[offsets[:, 1]] + 1
    return np.where((start < end)[:, None], np.stack([start, end], axis=1), -1).astype(np.int32)


def _answer(row: Question, index: int, offsets: np.ndarray) -> tuple[int, int] | tuple[()] | None:
    """First and last token of the context with a character of the first answer; () = none, None = unknown."""
    if not row.answers:
        return None if row.answers is None else ()
    text, start = row.answers[0]
    begin, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    inside = np.flatnonzero((offsets[:, 0] >= 0) & (offsets[:, 1] > begin) & (offsets[:, 0] < end))
    if not len(inside):
        fix = "Write another answer, or delete the row."
        raise RowFault(index, "an answer that has a token", f"{text!r} at {start}", fix, "answers[0]")
    return int(inside[0]), int(inside[-1])
