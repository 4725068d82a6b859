"""Contamination: held-out rows share an n-gram of tokens with training rows, so their loss is too low.

As in GPT-3's own analysis (Brown et al. 2020, appendix C) n is 13. An n-gram in many training rows is the
chat template or a phrase of the task and is ignored. The training tokens are read once, in the encoded
files, by a rolling hash, at about the cost of summing them a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch.pack import Example
from tunesmith.data.row_problems import shorten
from tunesmith.data.store.cache import forget
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.data.text_windows import rolling_hashes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NGRAM, BYTES = 13, 55
"""Length n of a match, doubled for a held-out row while n of its tokens cover at most BYTES / 2 bytes of text.
A vocabulary made for English splits Korean into single bytes, and 13 bytes are only four characters. Each row
has its own n: one evaluation set may be English, the next one Korean."""

COMMON_ROWS = 10
"""An n-gram in more training rows than this (or in half of a small set) is a phrase of the task."""

PIECE, PIECE_SHARE, SAMPLED = 5, 0.1, 2000
"""PIECE tokens that occur in PIECE_SHARE of (at most SAMPLED) training rows belong to the template. PIECE is
doubled with NGRAM: half of all Korean sentences end in the same five bytes."""

LISTED = 10
BLOCK = 1 << 18
"""Tokens hashed at a time; the intermediate arrays fit into the processor's cache."""

SCATTERED = 64
"""Release the mapped files every this many rows; each row may load 64 KB of them."""


@dataclass(frozen=True)
class SharedText:
    """A held-out row, a training row, and the text in both, without a partial character at its ends."""

    where: str
    same_as: str
    text: str


@dataclass(frozen=True)
class Contamination:
    """``rows`` held-out rows (``share`` of all) share at least ``ngram`` tokens with a training row.

    ``ngram``: the smallest number in use, see NGRAM. ``first``: the first LISTED of these rows. ``answers``:
    those of them in which a shared token is supervised, so that the loss itself is too low; in the others
    only the prompt was seen. None where no token is supervised (labels, rewards). ``short``: rows with fewer
    than ``ngram`` tokens outside the template, of which only exact duplicates are found.
    """

    ngram: int
    rows: int
    share: float
    first: tuple[SharedText, ...]
    answers: int | None
    short: int

    def line(self) -> str:
        """Return the counts and the first row in one line."""
        first = self.first[0]
        text = f"{self.rows} evaluation rows ({self.share:.1%}) share {self.ngram} tokens or more with a training row"
        answers = "" if self.answers is None else f", {self.answers} of them in supervised tokens"
        return f"{text}{answers}, for example {first.where} with {first.same_as}: {shorten(first.text)}"


