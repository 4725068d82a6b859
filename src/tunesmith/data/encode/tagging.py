"""Tagged words to windows of tokens: which token represents which word, and which window a word belongs to.

A word's tag is trained at one of its tokens and predicted there. So every word gets a token, whatever the
tokenizer makes of it, and belongs to exactly one window. Gold tags are never cut with the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch.pack import Example
from tunesmith.data.encode.labels import unknown_label
from tunesmith.data.encode.spans import END
from tunesmith.data.encode.templates import special_ends
from tunesmith.data.encode.texts import call_tokenizer, has_token_types
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Tagged
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


UNSEEN = {"B": -2, "I": -3, "E": -4, "S": -5, "": -6}
"""Targets of held-out words whose tag the model does not have, by kind of tag; no prediction matches them."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """A sentence without special tokens. ``word``: the word of each token, never decreasing; -1 = none."""

    ids: np.ndarray
    word: np.ndarray


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start`` to ``end`` of a sentence. ``words``: those predicted in it; the others are context."""

    start: int
    end: int
    words: np.ndarray


def encode(
    rows: Sequence[Tagged],
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    causal: bool,
    max_length: int | None,
    stride: int,
    label_all: bool,
    unseen: bool = False,
) -> list[list[Example]]:
    """For each row its windows of at most ``max_length`` tokens; ``names``: the tags, by id.

    ``input_ids`` int32[n] and, if the tokenizer has them, ``token_type_ids`` uint8[n]; ``places`` int32[m]:
    the tokens that represent a word, ascending; ``words`` int32[m]: which word of the row; ``target``
    int32[m]: its tag, -1 if unknown. With ``unseen``, a tag that is not in ``names`` becomes one of UNSEEN;
    without it, such a tag is an error. A word is represented by its first token; in a ``causal`` network by
    its last, which sees all of the word. ``label_all`` includes its other tokens; there a B- tag becomes I-.

    Raises RowFault (a DataError) whose ``index`` is the position in ``rows``.
    """
    before, after = special_ends(tokenizer)
    room = None if max_length is None else max_length - len(before) - len(after)
    if room is not None and room < 1:
        raise DataError(
            f"max_length {max_length} leaves no room for a word between special tokens. Set train.max_length higher."
        )
    numbers = {name: number for number, name in enumerate(names)}
    targets = [targets_of(row, index, numbers, unseen) for index, row in enumerate(rows)]
    inside = np.array([numbers.get(inside_tag(name), number) for name, number in numbers.items()], np.int32)
    typed = has_token_types(tokenizer)
    out = []
    for sentence, target in zip(align(rows, tokenizer), targets, strict=True):
        sentence = _shorten_words(sentence, room, causal)
        examples = []
        for window in windows(sentence.word, room, stride, causal):
            tokens = slice(window.start, window.end)
            example = {"input_ids": np.concatenate([before, sentence.ids[tokens], after]).astype(np.int32)}
            if typed:
                example["token_type_ids"] = np.zeros(len(example["input_ids"]), np.uint8)
            word = sentence.word[tokens]
            places = np.flatnonzero(np.isin(word, window.words))
            words = word[places]
            represents, gold = representing_tokens(words, causal), target[words]
            if label_all:
                gold = np.where(represents | (gold < 0), gold, inside[gold])
            else:
                places, words, gold = places[represents], words[represents], gold[represents]
            arrays = {"places": places + len(before), "words": words, "target": gold}
            examples.append(example | {name: array.astype(np.int32) for name, array in arrays.items()})
        out.append(examples)
    return out


def inside_tag(name: str) -> str:
    """The tag of the further tokens of a word with the tag ``name``: I-X for B-X, else the same."""
    return "I" + name[1:] if name == "B" or name.startswith("B-") else name


