"""Contamination: held-out rows that share a long stretch of tokens with a training row, so that their loss
flatters.

As in GPT-3's own analysis (Brown et al. 2020, appendix C) a stretch is 13 tokens. What stands in many
training rows is the chat template or a phrase of the task, and is no leak; only what a few training rows hold
counts. The training tokens are read once, in the encoded files, by a rolling hash; the cost is about that of
adding them up a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.row_problems import shorten
from tunesmith.data.store.cache import Example, forget
from tunesmith.data.store.encoded_rows import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NGRAM, BYTES = 13, 55
"""Tokens that must be the same, one after another; twice or four times as many for a held-out row that needs
so many to say what 13 tokens say in English: a vocabulary made for English cuts Korean into single bytes, and
13 of those are four characters, which mean nothing. Each row by itself: one evaluation set may be English and
the next one Korean."""

COMMON_ROWS = 10
"""A stretch of more training rows than this (of few rows: than half of them) is a phrase of the task."""

PIECE, PIECE_SHARE, SAMPLED = 5, 0.1, 2000
"""So many tokens that stand in so large a share of (at most so many) training rows belong to the template. Of
a row that needs more tokens, as many times more: five single bytes are an ending that half of all Korean
sentences have."""

LISTED = 10
BLOCK = 1 << 18
"""Tokens hashed at a time: what passes stays in the processor's cache."""

SCATTERED = 64
"""Rows read between two times that files are taken out of memory; each may bring 64 KB of them in."""

_MIX, _BASE = np.uint64(0x9E3779B97F4A7C15), 0xD6E8FEB86659FD93


@dataclass(frozen=True)
class Shared:
    """A held-out row, a training row, and the text that both have (a character cut in half at its ends left out)."""

    where: str
    same_as: str
    text: str


@dataclass(frozen=True)
class Contamination:
    """``rows`` held-out rows (``share`` of all) share ``ngram`` tokens or more with a training row; the
    ``first`` ones.

    ``answers``: those of them in which some of the shared tokens are learnt, so that the loss itself is too
    good; of the others only the prompt was seen. None where no token is learnt, but a label or a reward of
    all of them. ``short``: rows with no ``ngram`` tokens outside the template; of those only whole duplicates
    are known. ``ngram`` is the smallest in use: see NGRAM.
    """

    ngram: int
    rows: int
    share: float
    first: tuple[Shared, ...]
    answers: int | None
    short: int

    def line(self) -> str:
        """The count and the first row, in one line."""
        one = self.first[0]
        said = f"{self.rows} evaluation rows ({self.share:.1%}) share {self.ngram} tokens or more with a training row"
        said += "" if self.answers is None else f", {self.answers} of them in what is learnt"
        return f"{said}, for example {one.where} with {one.same_as}: {shorten(one.text)}"


