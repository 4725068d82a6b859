"""Tokenizers of every kind, small: byte-level, pieces with ## or a mark for spaces, and one whose tokens reach across spaces."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CORPUS, encoder_tokenizer, tiny_tokenizer


def _trained(tokenizer: Tokenizer, kind: Any, **options: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS * 3, kind(vocab_size=400, show_progress=False, **options))
    return tokenizer


def _word_piece() -> PreTrainedTokenizerFast:
    """As bert's: lower case, no accents, white space lost, unknown characters lose their whole word."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _trained(tokenizer, trainers.WordPieceTrainer, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    ids = [("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def _metaspace() -> PreTrainedTokenizerFast:
    """As llama 2's: a mark stands for each space and before the text, a first token before everything, pairs too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    _trained(tokenizer, trainers.BpeTrainer, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _across() -> PreTrainedTokenizerFast:
    """Bytes, but nothing is split before: a token may hold the end of a word and the beginning of the next."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _trained(tokenizer, trainers.BpeTrainer, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


KINDS = {
    "bytes": tiny_tokenizer,
    "bytes after a first token": lambda: tiny_tokenizer(adds_bos=True),
    "bert": lambda: encoder_tokenizer("bert"),
    "roberta": lambda: encoder_tokenizer("roberta"),
    "word pieces": _word_piece,
    "metaspace": _metaspace,
    "across words": _across,
}
ENCODERS = ("bert", "roberta", "word pieces")


@lru_cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()
