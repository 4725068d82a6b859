"""From the texts of a row to tokens, the way anybody's pipeline will send them: by the tokenizer's own special tokens.

Encoders join two texts by their separator and tell them apart by token types. Decoders have neither: joined plainly, the last
word of the one and the first of the other could become one token, so a named template stands between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_TEMPLATE = "{text}\n\n{text_pair}"
"""How two texts become one for a network without a separator token."""

NO_TEXT = ("\u00ff", "\u00fe", "\u00f7")
"""What byte-level vocabularies call the bytes FF, FE and F7, which UTF-8 never has."""

Example = dict[str, np.ndarray]


def separates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts something between two texts."""
    return bool(
        tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
    )


def encode(
    texts: Sequence[tuple[str, str | None]], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[Example]:
    """``input_ids`` int32 and, where the tokenizer has them, ``token_type_ids`` uint8 of each text or pair of texts."""
    if not separates(tokenizer):
        texts = [(one if other is None else joined(one, other, template), None) for one, other in texts]
    typed = "token_type_ids" in tokenizer.model_input_names
    out: list[Example] = [{} for _ in texts]
    for paired in (False, True):
        chosen = [index for index, (_, other) in enumerate(texts) if (other is not None) is paired]
        if not chosen:
            continue
        first = [texts[index][0] for index in chosen]
        second = [texts[index][1] for index in chosen] if paired else None
        found = tokenizer(
            first, second, add_special_tokens=True, padding=False, truncation=False, return_attention_mask=False,
            return_token_type_ids=typed, verbose=False,
        )  # fmt: skip
        for place, index in enumerate(chosen):
            out[index]["input_ids"] = np.array(found["input_ids"][place], np.int32)
            if typed:
                out[index]["token_type_ids"] = np.array(found["token_type_ids"][place], np.uint8)
    return out


def joined(text: str, pair: str, template: str) -> str:
    """Both texts in ``template``; braces in the texts are text."""
    return template.replace("{text_pair}", "\0").replace("{text}", text).replace("\0", pair)


def ending(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that close every row; a row that was cut is closed by them too."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(
        (at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain), None
    )
    return () if start is None else tuple(whole[start + len(plain) :])


def own_padding(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> str:
    """Give ``tokenizer`` a padding token that never ends a row, and return it. ``rows``: of the embedding, which must hold it.

    transformers' decoder classes take the last token that is not the padding one for a row's end. Where padding is also the
    end of text, or is missing, another special token stands in: one that this tokenizer writes nowhere by itself. Where there
    is none (gpt2's) it is the token of a byte that no text has.
    """
    from tokenizers import AddedToken

    written = {*tokenizer("a")["input_ids"], tokenizer.eos_token_id, tokenizer.bos_token_id}
    vocabulary = tokenizer.get_vocab()
    specials = [
        tokenizer.pad_token,
        tokenizer.unk_token,
        *(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special),
    ]
    for token in specials:
        number = vocabulary.get(token)
        if number is not None and number not in written and (rows is None or number < rows):
            tokenizer.pad_token = token
            return str(token)
    for token in NO_TEXT:
        number = vocabulary.get(token)
        if number is not None and tokenizer.decode([number]) == "\ufffd" and (rows is None or number < rows):
            # a letter of this name stays text, as in Ha\u00ff: only where it stands alone it is the token
            tokenizer.add_special_tokens(
                {"pad_token": AddedToken(token, single_word=True, normalized=False, special=True)}
            )
            return token
    raise ModelError(
        "the tokenizer has no token that could be padding: its special tokens begin or end a row, where a stock model would take "
        "padding for text, or have no row in the embedding.\n  Take another model, or a copy of this one whose tokenizer has a "
        "pad_token of its own in the embedding."
    )
