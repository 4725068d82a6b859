"""Letters and hashes of stretches of text: what two texts share is found, however it is written."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.text_windows import SHARED, SPARSE, fingerprints, letters, rolling_hashes


@settings(max_examples=60)
@given(st.lists(st.integers(0, 5), max_size=120), st.integers(1, 60))
def test_a_rolling_hash_depends_on_its_numbers_only(ids, n):
    ids = np.array(ids, np.int32)
    hashed = rolling_hashes(ids, n)
    assert len(hashed) == max(0, len(ids) - n + 1)
    runs = {}
    for place, value in enumerate(hashed.tolist()):
        assert runs.setdefault(tuple(ids[place : place + n].tolist()), value) == value
    assert len(set(runs.values())) == len(runs)


def test_letters_are_characters_after_nfc_and_a_syllable_is_three():
    assert letters("caf\u00e9").tolist() == letters("cafe\u0301").tolist() == [99, 97, 102, 233]
    decomposed = unicodedata.normalize("NFD", "\ud30c\uc77c a")
    assert letters(decomposed).tolist() == letters("\ud30c\uc77c a").tolist() and len(letters(decomposed)) == 8


@settings(max_examples=60)
@given(st.text("abc ", max_size=80), st.text("abc ", max_size=80), st.text("abcdefgh", min_size=SHARED, max_size=90))
def test_texts_that_share_enough_letters_share_a_fingerprint(before, after, common):
    assert fingerprints(before + common) & fingerprints(common + after)


@pytest.mark.parametrize("text", ["", "x" * (SHARED - 1)])
def test_short_texts_have_none(text):
    assert fingerprints(text) == set()


def test_few_of_the_hashes_are_kept():
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 20_000)))
    assert len(fingerprints(text)) < 20_000 * 2.5 / SPARSE
