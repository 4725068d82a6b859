"""The row types: what one line of somebody's data means, whatever file it came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""One turn: ``role`` and ``content``, and what else the chat template reads (``tool_calls``, ``reasoning_content``, ``name``)."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document, learnt whole."""

    text: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that the chat template renders. ``tools`` are the function schemas offered to the assistant."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Plain strings with no template: the completion follows the prompt directly."""

    prompt: str
    completion: str


Row = Text | Chat | PromptCompletion


def digest(row: Row) -> int:
    """64 bits of what a row says; two rows with the same words have the same digest, whatever files they came from."""
    return int.from_bytes(hashlib.blake2b(repr(row).encode("utf-8", "backslashreplace"), digest_size=8).digest(), "little")
