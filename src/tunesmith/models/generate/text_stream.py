"""Convert tokens to text as they arrive: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TextStream:
    """The text of one growing answer.

    ``add`` and ``finish`` return the text that has become final; joined, it is ``text``. A character of
    several tokens becomes final with its last token. Text that may be the start of a stop string becomes
    final when the string can no longer follow. ``stopped``: a stop string was found; ``text`` ends before it.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_strings: Sequence[str] = ()
    stopped: bool = False
    text: str = ""
    _ids: list[int] = field(default_factory=list)
    _context: int = 0
    _decoded: int = 0
    _held: str = ""

    def add(self, token: int) -> str:
        """Add a token and return the text that has become final."""
        self._ids.append(token)
        new = self._new_text()
        if not new or new.endswith("\ufffd"):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._release(new)

    def finish(self) -> str:
        """Return the rest of the text, when no token follows."""
        rest = self._release(self._new_text())
        if not self.stopped:
            self.text += self._held
            rest, self._held = rest + self._held, ""
        return rest

    def _new_text(self) -> str:
        """Decode the new tokens after the few before them, on which spaces and split characters depend."""
        before, now = (
            self.tokenizer.decode(part, skip_special_tokens=True)
            for part in (self._ids[self._context : self._decoded], self._ids[self._context :])
        )
        return str(now[len(before) :])

    def _release(self, new: str) -> str:
        """Return the final part of the held text and ``new``, and hold the rest."""
        waiting = self._held + new
        places = [place for stop in self.stop_strings if (place := waiting.find(stop)) >= 0]
        if places:
            self.stopped, certain, self._held = True, waiting[: min(places)], ""
        else:
            kept = max((_overlap(waiting, stop) for stop in self.stop_strings), default=0)
            certain, self._held = waiting[: len(waiting) - kept], waiting[len(waiting) - kept :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
