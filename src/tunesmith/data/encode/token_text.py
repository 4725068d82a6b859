"""Text of token ids: exact bytes, from a table.

A tokenizer's own ``decode`` takes ten times as long. It returns a replacement character for a token that is
only a part of a character.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""Name of a token that is one byte, in vocabularies with byte fallback."""


class TokenText:
    """Text of tokens, after NFC. Special tokens, and bytes that form no character, become U+0000."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        decoder = tokenizer.backend_tokenizer.decoder
        state = b"" if decoder is None else decoder.__getstate__()  # the decoder as JSON
        self._bytes = _byte_alphabet() if b"ByteLevel" in state else {}
        self._pieces: dict[int, bytes] = {}

    def decode(self, ids: np.ndarray) -> str:
        numbers, pieces = ids.tolist(), self._pieces
        try:
            content = b"".join([pieces[number] for number in numbers])
        except KeyError:
            for number in {*numbers} - pieces.keys():
                pieces[number] = self._piece(number)
            content = b"".join([pieces[number] for number in numbers])
        text = content.decode("utf-8", "replace").replace("\ufffd", "\0")
        return text if text.isascii() else unicodedata.normalize("NFC", text)

    def _piece(self, number: int) -> bytes:
        if number in self._special:
            return b"\0"
        if number in self._added:
            return self._added[number].encode()
        token = self._tokenizer.convert_ids_to_tokens(number)
        if self._bytes and all(letter in self._bytes for letter in token):
            return bytes(self._bytes[letter] for letter in token)
        if found := BYTE.fullmatch(token):
            return bytes([int(found[1], 16)])
        once, twice = (self._tokenizer.decode([number] * times) for times in (1, 2))
        return twice[len(once) :].encode()  # some tokenizers drop the first space of a text


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in byte-level vocabularies (GPT-2).

    A printable character is its own byte; the other bytes are written as characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