def align(rows: Sequence[Tagged], tokenizer: PreTrainedTokenizerBase) -> list[Aligned]:
    """Tokenise rows in one call; again word by word if a token belongs to two words."""
    out = []
    for row, (ids, offsets) in zip(rows, _tokenised([row.text for row in rows], tokenizer), strict=True):
        places = np.array(row.words, np.int64).reshape(-1, 2)
        word = _words_of(offsets, places)
        if word is None:
            ids, word = _word_by_word(row, tokenizer)
        out.append(_complete(ids, word, len(places), tokenizer))
    return out


def representing_tokens(words: np.ndarray, causal: bool) -> np.ndarray:
    """bool[m]: which tokens of a window represent their word; ``words``: int[m], the word of each token."""
    last = np.ones(len(words), np.bool_)
    last[:-1] = words[1:] != words[:-1]
    return last if causal else np.concatenate([last[-1:], last[:-1]])


def windows(word: np.ndarray, room: int | None, stride: int, causal: bool) -> list[Window]:
    """The windows of a sentence; ``word`` as in :class:`Aligned`, at most ``room`` tokens of each word.

    They overlap by at most ``stride`` tokens and begin and end between words. A word belongs to the window
    that has most context on the side where it has less (``causal``: before it); the ends of a sentence count
    as full.
    """
    count = len(word)
    first = np.flatnonzero(np.concatenate([[True], word[1:] != word[:-1]]) & (word >= 0))
    last = np.flatnonzero(np.concatenate([word[1:] != word[:-1], [True]]) & (word >= 0))
    if room is None or count <= room:
        return [Window(0, count, word[first])]
    cuts = np.concatenate([[0], np.flatnonzero((word[1:] != word[:-1]) | (word[1:] < 0)) + 1, [count]])
    spans = []
    start = end = 0
    while end < count:
        end = int(cuts[np.searchsorted(cuts, start + room, side="right") - 1])
        spans.append((start, end))
        if end < count:
            following = int(cuts[np.searchsorted(cuts, end, side="right")])
            start = int(cuts[np.searchsorted(cuts, max(start + 1, end - stride, following - room))])
    begins, ends = np.array(spans).T[:, :, None]
    left = np.where(begins == 0, count, first - begins)
    right = np.where(ends == count, count, ends - 1 - last)
    context = left if causal else np.minimum(left, right)
    owner = np.where((begins <= first) & (last < ends), context, -1).argmax(axis=0)
    made = [Window(*span, word[first[owner == number]]) for number, span in enumerate(spans)]
    return [window for window in made if len(window.words)]


def _tokenised(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32[n], offsets int64[n, 2] in characters) of each text, without special tokens."""
    if not texts:
        return []
    encoded = call_tokenizer(tokenizer, texts)
    return [
        (np.array(ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2))
        for ids, encoding in zip(encoded["input_ids"], encoded.encodings, strict=True)
    ]


def _words_of(offsets: np.ndarray, places: np.ndarray) -> np.ndarray | None:
    """int32[n]: the word that each token shares a character with, or -1; None if a token shares with two."""
    first = np.searchsorted(places[:, 1], offsets[:, 0], side="right")
    last = np.searchsorted(places[:, 0], offsets[:, 1], side="left") - 1
    if (first < last).any():
        return None
    word = np.where(first == last, first, -1)
    # a later piece of a character may have no width
    for token in np.flatnonzero((word < 0) & (offsets[:, 0] == offsets[:, 1])):
        before = word[token - 1] if token else -1
        if before >= 0 and places[before, 0] < offsets[token, 0] <= places[before, 1]:
            word[token] = before
    known = word[word >= 0]
    return word.astype(np.int32) if (known[1:] >= known[:-1]).all() else None


def _word_by_word(row: Tagged, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """(ids, word) where each word is tokenised with the white space before it, as if the text began there."""
    ends = [0, *(end for _, end in row.words)]
    pieces = [row.text[begin:end] for begin, (_, end) in zip(ends, row.words)]
    all_ids, word = [], []
    for number, (ids, offsets) in enumerate(_tokenised([*pieces, row.text[ends[-1] :]], tokenizer)):
        gap = row.words[number][0] - ends[number] if number < len(pieces) else END
        all_ids.append(ids)
        word.append(np.where((offsets[:, 1] > gap) | (gap == 0), number, -1))
    return np.concatenate(all_ids), np.concatenate(word).astype(np.int32)


def _complete(ids: np.ndarray, word: np.ndarray, count: int, tokenizer: PreTrainedTokenizerBase) -> Aligned:
    """Insert the unknown token for each word that has no token."""
    so_far = np.maximum.accumulate(word) if len(word) else word
    ahead = np.minimum.accumulate(np.where(word < 0, count, word)[::-1])[::-1]
    word = np.where(so_far == ahead, so_far, word)  # a token between two of one word belongs to that word
    missing = np.setdiff1d(np.arange(count), word)
    if len(missing):
        at = np.searchsorted(so_far, missing, side="right")
        ids, word = np.insert(ids, at, unknown_id(tokenizer)), np.insert(word, at, missing)
    return Aligned(ids.astype(np.int32), word.astype(np.int32))


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token of a word that the tokenizer drops: the unknown token, that of a space, or the end token."""
    if tokenizer.unk_token_id is not None:
        return int(tokenizer.unk_token_id)
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    token = space[-1] if space else tokenizer.eos_token_id
    if token is None:
        raise DataError(
            "the tokenizer has no token for an unknown word. Set unk_token in the model's tokenizer."
        )
    return int(token)