@dataclass(frozen=True)
class _Tokens:
    """Joined examples: token ids, where each example begins (and the end), the example of each token."""

    ids: np.ndarray
    begins: np.ndarray
    owner: np.ndarray

    @classmethod
    def of(cls, data: Encoded, examples: np.ndarray) -> _Tokens:
        parts = _read(data, examples, lambda example: example["input_ids"])
        sizes = np.array([len(part) for part in parts], np.int64)
        ids = np.concatenate([*parts, np.empty(0, np.int32)])
        return cls(ids, np.concatenate([[0], np.cumsum(sizes)]), np.repeat(examples, sizes))

    def hashes(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (position, hash) of every ``n`` tokens inside one example."""
        hashed = rolling_hashes(self.ids, n)
        inside = np.ones(len(hashed) + n, np.bool_)
        for end in self.begins[1:]:
            inside[max(0, end - n + 1) : end] = False
        positions = np.flatnonzero(inside[: len(hashed)])
        return positions, hashed[positions]


def contamination(
    train: Encoded,
    held: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    at_least: int = NGRAM,
    written: bool = True,
) -> Contamination | None:
    """Compare the token sequences of two splits; None when their examples are not single sequences.

    ``written``: the model learns to write some of the tokens. Memory: about 50 bytes for each held-out token,
    and 4 bytes for each training example.
    """
    if not all("input_ids" in entry.values for entry in (*train.entries, *held.entries)):
        return None
    examples = np.arange(len(held))
    tokens = _Tokens.of(held, examples)
    supervised = np.concatenate([*_read(held, examples, _supervised), np.empty(0, np.bool_)])
    needed = _needed(tokens, tokenizer, at_least)
    parts, long = [np.empty((4, 0), np.int64)], np.zeros(len(held), np.bool_)
    for ngram in np.unique(needed).tolist():
        template = _template(train, tokens, PIECE * ngram // at_least)
        positions, hashes = tokens.hashes(ngram)
        compared = _none_marked(template, positions, ngram) & (needed[tokens.owner[positions]] == ngram)
        long[tokens.owner[positions[compared]]] = True
        parts.append(_hits(train, positions[compared], hashes[compared], supervised, ngram))
    hits = np.concatenate(parts, axis=1)
    hits = hits[:, np.argsort(hits[0], kind="stable")]
    rows, all_rows = _row_ids(held, tokens.owner[hits[0]]), _row_ids(held, examples)
    first = np.sort(np.unique(rows, return_index=True)[1])
    listed = hits[:3, first[:LISTED]].T.tolist()
    total = len(np.unique(all_rows))
    return Contamination(
        ngram=int(needed.min()) if len(needed) else at_least,
        rows=len(first),
        share=len(first) / max(1, total),
        first=tuple(_shared_text(held, train, tokens, hit, tokenizer) for hit in listed),
        answers=len(np.unique(rows[hits[3] > 0])) if written else None,
        short=total - len(np.unique(all_rows[long])),
    )


def _hits(
    train: Encoded, positions: np.ndarray, hashes: np.ndarray, supervised: np.ndarray, ngram: int
) -> np.ndarray:
    """Return int64[4, hits]: the runs that training rows also have, without phrases of the task.

    The rows are: position in the held-out tokens; source, and position in its tokens, of the first match;
    whether any token of the run is supervised.
    """
    known, number = np.unique(hashes, return_inverse=True)
    counts, first = _find_in_training(train, known, ngram)
    common = max(1, min(COMMON_ROWS, len(train) // 2))
    phrases = _mark(len(supervised), positions[counts[number] > common], ngram)
    hit = (counts[number] > 0) & _none_marked(phrases, positions, ngram)
    answered = ~_none_marked(supervised, positions[hit], ngram)
    return np.stack([positions[hit], *first[:, number[hit]], answered])


def _supervised(example: Example) -> np.ndarray:
    """Return bool[tokens]: the tokens in the loss. The first token has no context to be predicted from."""
    marked = next((example[name] for name in ("supervised", "learnt") if name in example), None)
    mask = np.ones(len(example["input_ids"]), np.bool_) if marked is None else np.array(marked, np.bool_)
    mask[:1] = False
    return mask


def _read(data: Encoded, examples: np.ndarray, take: Callable[[Example], np.ndarray]) -> list[np.ndarray]:
    """Copy ``take(example)`` of each example, and release the mapped files that scattered rows load."""
    parts = []
    for number, index in enumerate(examples.tolist(), 1):
        parts.append(np.array(take(data[index])))
        if number % SCATTERED == 0:
            for entry in data.entries:
                for values in entry.values.values():
                    forget(values)
    return parts


def _find_in_training(train: Encoded, known: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of training rows with each hash, and source and position of the first match."""
    counts = np.zeros(len(known), np.int64)
    first = np.full((2, len(known)), -1, np.int64)
    if not len(known):
        return counts, first
    bits = min(26, max(12, len(known).bit_length() + 3))
    shift = np.uint64(64 - bits)
    maybe = np.zeros(1 << bits, np.bool_)  # one look-up here rules out most of the training tokens
    maybe[known >> shift] = True
    for source, begin, ids, starts, ends, rows in _blocks(train):
        hashed = rolling_hashes(ids, n)
        positions = np.flatnonzero(maybe[hashed >> shift])
        number = np.searchsorted(known, hashed[positions])
        number[number == len(known)] = 0
        same = known[number] == hashed[positions]
        positions, number = positions[same], number[same]
        example = np.searchsorted(starts, begin + positions, side="right") - 1
        inside = begin + positions + n <= ends[example]  # in one example, and in the part that is trained on
        positions, number, row = positions[inside], number[inside], rows[example[inside]]
        once = np.unique((number << 32) + row)  # a row counts once, however often it holds the run
        counts += np.bincount(once >> 32, minlength=len(known))
        new, at = np.unique(number, return_index=True)
        new, at = new[first[0, new] < 0], at[first[0, new] < 0]
        first[0, new], first[1, new] = source, begin + positions[at]
    return counts, first


def _blocks(data: Encoded) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (source, first token, tokens; start, end of the used part and row of the source's examples).

    A block ends where an example ends, so a row is in two blocks only when its examples are.
    """
    for source, entry in enumerate(data.entries):
        mine = data.source == source
        starts, ids = entry.starts["input_ids"], entry.values["input_ids"]
        used = np.zeros(len(entry), np.int64)
        view_ends = data.views.start[mine].astype(np.int64) + data.views.length[mine]
        np.maximum.at(used, data.views.example[mine], view_ends)
        ends = np.where(used > 0, used + starts[:-1], 0)  # an example of another split ends before it begins
        example = 0
        while example < len(entry):
            past = max(example + 1, int(np.searchsorted(starts, starts[example] + BLOCK, side="right")) - 1)
            yield source, int(starts[example]), ids[starts[example] : starts[past]], starts, ends, entry.row
            forget(ids)
            example = past


def _template(train: Encoded, tokens: _Tokens, size: int) -> np.ndarray:
    """Return bool[tokens]: tokens in a run of ``size`` that PIECE_SHARE of the training rows have."""
    sample = np.unique(np.linspace(0, len(train) - 1, min(len(train), SAMPLED)).astype(np.int64))
    sampled = _Tokens.of(train, sample)
    positions, pieces = sampled.hashes(size)
    owner = sampled.owner[positions]
    order = np.lexsort((owner, pieces))
    pieces, owner = pieces[order], owner[order]
    once = np.ones(len(pieces), np.bool_)  # a piece counts once for each row
    once[1:] = (pieces[1:] != pieces[:-1]) | (owner[1:] != owner[:-1])
    distinct, count = np.unique(pieces[once], return_counts=True)
    few = max(1, min(COMMON_ROWS, len(sample) // 2))
    common = distinct[count > max(few, PIECE_SHARE * len(sample))]
    positions, hashes = tokens.hashes(size)
    return _mark(len(tokens.ids), positions[np.isin(hashes, common)], size)


def _mark(size: int, positions: np.ndarray, n: int) -> np.ndarray:
    """Return bool[size]: the ``n`` tokens from each position on."""
    edges = np.zeros(size + 1, np.int32)
    np.add.at(edges, positions, 1)
    np.add.at(edges, positions + n, -1)
    return np.cumsum(edges)[:size] > 0


def _none_marked(marked: np.ndarray, positions: np.ndarray, n: int) -> np.ndarray:
    """Return bool[positions]: whether none of the ``n`` tokens from there on is marked."""
    before = np.concatenate([[0], np.cumsum(marked)])
    return before[positions + n] == before[positions]


def _needed(tokens: _Tokens, tokenizer: PreTrainedTokenizerBase, at_least: int) -> np.ndarray:
    """Return int64[examples]: the number of tokens that must match, see NGRAM."""
    distinct, number = np.unique(tokens.ids, return_inverse=True)
    token_bytes = np.array([_token_bytes(int(token), tokenizer) for token in distinct], np.int64)
    sums = np.concatenate([[0], np.cumsum(token_bytes[number])])[tokens.begins]
    counts = np.maximum(1, np.diff(tokens.begins))
    enough = BYTES * counts / np.maximum(1, np.diff(sums))  # tokens that hold BYTES of text
    doubled = np.floor(np.log2(np.maximum(1, enough / at_least))).astype(np.int64)
    return at_least << doubled


def _token_bytes(token: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the bytes that a second copy of a token adds; some tokenizers drop the first space."""
    once, twice = (tokenizer.decode([token] * times, skip_special_tokens=True) for times in (1, 2))
    return len(twice.replace("\ufffd", "?").encode()) - len(once.replace("\ufffd", "?").encode())


def _row_ids(data: Encoded, examples: np.ndarray) -> np.ndarray:
    """Return a number for the row that each example was made of."""
    rows = np.empty(len(examples), np.int64)
    for source, entry in enumerate(data.entries):
        mine = data.source[examples] == source
        rows[mine] = np.int64(source << 32) + entry.row[data.views.example[examples[mine]]]
    return rows


def _shared_text(
    held: Encoded, train: Encoded, tokens: _Tokens, hit: list[int], tokenizer: PreTrainedTokenizerBase
) -> SharedText:
    """Return the longest common run at a hit: position in ``tokens``; source, and position in its tokens."""
    here, source, there = hit
    entry = train.entries[source]
    match = int(np.searchsorted(entry.starts["input_ids"], there, side="right")) - 1
    ours = tokens.ids[here : tokens.begins[np.searchsorted(tokens.begins, here, side="right")]]
    theirs = entry.values["input_ids"][there : entry.starts["input_ids"][match + 1]]
    size = min(len(ours), len(theirs))
    end = int(np.argmin(np.append(ours[:size] == theirs[:size], False)))
    text = tokenizer.decode(ours[:end].tolist(), skip_special_tokens=True)
    where, same_as = held.where(int(tokens.owner[here])), f"{train.paths[source]}:{int(entry.row[match])}"
    return SharedText(where, same_as, text.strip("\ufffd \n"))
