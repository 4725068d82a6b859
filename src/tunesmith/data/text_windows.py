"""Find text that two rows share, by hashes of runs of letters.

Letters are characters after NFC. So the result depends neither on a tokenizer nor on how a file encodes
accents and syllables.
"""

from __future__ import annotations

import unicodedata

import numpy as np

SHARED = 60
"""Two rows share text if they have a run of this many letters in common: ten English words, or twenty Hangul
syllables. The contamination report of GPT-4 (OpenAI 2023, appendix C) compares 50 characters without spaces
and symbols, which are about 60 with them. The 13 tokens of GPT-3 (Brown et al. 2020, appendix C) are about 55
characters of English. Some runs of 50 letters are common phrases: "to solve complex problems in various
fields, such as"."""

WIDE, FIRST_WIDE = 3, 0x2E80
"""A character from FIRST_WIDE on (an ideograph, kana, a Hangul syllable) counts as WIDE letters, because it
carries as much: a Hangul syllable consists of two to four letters."""

SPARSE = 16
"""``fingerprints`` keeps about two of this many hashes."""

_MIX, _BASE = np.uint64(0x9E3779B97F4A7C15), 0xD6E8FEB86659FD93


def letters(text: str) -> np.ndarray:
    """Return uint32[letters]: the characters after NFC as numbers, a wide one WIDE times."""
    return counted_letters(unicodedata.normalize("NFC", text))[0]


def counted_letters(text: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the letters of a text in NFC, and int64[characters]: the letters of each character; None if each
    is one."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    wide = codes >= FIRST_WIDE
    if not wide.any():
        return codes, None
    counts = np.where(wide, WIDE, 1)
    return np.repeat(codes, counts), counts


def rolling_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Return uint64[len(ids) - n + 1]: a hash of every ``n`` consecutive numbers (Karp and Rabin 1987).

    The hash of a long run is combined from the hashes of two shorter runs, so the time grows with the
    logarithm of n.
    """
    if len(ids) < n:
        return np.empty(0, np.uint64)
    mixed = ids.astype(np.uint64)
    mixed *= _MIX
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MIX
    size, hashes = 1, mixed
    for bit in bin(n)[3:]:  # from the second binary digit of n on: double the run, and add one number for a 1
        longer = hashes[:-size] * np.uint64(pow(_BASE, size, 1 << 64))
        longer += hashes[size:]
        size, hashes = 2 * size, longer
        if bit == "1":
            longer = hashes[:-1] * np.uint64(_BASE)
            longer += mixed[size:]
            size, hashes = size + 1, longer
    return hashes


def fingerprints(text: str) -> set[int]:
    """Return some of the hashes of a text. Two texts that share SHARED letters have at least one in common.

    This is winnowing (Schleimer, Wilkerson and Aiken 2003): of every SPARSE consecutive hashes of shorter
    runs, the smallest is kept.
    """
    hashes = rolling_hashes(letters(text), SHARED - SPARSE + 1)
    if len(hashes) < SPARSE:
        return set()
    return set(np.lib.stride_tricks.sliding_window_view(hashes, SPARSE).min(axis=1).tolist())
