"""The text of tokens by table is that of the tokenizer, for byte-level, byte-fallback and word-piece vocabularies."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from tunesmith.data.encode.token_text import TokenText

TEXTS = ["the quick brown fox, 0123!", "안녕하세요 질문 답변", "naïve café 🙂 日本", "a\n\n  b\tc"]


def sentence_pieces():
    """A vocabulary with byte fallback and a mark for spaces, as Llama 2 and Gemma have."""
    words = ["\u2581the", "\u2581quick", "\u2581", "a", "b", "c", "안", "녕"]
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {w: 257 + n for n, w in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), sentence_pieces()], ids=["byte level", "byte fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    assert TokenText(tokenizer).decode(ids) == text
    decomposed = np.array(tokenizer(unicodedata.normalize("NFD", text), add_special_tokens=False)["input_ids"])
    assert TokenText(tokenizer).decode(decomposed) == unicodedata.normalize("NFC", text)


def test_word_pieces_are_joined_and_words_apart():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "ball": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert TokenText(fast).decode(np.array([1, 2, 3])) == " playing ball"


def test_special_tokens_and_parts_of_characters_are_breaks():
    tokenizer = tiny_tokenizer()
    syllable = tokenizer("힣", add_special_tokens=False)["input_ids"]
    assert len(syllable) > 1
    ids = [tokenizer.eos_token_id, *tokenizer("fox")["input_ids"], *syllable[:-1]]
    text = TokenText(tokenizer).decode(np.array(ids))
    assert text.startswith("\0fox") and set(text[4:]) == {"\0"}


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), sentence_pieces()], ids=["byte level", "byte fallback"])
def test_rows_decoded_together_have_the_text_of_each(tokenizer):
    rows = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in ("the 힣", "힣", "", *TEXTS)]
    rows[0], rows[1] = rows[0][:-1], rows[1][-1:]  # a syllable whose bytes end in the next row
    together = TokenText(tokenizer).decode_rows(np.concatenate(rows), [len(row) for row in rows])
    assert together == [TokenText(tokenizer).decode(row) for row in rows] and together[3:] == TEXTS
    assert together[0].endswith("\0") and "힣" not in together[0] + together[1]