def _shorten_words(sentence: Aligned, room: int | None, causal: bool) -> Aligned:
    """Keep ``room`` tokens of a longer word: its first ones, in a ``causal`` network its last ones."""
    word = sentence.word
    if room is None or len(word) <= room:
        return sentence
    known = np.flatnonzero(word >= 0)
    _, starts, counts = np.unique(word[known], return_index=True, return_counts=True)
    if counts.max() <= room:
        return sentence
    rank = np.arange(len(known)) - np.repeat(starts, counts)
    if causal:
        rank = np.repeat(counts, counts) - 1 - rank
    keep = np.ones(len(word), np.bool_)
    keep[known[rank >= room]] = False
    return Aligned(sentence.ids[keep], word[keep])


def unseen_name(target: int, in_entities: bool) -> str:
    """Return a name for a tag that the model does not have.

    ``in_entities``: the model's tags mark entities.
    """
    kind = {number: kind for kind, number in UNSEEN.items()}[target]
    return f"{kind or 'B'}-(unseen)" if in_entities else "(unseen)"


def targets_of(row: Tagged, index: int, numbers: Mapping[str, int], unseen: bool) -> np.ndarray:
    """Return int32[words]: the number of each word's tag, -1 where it is unknown.

    With ``unseen``, a tag that is not in ``numbers`` becomes one of UNSEEN; without it, raises RowFault."""
    if not row.words:
        fix = "Write the words, or delete the row."
        raise RowFault(index, "at least one word", repr(row.text[:40]), fix, "tokens")
    if row.tags is None:
        return np.full(len(row.words), -1, np.int32)
    if len(row.tags) != len(row.words):
        got = f"{len(row.tags)} tags for {len(row.words)} words"
        fix = "Write as many tags as words; O is the tag of a word outside."
        raise RowFault(index, "a tag for each word", got, fix, "tags")
    for place, tag in enumerate(() if unseen else row.tags):
        if tag not in numbers:
            expected, got, fix = unknown_label(tag, list(numbers))
            got += f" at word {place + 1}, {row.text[slice(*row.words[place])]!r}"
            raise RowFault(index, expected, got, fix, f"tags[{place}]")
    return np.array([numbers[tag] if tag in numbers else _unseen_kind(tag) for tag in row.tags], np.int32)


def _unseen_kind(tag: str) -> int:
    kind, dash, _ = tag.partition("-")
    return UNSEEN[kind if dash and kind in UNSEEN else ""]