def contamination(
    train: Encoded,
    held: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    at_least: int = NGRAM,
    written: bool = True,
) -> Contamination | None:
    """Compare the token sequences of two splits; None when their examples are no single sequences.

    ``written``: whether the model learns to write some of the tokens.

    Memory: about 50 bytes for each held-out token; nothing that grows with the training rows but 4 bytes an
    example.
    """
    if not all("input_ids" in entry.values for entry in (*train.entries, *held.entries)):
        return None
    ids, begins, owner = _sequences(held, np.arange(len(held)))
    learnt = np.concatenate([*_copied(held, np.arange(len(held)), _learnt), np.empty(0, np.bool_)])
    needed = _needed(ids, begins, tokenizer, at_least)
    parts, long = [], np.zeros(len(held), np.bool_)
    for ngram in np.unique(needed).tolist():
        common = _template(train, ids, begins, PIECE * ngram // at_least)
        places, grams = _grams(ids, begins, ngram)
        free = _none_of(common, places, ngram) & (needed[owner[places]] == ngram)
        long[owner[places[free]]] = True
        parts.append(_hits(train, places[free], grams[free], learnt, ngram))
    hits = np.concatenate([*parts, np.empty((4, 0), np.int64)], axis=1)
    place, source, position, answer = hits[:, np.argsort(hits[0], kind="stable")]
    found, every = _rows(held, owner[place]), _rows(held, np.arange(len(held)))
    _, at = np.unique(found, return_index=True)
    at.sort()
    first = []
    for index in at[:LISTED].tolist():
        where = int(place[index])
        example = int(owner[where])
        first.append(
            _shared(
                held, train, ids, begins, example, where, int(source[index]), int(position[index]), tokenizer
            )
        )
    total = len(np.unique(every))
    return Contamination(
        ngram=int(needed.min()) if len(needed) else at_least,
        rows=len(at),
        share=len(at) / max(1, total),
        first=tuple(first),
        answers=len(np.unique(found[answer > 0])) if written else None,
        short=total - len(np.unique(every[long])),
    )


def _hits(
    train: Encoded, places: np.ndarray, grams: np.ndarray, learnt: np.ndarray, ngram: int
) -> np.ndarray:
    """int64[4, hits]: those of the stretches that training rows have, too, but for the phrases of the task.

    Of each: its place in the held-out tokens; the source, and the place in its tokens, where it is first met;
    whether some of it is ``learnt``.
    """
    known, number = np.unique(grams, return_inverse=True)
    counts, first = _look_up(train, known, ngram)
    phrases = _covered(len(learnt), places[counts[number] > max(1, min(COMMON_ROWS, len(train) // 2))], ngram)
    hit = (counts[number] > 0) & _none_of(phrases, places, ngram)
    return np.stack([places[hit], *first[:, number[hit]], ~_none_of(learnt, places[hit], ngram)])


def _learnt(example: Example) -> np.ndarray:
    """bool[tokens]: what counts in the loss; the first token of a sequence has nothing before it that could foretell it."""
    marked = next((example[name] for name in ("supervised", "learnt") if name in example), None)
    mask = np.ones(len(example["input_ids"]), np.bool_) if marked is None else np.array(marked, np.bool_)
    mask[:1] = False
    return mask


def rolling(ids: np.ndarray, n: int) -> np.ndarray:
    """Return uint64[len(ids) - n + 1]: a hash of every ``n`` consecutive numbers (Karp and Rabin 1987), modulo 2**64."""
    if len(ids) < n:
        return np.empty(0, np.uint64)
    mixed = ids.astype(np.uint64) * _MIX
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MIX
    return np.convolve(
        mixed, np.array([pow(_BASE, power, 1 << 64) for power in range(n)], np.uint64), "valid"
    )


def _sequences(data: Encoded, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the tokens of the chosen examples end to end, where each begins, and of each token the example)."""
    parts = _copied(data, chosen, lambda example: example["input_ids"])
    ids = np.concatenate([*parts, np.empty(0, np.int32)])
    sizes = np.array([len(part) for part in parts], np.int64)
    begins = np.concatenate([[0], np.cumsum(sizes)])
    return ids, begins, np.repeat(chosen, sizes)


def _copied(data: Encoded, chosen: np.ndarray, take: Callable[[Example], np.ndarray]) -> list[np.ndarray]:
    """What ``take`` finds in each of the examples. Rows far apart would bring most of the files into memory: it is left again."""
    parts = []
    for number, index in enumerate(chosen.tolist(), 1):
        parts.append(np.array(take(data[index])))
        if number % SCATTERED == 0:
            for values in (values for entry in data.entries for values in entry.values.values()):
                forget(values)
    return parts


def _grams(ids: np.ndarray, begins: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(place, hash) of every ``n`` tokens that lie in one sequence."""
    hashed = rolling(ids, n)
    whole = np.ones(len(hashed) + n, np.bool_)
    for end in begins[1:]:
        whole[max(0, end - n + 1) : end] = False
    places = np.flatnonzero(whole[: len(hashed)])
    return places, hashed[places]


def _look_up(train: Encoded, known: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(how many training rows hold each of the ``known`` hashes, where it is first met: source and place in its tokens)."""
    counts = np.zeros(len(known), np.int64)
    first = np.full((2, len(known)), -1, np.int64)
    if not len(known):
        return counts, first
    bits = min(26, max(12, len(known).bit_length() + 3))
    shift = np.uint64(64 - bits)
    maybe = np.zeros(1 << bits, np.bool_)  # most of the training tokens are done with after one look into it
    maybe[known >> shift] = True
    for source, begin, ids, starts, ends, rows in _blocks(train):
        hashed = rolling(ids, n)
        places = np.flatnonzero(maybe[hashed >> shift])
        number = np.searchsorted(known, hashed[places])
        number[number == len(known)] = 0
        same = known[number] == hashed[places]
        places, number = places[same], number[same]
        example = np.searchsorted(starts, begin + places, side="right") - 1
        inside = begin + places + n <= ends[example]  # in one row, and in what of it is learnt from
        places, number, row = places[inside], number[inside], rows[example[inside]]
        once = np.unique((number << 32) + row)  # a row counts once, however often it says it
        counts += np.bincount(once >> 32, minlength=len(known))
        new, at = np.unique(number, return_index=True)
        new, at = new[first[0, new] < 0], at[first[0, new] < 0]
        first[0, new], first[1, new] = source, begin + places[at]
    return counts, first


def _blocks(data: Encoded) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(source, first token, tokens, and of each example of the source: start, end of what is used, row),
    block by block.

    A block ends where an example ends, so a row lies in two blocks only when its examples do.
    """
    for source, entry in enumerate(data.entries):
        mine = data.source == source
        starts, ids = entry.starts["input_ids"], entry.values["input_ids"]
        ends = np.zeros(len(entry), np.int64)
        np.maximum.at(
            ends, data.views.example[mine], data.views.start[mine].astype(np.int64) + data.views.length[mine]
        )
        ends = np.where(
            ends > 0, ends + starts[:-1], 0
        )  # an example that is not in this split ends before it begins
        example = 0
        while example < len(entry):
            past = max(example + 1, int(np.searchsorted(starts, starts[example] + BLOCK, side="right")) - 1)
            yield source, int(starts[example]), ids[starts[example] : starts[past]], starts, ends, entry.row
            forget(ids)
            example = past


def _template(train: Encoded, ids: np.ndarray, begins: np.ndarray, size: int) -> np.ndarray:
    """bool[tokens]: which of the tokens belong to pieces of ``size`` that a tenth of the training rows have."""
    sample = np.unique(np.linspace(0, len(train) - 1, min(len(train), SAMPLED)).astype(np.int64))
    learnt, learnt_begins, owner = _sequences(train, sample)
    at, pieces = _grams(learnt, learnt_begins, size)
    order = np.lexsort((owner[at], pieces))
    pieces, rows = pieces[order], owner[at][order]
    once = np.ones(len(pieces), np.bool_)  # a piece counts once for each row
    once[1:] = (pieces[1:] != pieces[:-1]) | (rows[1:] != rows[:-1])
    found, count = np.unique(pieces[once], return_counts=True)
    few = max(1, min(COMMON_ROWS, len(sample) // 2))
    found = found[count > max(few, PIECE_SHARE * len(sample))]
    places, grams = _grams(ids, begins, size)
    return _covered(len(ids), places[np.isin(grams, found)], size)


def _covered(size: int, places: np.ndarray, n: int) -> np.ndarray:
    """bool[size]: the ``n`` tokens from each place on."""
    edges = np.zeros(size + 1, np.int32)
    np.add.at(edges, places, 1)
    np.add.at(edges, places + n, -1)
    return np.cumsum(edges)[:size] > 0


def _none_of(marked: np.ndarray, places: np.ndarray, n: int) -> np.ndarray:
    """bool[places]: whether none of the ``n`` tokens from there on is marked."""
    before = np.concatenate([[0], np.cumsum(marked)])
    return before[places + n] == before[places]


def _needed(
    ids: np.ndarray, begins: np.ndarray, tokenizer: PreTrainedTokenizerBase, at_least: int
) -> np.ndarray:
    """int64[sequences]: how many tokens must be the same: ``at_least``, doubled as long as so many hold half of BYTES at most."""
    names, number = np.unique(ids, return_inverse=True)
    size = np.array([_size(int(name), tokenizer) for name in names], np.int64)
    sums = np.concatenate([[0], np.cumsum(size[number])])[begins]
    tokens = np.maximum(1, np.diff(begins))
    enough = BYTES * tokens / np.maximum(1, np.diff(sums))  # tokens that hold BYTES of text
    doubled = np.floor(np.log2(np.maximum(1, enough / at_least))).astype(np.int64)
    return at_least << doubled


def _size(name: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of text that a token stands for: what a second one of it adds, as some tokenizers drop the first space."""
    once, twice = (tokenizer.decode([name] * times, skip_special_tokens=True) for times in (1, 2))
    return len(twice.replace("\ufffd", "?").encode()) - len(once.replace("\ufffd", "?").encode())


def _rows(data: Encoded, examples: np.ndarray) -> np.ndarray:
    """A number for the row that each example was made of."""
    rows = np.empty(len(examples), np.int64)
    for source, entry in enumerate(data.entries):
        mine = data.source[examples] == source
        rows[mine] = np.int64(source << 32) + entry.row[data.views.example[examples[mine]]]
    return rows


def _shared(
    held: Encoded, train: Encoded, ids: np.ndarray, begins: np.ndarray, example: int, place: int, source: int, position: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Shared:  # fmt: skip
    """The whole stretch that begins at these places."""
    entry = train.entries[source]
    row = int(np.searchsorted(entry.starts["input_ids"], position, side="right")) - 1
    ours = ids[place : begins[np.searchsorted(begins, place, side="right")]]
    theirs = entry.values["input_ids"][position : entry.starts["input_ids"][row + 1]]
    size = min(len(ours), len(theirs))
    other = np.flatnonzero(ours[:size] != theirs[:size])
    text = tokenizer.decode(ours[: int(other[0]) if len(other) else size].tolist(), skip_special_tokens=True)
    return Shared(
        held.where(example), f"{train.paths[source]}:{int(entry.row[row])}", text.strip("\ufffd \n")
    )
