"""Tokenizer calls, texts for classification, and their padding token.

An encoder's tokenizer joins two texts by its separator and tells them apart by token types. A decoder's has
neither: joined directly, words of the two texts could become one token. So a template separates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch.pack import Example
from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

PAIR_TEMPLATE = "{text}\n\n{text_pair}"  # how two texts become one for a tokenizer without a separator
BYTES_OF_NO_TEXT = ("\u00ff", "\u00fe", "\u00f7")
"""Tokens of the bytes FF, FE and F7 in byte-level vocabularies. UTF-8 never has these bytes."""


def call_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    first: Sequence[str],
    second: Sequence[str] | None = None,
    special_tokens: bool = False,
) -> BatchEncoding:
    """Tokenise texts, or pairs of texts, in one call; nothing is cut or padded.

    With ``special_tokens``, also ``token_type_ids`` if the tokenizer has them.
    """
    types = special_tokens and has_token_types(tokenizer)
    return tokenizer(
        list(first), second and list(second), add_special_tokens=special_tokens, return_token_type_ids=types,
        return_attention_mask=False, padding=False, truncation=False, verbose=False,
    )  # fmt: skip


def has_token_types(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the model takes ``token_type_ids``."""
    return "token_type_ids" in tokenizer.model_input_names


def has_separator(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer puts a special token between two texts."""
    pair = tokenizer.num_special_tokens_to_add(pair=True)
    return bool(pair > tokenizer.num_special_tokens_to_add(pair=False))


def encode(
    texts: Sequence[tuple[str, str | None]], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[Example]:
    """``input_ids`` int32 and, if the tokenizer has them, ``token_type_ids`` uint8 of each text or pair."""
    if not has_separator(tokenizer):
        texts = [(text if pair is None else join_pair(text, pair, template), None) for text, pair in texts]
    out: list[Example] = [{} for _ in texts]
    for paired in (False, True):
        chosen = [index for index, (_, pair) in enumerate(texts) if (pair is not None) is paired]
        if not chosen:
            continue
        second = [pair for index in chosen if (pair := texts[index][1]) is not None] if paired else None
        encoded = call_tokenizer(
            tokenizer, [texts[index][0] for index in chosen], second, special_tokens=True
        )
        for name, dtype in (("input_ids", np.int32), ("token_type_ids", np.uint8)):
            for index, values in zip(chosen, encoded.get(name, ())):
                out[index][name] = np.array(values, dtype)
    return out


def join_pair(text: str, pair: str, template: str) -> str:
    """Put both texts into ``template``; braces in the texts stay as they are."""
    return template.replace("{text_pair}", "\0").replace("{text}", text).replace("\0", pair)


def set_padding_token(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> str:
    """Give ``tokenizer`` a padding token below ``rows`` (of the embedding) that never ends a row; return it.

    transformers' decoder classes read the last token that is not padding. So if the padding token is missing,
    or is the end token, another special token takes over: one that the tokenizer does not write by itself. A
    tokenizer without one (gpt2) gets the token of a byte that no text has. Raises ModelError.
    """
    from tokenizers import AddedToken

    written = {*tokenizer("a")["input_ids"], tokenizer.eos_token_id, tokenizer.bos_token_id}
    vocabulary = tokenizer.get_vocab()

    def embedded(token: str | None) -> bool:
        number = vocabulary.get(token)
        return number is not None and number not in written and (rows is None or number < rows)

    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in (tokenizer.pad_token, tokenizer.unk_token, *added):
        if embedded(token):
            tokenizer.pad_token = token
            return str(token)
    for token in BYTES_OF_NO_TEXT:
        if embedded(token) and tokenizer.decode([vocabulary[token]]) == "\ufffd":
            # single_word: inside a word, as in Ha\u00ff, the letter of this name stays text
            pad = AddedToken(token, single_word=True, normalized=False, special=True)
            tokenizer.add_special_tokens({"pad_token": pad})
            return token
    raise ModelError(
        "the tokenizer has no token that could be padding: its special tokens begin or end a row, where a stock model would read "
        "padding as text, or have no row in the embedding.\n  Take another model, or a copy of this one whose tokenizer has a "
        "pad_token of its own in the embedding."
    )
