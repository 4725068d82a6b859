"""Dialogues in one text, ``"\\n\\nHuman: ... \\n\\nAssistant: ..."``, as hh-rlhf writes them (Bai et al. 2022,
arXiv:2204.05862)."""

from __future__ import annotations

import re

from tunesmith.data.formats.fields import FieldFault, require_text
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Message

NONEMPTY_ANSWER = "an answer with something in it"
"""The ``expected`` text of the error for an empty answer; ``data lint`` counts such rows by this text."""

DIALOGUE = re.compile(r"\s*Human:")
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
"""Speaker labels."""


def is_dialogue(text: str) -> bool:
    """Return True if a text is a whole conversation, with a prompt and an answer."""
    return bool(DIALOGUE.match(text)) and "\n\nAssistant:" in text


def parse_dialogue(text: str, field: str) -> list[Message]:
    """Return the turns of ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``, without the spaces around them."""
    before, *parts = SPEAKER.split(text)
    if before.strip():
        raise FieldFault(field, "a dialogue that begins with Human:", shorten(before), "Write the speaker.")
    messages: list[Message] = []
    turns = list(zip(parts[::2], parts[1::2]))
    for number, (speaker, content) in enumerate(turns, 1):
        if not content.strip():
            is_answer = number == len(turns) and speaker == "Assistant"
            expected = NONEMPTY_ANSWER if is_answer else f"what {speaker} says"
            fix = f"Fill turn {number} in or delete the row."
            raise FieldFault(f"{field}[{number - 1}]", expected, "empty text", fix)
        role = "user" if speaker == "Human" else "assistant"
        messages.append({"role": role, "content": require_text(content, field).strip()})
    return messages
