"""Masks are found by bisection; here they are compared with those made from the offsets of all tokens."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CORPUS, SPECIAL, tiny_tokenizer
from tunesmith.data.encode.conversations import Rendered, tokenise
from tunesmith.data.encode.spans import END, Span
from tunesmith.data.encode.templates import Renderer


def trained(model, trainer, pre, normalizer=None, post=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    if post is not None:
        tokenizer.post_processor = post
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def options(**more):
    return dict(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False, **more)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = {
    "byte-level, spaces trimmed": tiny_tokenizer(),
    "byte-level with a first space": trained(
        models.BPE(),
        trainers.BpeTrainer(**options()),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        post=processors.ByteLevel(trim_offsets=True, add_prefix_space=True),
    ),
    "word pieces, letters folded": trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(**options()),
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    ),
    "unigram, compatibility forms": trained(
        models.Unigram(),
        trainers.UnigramTrainer(**options(unk_token="<unk>")),
        pre_tokenizers.Metaspace(),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")]),
    ),
    "decomposed, with bytes for the unknown": trained(
        models.BPE(byte_fallback=True, unk_token="<unk>"),
        trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *SPECIAL, *BYTES], show_progress=False),
        pre_tokenizers.Split(" ", "merged_with_next"),
        normalizers.Sequence([normalizers.NFD(), normalizers.Prepend("_")]),
    ),
}
PIECES = [
    "a",
    " ",
    "  ",
    "\n",
    "The",
    "é",
    "e\u0301\u0323",
    "ﬁ",
    "½",
    "질문",
    "\u1100\u1161",
    "👋🏽",
    "<|im_end|>",
    "</s>",
    "\u200d",
    "ß",
    "İ",
    "_",
]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@example(pieces=["a", "</s>", "\n", "½"])  # a space put before the line break has no width, and begins behind what follows it
@given(pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=6))
def test_masks_are_those_of_all_offsets(kind, pieces):
    tokenizer, text = KINDS[kind], "".join(pieces)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [Span(start, end) for start in range(len(text) + 1) for end in [*range(start, len(text) + 1), END]]
    for span, made in zip(spans, tokenise([Rendered(text, (span,)) for span in spans], Renderer(tokenizer)), strict=True):
        assert made["input_ids"].tolist() == encoded["input_ids"]
        expected = [end > span.start and start < span.end for start, end in encoded["offset_mapping"]]
        assert made["supervised"].tolist() == expected, span
