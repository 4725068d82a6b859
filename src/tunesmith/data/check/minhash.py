"""Which rows may be much alike: their shingles, MinHash signatures (by rensa), and bands of them that are
equal.

The similarity of two rows is the Jaccard index of their sets of shingles: how many both have, of all that one
of them has. A slot of two MinHash signatures is equal with just that probability (Broder 1997). Signatures
are cut into bands of r slots, and rows that agree in one of the b bands are candidates: 1 - (1 - s^r)^b of
the pairs with similarity s (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4). A
candidate is a suspicion; `near.py` compares the rows themselves.
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.data.check.contamination import rolling
from tunesmith.data.rows import Ranking, Row
from tunesmith.errors import MissingExtra

SHINGLE = 5
"""Characters, not words: five words are a whole Korean sentence and most of a short row, and code has no
words. Of five characters two unrelated rows share little (a tenth, in English). Hangul is taken apart into
its letters, so that five of them say about as much as five of another alphabet, and a changed particle in a
short row does not hide what is the same."""

SLOTS, SEED = 128, 42
RECALL = 0.999
"""Bands are as long as they may be for so large a share of the pairs just at the threshold to become candidates."""

COMPARED = 64
"""Each row of a band's bucket is compared with so many before it: a phrase that all rows begin with must not
cost the square of their number. Rows that are alike come as pairs in many buckets, and a cluster needs only a
chain of pairs."""

UNCOMPARED = {"tools", "label", "labels", "words", "tags", "answers", "id", "desirable"}
"""Fields of rows that are no words of theirs: what many rows have, and what is known of them."""

_PAIRS = 1 << 13
"""Pairs estimated at a time."""


def words(row: Row) -> str:
    """All that a row says, on one line: its turns, without system prompts and tools, which are the same in many rows."""
    return " ".join(unicodedata.normalize("NFC", " ".join(_strings(row))).split())


def shingles(said: str) -> np.ndarray:
    """uint64[k]: a hash of every five letters in a row, not sorted, repeats and all. A shorter text is one
    shingle.

    Capital letters do not matter. Two different shingles have one hash by a chance of 2**-64.
    """
    characters = letters(said).ljust(SHINGLE).encode("utf-32-le", "surrogatepass")
    return rolling(np.frombuffer(characters, np.uint32), SHINGLE)


def letters(said: str) -> str:
    """What is compared: no capitals, every syllable and accent taken apart."""
    return unicodedata.normalize("NFD", said.casefold())


def signatures(texts: Sequence[str]) -> np.ndarray:
    """uint32[texts, SLOTS]: R-MinHash (rensa; Dahlgaard, Knudsen and Thorup 2017). The same on every machine.

    Raises MissingExtra without rensa.
    """
    try:
        from rensa import RMinHash
    except ModuleNotFoundError:
        raise MissingExtra("rensa", "dedup", "data lint --near-duplicates") from None
    parts = [shingles(text) for text in texts]
    ends = np.cumsum([0, *map(len, parts)], dtype=np.uint64)
    made = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(parts), ends, SLOTS, SEED)
    return np.array(made.to_rows(), np.uint32)


def banding(threshold: float) -> tuple[int, int]:
    """(bands, slots of each): the longest bands with ``recall`` of at least RECALL."""
    size = max(size for size in range(1, SLOTS + 1) if recall(threshold, SLOTS // size, size) >= RECALL)
    return SLOTS // size, size


def recall(similarity: float, bands: int, size: int) -> float:
    """The share of pairs of this Jaccard similarity that agree in a band."""
    return float(1 - (1 - similarity**size) ** bands)


def candidates(slots: np.ndarray, rows: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(int64[pairs, 2] of ``rows``, float64[pairs] estimates) that agree in a band and are estimated near the
    threshold.

    ``rows``: ascending indices into the signatures ``slots``. Each pair once, the lower row first, sorted.
    Most pairs of a band are unlike in the rest of their slots; they go before any text is read.
    """
    # Not rensa's RMinHashLSH: its queries return whole buckets, so rows that share a phrase cost the square of
    # their number (26 s for 10,000 of them, 0.4 s here). Its bands must also divide SLOTS.
    bands, size = banding(threshold)
    found = np.empty(0, np.int64)
    lowest = lowest_estimate(threshold)
    for band in range(bands):
        column = rolling(slots[rows, band * size : (band + 1) * size].reshape(-1), size)[
            ::size
        ]  # one hash a row
        order = np.argsort(column, kind="stable")
        ranked, ordered = column[order], rows[order]
        new = []
        for step in range(1, min(COMPARED, len(order) - 1) + 1):
            same = np.flatnonzero(ranked[step:] == ranked[:-step])
            if not len(same):
                break
            one, other = ordered[same], ordered[same + step]
            near = estimates(slots, one, other) >= lowest
            new.append(one[near] * len(slots) + other[near])
        found = np.unique(np.concatenate([found, *new]))
    one, other = found // max(1, len(slots)), found % max(1, len(slots))
    return np.stack([one, other], 1), estimates(slots, one, other)


def estimates(slots: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float64[pairs]: the share of equal slots of two rows each."""
    blocks = [slice(at, at + _PAIRS) for at in range(0, len(one), _PAIRS)]
    return np.concatenate(
        [np.empty(0), *((slots[one[block]] == slots[other[block]]).mean(1) for block in blocks)]
    )


def lowest_estimate(threshold: float) -> float:
    """What a pair of this similarity is estimated at, or above, but for one in three million (five standard deviations)."""
    return threshold - 5 * math.sqrt(threshold * (1 - threshold) / SLOTS)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Of two sets of shingles (sorted, each once): how many are in both, of all."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        said = (
            {}
            if value.get("role") == "system"
            else {name: item for name, item in value.items() if name != "role"}
        )
        return [text for item in said.values() for text in _strings(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.name not in UNCOMPARED]
        names = ["prompt", "answers"] if isinstance(value, Ranking) else names
        return [text for name in names for text in _strings(getattr(value, name))]
    return [] if value is None else [str(value)]
