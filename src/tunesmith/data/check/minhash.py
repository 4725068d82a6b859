"""Candidate pairs of near-duplicates, by shingles, MinHash signatures (rensa) and bands of them.

The similarity of two rows is the Jaccard index of their sets of shingles: |intersection| / |union|. A slot of
two MinHash signatures is equal with exactly that probability (Broder 1997). A signature is cut into b bands
of r slots; rows that agree in a band are candidates, which are 1 - (1 - s^r)^b of the pairs with similarity s
(Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4). ``near_duplicates`` then compares
the candidates exactly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from tunesmith.data.rows import Ranking, Row
from tunesmith.data.text_windows import letters, rolling_hashes
from tunesmith.errors import MissingExtra

SHINGLE = 5
"""Letters of a shingle, as ``data.text_windows`` counts them: characters after NFC, of which a Hangul syllable
or an ideograph counts as three. So five letters mean about as much in every script, and one changed particle
leaves most shingles of a short Korean row equal. Not words: five words are a whole Korean sentence and most of
a short row, and code has no words. Two unrelated English rows share a tenth of such shingles."""

SLOTS, SEED = 128, 42
RECALL = 0.999
"""Bands are as long as possible while this share of the pairs just at the threshold become candidates."""

COMPARED = 64
"""A row is compared with this many earlier rows of its bucket, so that a phrase at the start of all rows does
not cost the square of their number. Similar rows meet in many buckets, and a cluster needs only a chain of
pairs."""

UNCOMPARED = {"tools", "label", "labels", "words", "tags", "answers", "id", "desirable", "columns"}
"""Fields that are not text of the row: tools are the same in many rows, and the others are gold."""

_PAIRS = 1 << 13
"""Pairs estimated at a time."""


def row_text(row: Row) -> str:
    """Return all turns on one line, without system prompts and tools, which many rows have in common."""
    fields = [field.name for field in dataclasses.fields(row) if field.name not in UNCOMPARED]
    names = ["prompt", "answers"] if isinstance(row, Ranking) else fields
    texts = [text for name in names for text in _strings(getattr(row, name))]
    return " ".join(unicodedata.normalize("NFC", " ".join(texts)).split())


def shingles(text: str) -> np.ndarray:
    """Return uint64[k]: a hash of every five consecutive letters, unsorted, with repeats.

    A shorter text is one shingle. Two different shingles collide with a probability of 2**-64.
    """
    codes = letters(text.casefold())
    if len(codes) < SHINGLE:
        codes = np.pad(codes, (0, SHINGLE - len(codes)))
    return rolling_hashes(codes, SHINGLE)


def digest(text: str) -> int:
    """Return a hash of 64 bits of the compared text: lower case, in NFC."""
    compared = unicodedata.normalize("NFC", text.casefold()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(compared, digest_size=8).digest(), "little")


def signatures(texts: Sequence[str]) -> np.ndarray:
    """Return uint32[texts, SLOTS]: R-MinHash (rensa; Dahlgaard, Knudsen and Thorup 2017).

    It is the same on every machine. Raises MissingExtra without rensa.
    """
    try:
        from rensa import RMinHash
    except ModuleNotFoundError:
        raise MissingExtra("rensa", "dedup", "data lint --near-duplicates") from None
    parts = [shingles(text) for text in texts]
    ends = np.cumsum([0, *map(len, parts)], dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(parts), ends, SLOTS, SEED)
    return np.array(matrix.to_rows(), np.uint32)


def choose_bands(threshold: float) -> tuple[int, int]:
    """Return (bands, slots of each): the longest bands whose ``recall`` is at least RECALL."""
    size = max(size for size in range(1, SLOTS + 1) if recall(threshold, SLOTS // size, size) >= RECALL)
    return SLOTS // size, size


def recall(similarity: float, bands: int, size: int) -> float:
    """Return the share of pairs of this Jaccard similarity that agree in at least one band."""
    return float(1 - (1 - similarity**size) ** bands)


def candidates(slots: np.ndarray, rows: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of ``rows`` (int64[pairs, 2]) that agree in a band, and their estimates (float64[pairs]).

    ``rows``: ascending indices into the signatures ``slots``. Each pair occurs once, the lower row first,
    sorted. The estimate removes most pairs of a band before any text is read.
    """
    # Not rensa's RMinHashLSH: its queries return whole buckets, so rows that share a phrase cost the square
    # of their number (26 s for 10,000 of them, 0.4 s here). Its bands must also divide SLOTS.
    bands, size = choose_bands(threshold)
    codes = np.empty(0, np.int64)  # lower row * len(slots) + higher row
    lowest = lowest_estimate(threshold)
    for band in range(bands):
        hashes = rolling_hashes(slots[rows, band * size : (band + 1) * size].reshape(-1), size)
        bucket = hashes[::size]  # one hash a row
        order = np.argsort(bucket, kind="stable")
        bucket, ordered = bucket[order], rows[order]
        new = []
        for step in range(1, min(COMPARED, len(order) - 1) + 1):
            same = np.flatnonzero(bucket[step:] == bucket[:-step])
            if not len(same):
                break
            lower, higher = ordered[same], ordered[same + step]
            near = estimates(slots, lower, higher) >= lowest
            new.append(lower[near] * len(slots) + higher[near])
        codes = np.unique(np.concatenate([codes, *new]))
    lower, higher = codes // max(1, len(slots)), codes % max(1, len(slots))
    return np.stack([lower, higher], 1), estimates(slots, lower, higher)


def estimates(slots: np.ndarray, lower: np.ndarray, higher: np.ndarray) -> np.ndarray:
    """Return float64[pairs]: the share of equal slots of each pair of rows."""
    blocks = [slice(at, at + _PAIRS) for at in range(0, len(lower), _PAIRS)]
    means = [(slots[lower[block]] == slots[higher[block]]).mean(1) for block in blocks]
    return np.concatenate([np.empty(0), *means])


def lowest_estimate(threshold: float) -> float:
    """Return the estimate that all but one in three million pairs at the threshold reach (5 sigma)."""
    return threshold - 5 * math.sqrt(threshold * (1 - threshold) / SLOTS)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return |intersection| / |union| of two sets of shingles (sorted, without repeats)."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        is_system = value.get("role") == "system"
        value = [] if is_system else [item for key, item in value.items() if key != "role"]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return [] if value is None else [str(value)]
