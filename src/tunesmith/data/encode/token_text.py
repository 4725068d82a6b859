"""Text of token ids: exact bytes, from a table.

A tokenizer's own ``decode`` takes ten times as long. It returns a replacement character for a token that is
only a part of a character.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
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
        self._alphabet = _byte_alphabet() if b"ByteLevel" in state else {}
        self._content = np.empty(0, np.uint8)  # bytes of the tokens seen so far, one after another
        self._start = np.full(1, -1, np.int64)  # of each token in them; -1: not seen yet
        self._size = np.zeros(1, np.int64)

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of one sequence of tokens."""
        return self.decode_rows(ids, [len(ids)])[0]

    def decode_rows(self, ids: np.ndarray, sizes: Sequence[int]) -> list[str]:
        """Return the text of each row. ``ids``: the rows' tokens one after another; ``sizes``: tokens of each."""
        self._learn(ids)
        size = self._size[ids]
        past = np.cumsum(size)
        at = np.repeat(self._start[ids] - past + size, size)  # of each byte in the table, less its own place
        content = self._content[at + np.arange(len(at))].tobytes()
        ends = np.concatenate([[0], past])[np.cumsum([0, *sizes])].tolist()
        return [_text(content[begin:end]) for begin, end in pairwise(ends)]

    def _learn(self, ids: np.ndarray) -> None:
        """Add the bytes of tokens that were not seen before to the table."""
        missing = int(ids.max(initial=0)) + 1 - len(self._start)
        if missing > 0:
            self._start = np.concatenate([self._start, np.full(missing, -1, np.int64)])
            self._size = np.concatenate([self._size, np.zeros(missing, np.int64)])
        new = np.unique(ids[self._start[ids] < 0])
        pieces = [self._piece(number) for number in new.tolist()]
        self._size[new] = [len(piece) for piece in pieces]
        self._start[new] = len(self._content) + np.cumsum(self._size[new]) - self._size[new]
        self._content = np.concatenate([self._content, np.frombuffer(b"".join(pieces), np.uint8)])

    def _piece(self, number: int) -> bytes:
        if number in self._special:
            return b"\0"
        if number in self._added:
            return self._added[number].encode()
        token = self._tokenizer.convert_ids_to_tokens(number)
        if self._alphabet and self._alphabet.keys() >= set(token):
            return bytes([self._alphabet[letter] for letter in token])
        if found := BYTE.fullmatch(token):
            return bytes([int(found[1], 16)])
        once, twice = (self._tokenizer.decode([number] * times) for times in (1, 2))
        return twice[len(once) :].encode()  # some tokenizers drop the first space of a text


def _text(content: bytes) -> str:
    text = content.decode("utf-8", "replace").replace("\ufffd", "\0")
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in byte-level vocabularies (GPT-2).

    A printable character is its own byte; the other bytes are written as characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
