"""Signatures by rensa, compared with exact Jaccard and the arithmetic of bands."""

from __future__ import annotations

import itertools
import math
import sys
import unicodedata
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.check import minhash
from tunesmith.data.check.minhash import SHINGLE, SLOTS, candidates, estimates, recall, row_text, shingles, signatures
from tunesmith.data.read import builtin
from tunesmith.data.rows import Chat, PromptCompletion, Ranking, Text
from tunesmith.errors import MissingExtra


@cache
def pieces(text):
    """The shingles as strings: of characters after NFC, of which a Hangul syllable or an ideograph counts three times."""
    characters = unicodedata.normalize("NFC", text.casefold())
    text = "".join(one * (3 if ord(one) >= 0x2E80 else 1) for one in characters).ljust(SHINGLE, "\0")
    return {text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)}


def exact(one, other):
    return len(pieces(one) & pieces(other)) / len(pieces(one) | pieces(other))


@settings(max_examples=40)
@given(st.text(max_size=40), st.text(max_size=40))
def test_the_hashed_similarity_is_that_of_the_strings(one, other):
    hashed = minhash.jaccard(np.unique(shingles(one)), np.unique(shingles(other)))
    assert hashed == exact(one, other)


def test_estimates_are_those_of_minhash():
    rng = np.random.default_rng(0)
    texts = real_texts(150)
    changed = [change(text, rng, share) for text, share in zip(texts, rng.uniform(0, 0.4, len(texts)))]
    slots = signatures([*texts, *changed])
    number = np.arange(len(texts))
    true = np.array([exact(*pair) for pair in zip(texts, changed)])
    off = estimates(slots, number, number + len(texts)) - true
    assert true.min() < 0.3 and true.max() > 0.95
    expected = math.sqrt((true * (1 - true)).mean() / SLOTS)  # of independent slots; R-MinHash is a little better
    assert 0.6 * expected < math.sqrt((off**2).mean()) < 1.1 * expected
    assert abs(off.mean()) < 3 * expected / math.sqrt(len(off))
    assert off.min() > -5 * expected  # what lowest_estimate relies on


@cache
def real_texts(count):
    """Questions and answers about Python's library, each longer than 80 characters."""
    texts = (f"{row['instruction']} {row['response']}" for row, _ in builtin.rows("builtin:docstrings"))
    return list(itertools.islice((text for text in texts if len(text) > 80), count))


def change(text, rng, share):
    """``text`` with a share of its words replaced."""
    return " ".join(f"w{rng.integers(10**6)}" if rng.random() < share else word for word in text.split())


def test_signatures_are_the_same_on_every_machine_and_in_any_order():
    text = "The quick brown fox. 빠른 갈색 여우는 게으른 개를 뛰어넘는다. def fox(self): return 1"
    (slots,) = signatures([text])
    assert slots[:4].tolist() == [1385412145, 1537858126, 316881833, 1017807125]
    assert (signatures(["other", text, "x"])[1] == slots).all()
    assert (signatures([f"{text} {text}"]) == signatures([f"{text} {text} {text}"])).all()  # the same set


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_what_is_promised_and_are_as_long_as_may_be(threshold):
    bands, size = minhash.choose_bands(threshold)
    assert bands * size <= SLOTS and recall(threshold, bands, size) >= minhash.RECALL
    assert size == SLOTS or recall(threshold, SLOTS // (size + 1), size + 1) < minhash.RECALL


def test_the_share_found_follows_the_formula(monkeypatch):
    """Signatures whose slots are equal by independent chances, as MinHash has it, at a similarity where bands miss many."""
    rng = np.random.default_rng(1)
    pairs, similarity = 2000, 0.56
    one = rng.integers(0, 2**32, (pairs, SLOTS), dtype=np.uint32)
    other = np.where(rng.random(one.shape) < similarity, one, rng.integers(0, 2**32, one.shape, dtype=np.uint32))
    slots = np.concatenate([one, other])
    monkeypatch.setattr(minhash, "lowest_estimate", lambda threshold: 0)
    found, _ = candidates(slots, np.arange(len(slots)), 0.8)
    share = recall(similarity, *minhash.choose_bands(0.8))
    assert 0.5 < share < 0.95 and abs(len(found) / pairs - share) < 0.03
    assert (found[:, 1] == found[:, 0] + pairs).all()


def test_a_bucket_of_many_rows_does_not_cost_its_square():
    slots = np.random.default_rng(2).integers(0, 2**32, (1, SLOTS), dtype=np.uint32).repeat(300, 0)
    found, similar = candidates(slots, np.arange(300), 0.8)
    assert 299 <= len(found) <= minhash.COMPARED * 300 and (similar == 1).all()
    assert set(map(tuple, found.tolist())) >= {(row, row + 1) for row in range(299)}  # a chain that joins them all


def test_of_nothing_there_are_no_candidates():
    for count in (0, 1):
        found, similar = candidates(np.zeros((count, SLOTS), np.uint32), np.arange(count), 0.8)
        assert found.shape == (0, 2) and len(similar) == 0


def test_words_of_a_row_leave_out_system_prompts_and_tools():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}
    chat = Chat(
        ({"role": "system", "content": "Be brief."}, {"role": "user", "content": " Add\n\n one "}, call), ({"name": "t"},)
    )
    assert row_text(chat) == 'Add one add {"a": 1}'
    assert row_text(PromptCompletion("a ", " b")) == "a b" and row_text(Text("c\td")) == "c d"
    assert row_text(Ranking("q", ("a", "b"), (1, 0), (3.0, 4.5))) == "q a b"


@pytest.mark.parametrize("text", ["하루가 또 가네요", "네", "Café, Ärger", "がぎぐ"])
def test_composed_and_decomposed_text_is_the_same(text):
    decomposed = unicodedata.normalize("NFD", text)
    assert decomposed != text == row_text(Text(decomposed))
    assert (shingles(decomposed) == shingles(text)).all() and minhash.digest(decomposed) == minhash.digest(text)


@pytest.mark.parametrize(
    ("one", "other", "similarity"),
    [
        ("물이 좋아요", "불이 좋아요", 0.6),  # "I like water" and "I like fire", 0.8 by letters of decomposed syllables
        ("강아지가 물을 마셔요", "강아지가 물을 마셨어요", 0.56),
    ],
)
def test_korean_syllables_are_compared_whole(one, other, similarity):
    assert minhash.jaccard(np.unique(shingles(one)), np.unique(shingles(other))) == pytest.approx(similarity, abs=0.01)


def test_without_rensa_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(MissingExtra, match=r"tunesmith\[dedup\]"):
        signatures(["a"])
