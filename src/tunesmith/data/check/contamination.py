"""Contamination: held-out rows share a passage with training rows, so their loss is too low.

A passage is a run of consecutive letters (see ``data.text_windows``). Letters are counted in the decoded
text, not in tokens: a tokenizer may split a Korean syllable into three tokens or encode five words as one. A
passage in many training rows belongs to the chat template or is a phrase of the task, and is ignored. The
training tokens are read once, from the encoded files, with a rolling hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch.pack import Example
from tunesmith.data.encode.token_text import TokenText
from tunesmith.data.row_problems import shorten
from tunesmith.data.store.cache import forget
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.data.text_windows import SHARED, WIDE, counted_letters, rolling_hashes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMMON_ROWS = 10
"""A passage in more training rows than this (or in half of a small set) is a phrase of the task."""

PIECE, PIECE_SHARE, SAMPLED = 20, 0.1, 2000
"""A run of PIECE letters belongs to the template if PIECE_SHARE of the training rows (a sample of at most
SAMPLED) have it. A short run would not do: half of all Korean sentences end in the same two syllables, six
letters."""

HEADS = (5, 10)
"""Lengths of the runs after a special token, or at the start of a row, that belong to the template if
PIECE_SHARE of the rows have them: ``user`` or ``assistant`` on a line."""

LISTED = 10
BLOCK = 1 << 14
"""Tokens read at a time: the arrays of their letters fit into the processor's cache."""

SCATTERED = 64
"""Release the mapped files every this many rows; each row may load 64 KB of them."""


@dataclass(frozen=True)
class SharedText:
    """A held-out row, a training row, and the text in both."""

    where: str
    same_as: str
    text: str


@dataclass(frozen=True)
class Contamination:
    """``rows`` held-out rows (``share`` of all) share at least ``letters`` letters with a training row.

    ``first``: the first LISTED of these rows. ``answers``: the number of these rows in which a shared letter
    is supervised, so that the loss itself is too low; the others share only their prompt. It is None for
    objectives without supervised tokens (labels, rewards). ``short``: the number of rows with fewer than
    ``letters`` letters outside the template; only exact duplicates of them are found.
    """

    letters: int
    rows: int
    share: float
    first: tuple[SharedText, ...]
    answers: int | None
    short: int

    def line(self) -> str:
        """Return the counts and the first row in one line."""
        first = self.first[0]
        text = f"{self.rows} evaluation rows ({self.share:.1%}) share {passage(self.letters)} with a training row"
        answers = "" if self.answers is None else f", {self.answers} of them in supervised tokens"
        return f"{text}{answers}, for example {first.where} with {first.same_as}: {shorten(first.text)}"


def passage(letters: int) -> str:
    """Describe the length of a passage in letters and in syllables, for a message."""
    return f"a passage of {letters} letters or more ({-(-letters // WIDE)} Hangul syllables or ideographs)"


class _Known:
    """The distinct hashes of held-out passages, sorted, to be looked up in training text."""

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes, self.number = np.unique(hashes, return_inverse=True)
        bits = min(26, max(12, len(self.hashes).bit_length() + 3))
        self._high, self._low = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
        self._maybe = np.zeros(
            (2, 1 << bits), np.bool_
        )  # high and low bits rule out most of the training letters
        self._maybe[0, self.hashes >> self._high] = self._maybe[1, self.hashes & self._low] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (place, number of the known hash) of those of ``hashes`` that are known."""
        places = np.flatnonzero(self._maybe[0][hashes >> self._high])
        places = places[self._maybe[1][hashes[places] & self._low]]
        number = np.searchsorted(self.hashes, hashes[places])
        number[number == len(self.hashes)] = 0
        same = self.hashes[number] == hashes[places]
        return places[same], number[same]

    def count_rows(self, number: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Return the number of rows that have each known hash; a row counts once."""
        pairs = np.sort((number << 32) + row)
        once = pairs[np.diff(pairs, prepend=-1) != 0]
        return np.bincount(once >> 32, minlength=len(self.hashes))


