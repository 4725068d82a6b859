"""From tagged words to windows of tokens: which sub-word speaks for which word, and which window for which part of a sentence.

A word's tag is learnt at one of its tokens and read there again, so every word has a token, whatever the tokenizer makes of it,
and belongs to exactly one window. Gold tags are never cut with the text (Devlin et al. 2019, section 5.3, cut theirs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.encode import labels
from tunesmith.data.encode.templates import special_ends
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Tagged
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, np.ndarray]

END = 1 << 62
"""Past every text."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """A sentence without special tokens: ``ids`` int32[n], and ``word`` int32[n], that of each token, rising; -1 = none."""

    ids: np.ndarray
    word: np.ndarray


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start`` to ``end`` of a sentence, and the words that are learnt and read here; they may see more of it."""

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
) -> list[list[Example]]:
    """For each row its windows of at most ``max_length`` tokens; ``names``: the tags, by id.

    ``input_ids`` int32[n] and, where the tokenizer has them, ``token_type_ids`` uint8[n]; ``places`` int32[m]: the tokens that
    speak for a word, rising; ``words`` int32[m]: which word of the row; ``target`` int32[m]: its tag, -1 where it is not known.
    A word speaks through its first token, in a ``causal`` network through its last, which has seen all of the word. With
    ``label_all`` its other tokens are there too; there a B- is an I-.

    Raises RowFault (a DataError) whose ``index`` is the position in ``rows``.
    """
    before, after = special_ends(tokenizer)
    room = None if max_length is None else max_length - len(before) - len(after)
    if room is not None and room < 1:
        raise DataError(
            f"max_length {max_length} leaves no room for a word between special tokens. Set train.max_length higher."
        )
    numbers = {name: number for number, name in enumerate(names)}
    targets = [_targets(row, index, numbers) for index, row in enumerate(rows)]
    inside = np.array([numbers.get(continued(name), number) for name, number in numbers.items()], np.int32)
    typed = "token_type_ids" in tokenizer.model_input_names
    out = []
    for sentence, target in zip(align(rows, tokenizer), targets, strict=True):
        sentence = _without_excess(sentence, room, causal)
        examples = []
        for window in windows(sentence.word, room, stride, causal):
            ids = np.concatenate([before, sentence.ids[window.start : window.end], after]).astype(np.int32)
            word = sentence.word[window.start : window.end]
            example: Example = {
                "input_ids": ids,
                **({"token_type_ids": np.zeros(len(ids), np.uint8)} if typed else {}),
            }
            spoken = _spoken(word, window.words, target, inside, causal, label_all)
            example |= {**spoken, "places": (spoken["places"] + len(before)).astype(np.int32)}
            examples.append(example)
        out.append(examples)
    return out


def continued(name: str) -> str:
    """The tag of a further token of a word with the tag ``name``: I-X after B-X, else the same."""
    return "I" + name[1:] if name == "B" or name.startswith("B-") else name


def align(rows: Sequence[Tagged], tokenizer: PreTrainedTokenizerBase) -> list[Aligned]:
    """Tokenise rows in one call. A row some token of which belongs to two words is tokenised again, word by word."""
    found = _tokenised([row.text for row in rows], tokenizer)
    out = []
    for row, (ids, offsets) in zip(rows, found, strict=True):
        places = np.array(row.words, np.int64).reshape(-1, 2)
        word = _words_of(offsets, places)
        out.append(
            _complete(
                *((ids, word) if word is not None else _word_by_word(row, tokenizer)), len(places), tokenizer
            )
        )
    return out


def chosen(words: np.ndarray, causal: bool) -> np.ndarray:
    """bool[m]: which of the places of a window are those that a word is read at; ``words``: int[m], rising."""
    last = np.ones(len(words), np.bool_)
    last[:-1] = words[1:] != words[:-1]
    return last if causal else np.concatenate([last[-1:], last[:-1]])


def windows(word: np.ndarray, room: int | None, stride: int, causal: bool) -> list[Window]:
    """The windows of a sentence whose tokens belong to ``word`` (as in :class:`Aligned`; no word has more than ``room``).

    They overlap by ``stride`` tokens at most and begin and end between words. A word belongs to the window that has most
    context on the side where it has less (in a ``causal`` network: before it); the ends of the sentence count as plenty.
    """
    count = len(word)
    first = np.flatnonzero(np.concatenate([[True], word[1:] != word[:-1]]) & (word >= 0))
    last = np.flatnonzero(np.concatenate([word[1:] != word[:-1], [True]]) & (word >= 0))
    if room is None or count <= room:
        return [Window(0, count, word[first])]
    cuts = np.concatenate([[0], np.flatnonzero((word[1:] != word[:-1]) | (word[1:] < 0)) + 1, [count]])
    spans = []
    start = 0
    while True:
        end = int(cuts[np.searchsorted(cuts, start + room, side="right") - 1])
        spans.append((start, end))
        if end == count:
            break
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
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
        padding=False, truncation=False, verbose=False,
    )  # fmt: skip
    return [
        (np.array(ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2))
        for ids, encoding in zip(encoded["input_ids"], encoded.encodings, strict=True)
    ]


def _words_of(offsets: np.ndarray, places: np.ndarray) -> np.ndarray | None:
    """int32[n]: the word that each token shares a character with, -1 for none; None when one shares some with two."""
    first = np.searchsorted(places[:, 1], offsets[:, 0], side="right")
    last = np.searchsorted(places[:, 0], offsets[:, 1], side="left") - 1
    if (first < last).any():
        return None
    word = np.where(first == last, first, -1)
    for token in np.flatnonzero(
        (word < 0) & (offsets[:, 0] == offsets[:, 1])
    ):  # a later piece of a character may have no width
        before = word[token - 1] if token else -1
        if before >= 0 and places[before, 0] < offsets[token, 0] <= places[before, 1]:
            word[token] = before
    known = word[word >= 0]
    return word.astype(np.int32) if (known[1:] >= known[:-1]).all() else None


def _word_by_word(row: Tagged, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """(ids, word) where each word is tokenised with the white space before it, as if the text began there."""
    ends = [0, *(end for _, end in row.words)]
    pieces = [row.text[begin:end] for begin, (_, end) in zip(ends, row.words)]
    ids, word = [], []
    for number, (found, offsets) in enumerate(_tokenised([*pieces, row.text[ends[-1] :]], tokenizer)):
        gap = row.words[number][0] - ends[number] if number < len(pieces) else END
        ids.append(found)
        word.append(np.where((offsets[:, 1] > gap) | (gap == 0), number, -1))
    return np.concatenate(ids), np.concatenate(word).astype(np.int32)


def _complete(ids: np.ndarray, word: np.ndarray, count: int, tokenizer: PreTrainedTokenizerBase) -> Aligned:
    """With a token for each word: those that the tokenizer makes nothing of get the unknown one, in their place."""
    so_far = np.maximum.accumulate(word) if len(word) else word
    ahead = np.minimum.accumulate(np.where(word < 0, count, word)[::-1])[::-1]
    word = np.where(so_far == ahead, so_far, word)  # nothing lies between the tokens of one word
    missing = np.setdiff1d(np.arange(count), word)
    if len(missing):
        at = np.searchsorted(so_far, missing, side="right")
        ids, word = np.insert(ids, at, unknown_id(tokenizer)), np.insert(word, at, missing)
    return Aligned(ids.astype(np.int32), word.astype(np.int32))


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token of a word that the tokenizer writes nothing for; without an unknown token it is a space's, or the end token."""
    if tokenizer.unk_token_id is not None:
        return int(tokenizer.unk_token_id)
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    found = space[-1] if space else tokenizer.eos_token_id
    if found is None:
        raise DataError(
            "the tokenizer has no token for what it does not know. Set unk_token in the model's tokenizer."
        )
    return int(found)


def _without_excess(sentence: Aligned, room: int | None, causal: bool) -> Aligned:
    """A word of more than ``room`` tokens keeps those around the one that speaks for it: its first, or its last."""
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


def _targets(row: Tagged, index: int, numbers: dict[str, int]) -> np.ndarray:
    """int32[words]: the number of each word's tag, -1 where none is known."""
    if not row.words:
        raise RowFault(
            index, "at least one word", f"{row.text[:40]!r}", "Write the words, or delete the row.", "tokens"
        )
    if row.tags is None:
        return np.full(len(row.words), -1, np.int32)
    if len(row.tags) != len(row.words):
        got = f"{len(row.tags)} tags for {len(row.words)} words"
        raise RowFault(
            index,
            "a tag for each word",
            got,
            "Write as many tags as words; O is the tag of a word outside.",
            "tags",
        )
    for place, tag in enumerate(row.tags):
        if tag not in numbers:
            expected, got, fix = labels.unknown(tag, list(numbers))
            start, end = row.words[place]
            raise RowFault(
                index, expected, f"{got} at word {place + 1}, {row.text[start:end]!r}", fix, f"tags[{place}]"
            )
    return np.array([numbers[tag] for tag in row.tags], np.int32)


def _spoken(
    word: np.ndarray, owned: np.ndarray, target: np.ndarray, inside: np.ndarray, causal: bool, label_all: bool
) -> dict[str, np.ndarray]:
    """``places``, ``words`` and ``target`` of a window whose tokens belong to ``word``."""
    places = np.flatnonzero(np.isin(word, owned))
    words = word[places]
    speaks = chosen(words, causal)
    gold = target[words]
    if label_all:
        gold = np.where(speaks | (gold < 0), gold, inside[gold])
    else:
        places, words, gold = places[speaks], words[speaks], gold[speaks]
    return {
        "places": places.astype(np.int32),
        "words": words.astype(np.int32),
        "target": gold.astype(np.int32),
    }