@dataclass(frozen=True)
class _Letters:
    """Letters of joined examples, and the number of letters up to the end of each example.

    The letter 0 is a break: a special token, or the end of an example.
    """

    codes: np.ndarray
    examples: np.ndarray
    ends: np.ndarray

    def owner(self, positions: np.ndarray) -> np.ndarray:
        """Return the example of each of these letters."""
        return self.examples[np.searchsorted(self.ends, positions, side="right")]

    def hashes(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (position, hash) of every run of ``n`` letters without a break."""
        hashed = rolling_hashes(self.codes, n)
        positions = np.flatnonzero(_none_marked(self.codes == 0, np.arange(len(hashed)), n))
        return positions, hashed[positions]

    def heads(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (position, hash) of the ``n`` letters after each break."""
        breaks = self._breaks()
        starts = np.concatenate([[0], breaks[:-1] + 1])
        positions = starts[breaks - starts >= n]
        return positions, rolling_hashes(self.codes[positions[:, None] + np.arange(n)].reshape(-1), n)[::n]

    def find(self, known: _Known, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (position, number of the known hash) of every known run of ``n`` letters without a break."""
        positions, number = known.find(rolling_hashes(self.codes, n))
        breaks = self._breaks()
        whole = breaks[np.searchsorted(breaks, positions)] >= positions + n
        return positions[whole], number[whole]

    def find_heads(self, known: _Known, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what :meth:`find` does, of the ``n`` letters after each break."""
        positions, hashes = self.heads(n)
        places, number = known.find(hashes)
        return positions[places], number

    def _breaks(self) -> np.ndarray:
        return np.append(np.flatnonzero(self.codes == 0), len(self.codes))


def contamination(
    train: Encoded,
    held: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    written: bool = True,
    shared: int = SHARED,
) -> Contamination | None:
    """Compare the text of two splits. Return None when their examples are not single sequences of tokens.

    ``written``: the objective has supervised tokens. ``shared``: length of a passage in letters. Memory:
    about 100 bytes for each held-out token, and 4 bytes for each training example.
    """
    if not all("input_ids" in entry.values for entry in (*train.entries, *held.entries)):
        return None
    text, examples = TokenText(tokenizer), np.arange(len(held))
    ours, supervised = _held_letters(held, text)
    positions, hashes = ours.hashes(shared)
    compared = _none_marked(_template(train, ours, text), positions, shared)
    positions, hashes = positions[compared], hashes[compared]
    long = np.zeros(len(held), np.bool_)
    long[ours.owner(positions)] = True
    hits = _hits(train, positions, hashes, supervised, shared, text)
    rows, all_rows = _row_ids(held, ours.owner(hits[0])), _row_ids(held, examples)
    first = np.sort(np.unique(rows, return_index=True)[1])
    listed = hits[:3, first[:LISTED]].T.tolist()
    total = len(np.unique(all_rows))
    return Contamination(
        letters=shared,
        rows=len(first),
        share=len(first) / max(1, total),
        first=tuple(_shared_text(held, train, ours, hit, text) for hit in listed),
        answers=len(np.unique(rows[hits[3] > 0])) if written else None,
        short=total - len(np.unique(all_rows[long])),
    )


def _hits(
    train: Encoded, positions: np.ndarray, hashes: np.ndarray, supervised: np.ndarray, n: int, text: TokenText
) -> np.ndarray:
    """Return int64[4, hits]: the held-out passages that occur in training rows, without phrases of the task.

    Row 0 is the position in the held-out letters. Rows 1 and 2 are the source of the first match and its
    example in that source. Row 3 is 1 where a letter of the passage is supervised.
    """
    known = _Known(hashes)
    number = known.number
    counts, first = _find_in_training(train, known, n, text)
    common = max(1, min(COMMON_ROWS, len(train) // 2))
    phrases = _mark(len(supervised), positions[counts[number] > common], n)
    hit = (counts[number] > 0) & _none_marked(phrases, positions, n)
    answered = ~_none_marked(supervised, positions[hit], n)
    return np.stack([positions[hit], *first[:, number[hit]], answered])


def _held_letters(held: Encoded, text: TokenText) -> tuple[_Letters, np.ndarray]:
    """Return the letters of the held-out examples, and the loss mask of each letter."""
    codes, masks, sizes = [], [], []
    for example in chain.from_iterable(_read(held, np.arange(len(held)))):
        runs = _runs(example, text)
        found = [counted_letters(string)[0] for string, _ in runs]
        codes += [*found, np.zeros(1, np.uint32)]
        masks += [*(np.full(len(part), mask) for part, (_, mask) in zip(found, runs)), np.zeros(1, np.bool_)]
        sizes.append(1 + sum(map(len, found)))
    return _Letters(np.concatenate(codes), np.arange(len(held)), np.cumsum(sizes)), np.concatenate(masks)


def _sampled_letters(train: Encoded, text: TokenText) -> tuple[_Letters, int]:
    """Return the letters of a sample of at most SAMPLED training examples, and the number of these."""
    sample = np.unique(np.linspace(0, len(train) - 1, min(len(train), SAMPLED)).astype(np.int64))
    strings: list[str] = []
    for part in _read(train, sample):
        rows = [example["input_ids"] for example in part]
        strings += text.decode_rows(np.concatenate(rows), [len(row) for row in rows])
    return _join(strings, sample), len(sample)


def _join(strings: Sequence[str], examples: np.ndarray) -> _Letters:
    """Return the letters of the texts of ``examples``."""
    codes, counts = counted_letters("\0".join([*strings, ""]))
    ends = np.cumsum([len(string) + 1 for string in strings])
    return _Letters(codes, examples, ends if counts is None else np.cumsum(counts)[ends - 1])


def _runs(example: Example, text: TokenText) -> list[tuple[str, bool]]:
    """Return the text of an example, cut where the loss mask changes.

    The first token is not supervised: it has no context to be predicted from.
    """
    ids = example["input_ids"]
    marked = example.get("supervised")
    mask = np.ones(len(ids), np.bool_) if marked is None else np.array(marked, np.bool_)
    mask[:1] = False
    cuts = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
    return [(text.decode(ids[a:b]), bool(mask[a])) for a, b in pairwise(cuts) if a < b]


def _read(data: Encoded, examples: np.ndarray) -> Iterator[list[Example]]:
    """Yield SCATTERED examples at a time, and release the mapped files after each time."""
    for first in range(0, len(examples), SCATTERED):
        yield [data[index] for index in examples[first : first + SCATTERED].tolist()]
        for entry in data.entries:
            for values in entry.values.values():
                forget(values)


def _find_in_training(
    train: Encoded, known: _Known, n: int, text: TokenText
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many training rows have each hash, and the source and the example of its first match."""
    counts = np.zeros(len(known.hashes), np.int64)
    first = np.full((2, len(known.hashes)), -1, np.int64)
    if not len(known.hashes):
        return counts, first
    for source, rows, block in _blocks(train, text):
        positions, number = block.find(known, n)
        example = block.owner(positions)
        counts += known.count_rows(number, rows[example])
        new, at = np.unique(number, return_index=True)
        new, at = new[first[0, new] < 0], at[first[0, new] < 0]
        first[0, new], first[1, new] = source, example[at]
    return counts, first


def _blocks(data: Encoded, text: TokenText) -> Iterator[tuple[int, np.ndarray, _Letters]]:
    """Yield blocks of training text: (source, row of each of its examples, letters).

    Tokens that the length policy cut off are left out. A block ends at the end of an example, so a row is in
    two blocks only if it has several examples.
    """
    for source, entry in enumerate(data.entries):
        mine = data.source == source
        starts, ids = entry.starts["input_ids"], entry.values["input_ids"]
        used = np.zeros(len(entry), np.int64)
        view_ends = data.views.start[mine].astype(np.int64) + data.views.length[mine]
        np.maximum.at(used, data.views.example[mine], view_ends)
        example = 0
        while example < len(entry):
            past = max(example + 1, int(np.searchsorted(starts, starts[example] + BLOCK, side="right")) - 1)
            numbers = np.flatnonzero(used[example:past]) + example
            block = ids[starts[example] : starts[past]]
            if len(block) > used[numbers].sum():
                begins = starts[numbers].tolist()
                kept = [ids[at : at + size] for at, size in zip(begins, used[numbers].tolist())]
                block = np.concatenate([*kept, block[:0]])
            strings = text.decode_rows(block, used[numbers].tolist())
            yield source, entry.row, _join(strings, numbers)
            forget(ids)
            example = past


def _template(train: Encoded, ours: _Letters, text: TokenText) -> np.ndarray:
    """Return bool[letters]: the held-out letters that belong to the template (see PIECE and HEADS)."""
    sampled, rows = _sampled_letters(train, text)
    most = max(1, min(COMMON_ROWS, rows // 2), PIECE_SHARE * rows)
    marked = np.zeros(len(ours.codes), np.bool_)
    for size, heads in [(PIECE, False), *((size, True) for size in HEADS)]:
        positions, hashes = ours.heads(size) if heads else ours.hashes(size)
        if len(positions):
            known = _Known(hashes)
            places, number = sampled.find_heads(known, size) if heads else sampled.find(known, size)
            counts = known.count_rows(number, sampled.owner(places))
            marked |= _mark(len(marked), positions[counts[known.number] > most], size)
    return marked


def _mark(size: int, positions: np.ndarray, n: int) -> np.ndarray:
    """Return bool[size], true for the ``n`` letters from each position on."""
    edges = np.zeros(size + 1, np.int32)
    np.add.at(edges, positions, 1)
    np.add.at(edges, positions + n, -1)
    return np.cumsum(edges)[:size] > 0


def _none_marked(marked: np.ndarray, positions: np.ndarray, n: int) -> np.ndarray:
    """Return bool[positions], true where none of the ``n`` letters from the position on is marked."""
    before = np.concatenate([[0], np.cumsum(marked, dtype=np.int32)])
    return before[positions + n] == before[positions]


def _row_ids(data: Encoded, examples: np.ndarray) -> np.ndarray:
    """Return a number for the row that each example was made of."""
    rows = np.empty(len(examples), np.int64)
    for source, entry in enumerate(data.entries):
        mine = data.source[examples] == source
        rows[mine] = np.int64(source << 32) + entry.row[data.views.example[examples[mine]]]
    return rows


def _shared_text(
    held: Encoded, train: Encoded, ours: _Letters, hit: list[int], text: TokenText
) -> SharedText:
    """Return the longest text that both rows of a hit share.

    ``hit``: position in ``ours``, source of the training row, its example in that source.
    """
    here, source, example = hit
    owner, entry = int(ours.owner(np.array([here]))[0]), train.entries[source]
    start = here - int(np.concatenate([[0], ours.ends])[owner])
    string = "".join(part for part, _ in _runs(held[owner], text))
    _, sizes = counted_letters(string)
    place = start if sizes is None else int(np.searchsorted(np.cumsum(sizes), start, side="right"))
    begin, past = entry.starts["input_ids"][example : example + 2]
    theirs = text.decode(entry.values["input_ids"][begin:past])
    end = place + 1
    while end < len(string) and string[end] != "\0" and string[place : end + 1] in theirs:
        end += 1
    where, same_as = held.where(owner), f"{train.paths[source]}:{int(entry.row[example])}"
    return SharedText(where, same_as, string[place:end].strip())
