"""The row types: what one line of somebody's data means, whatever file it came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or two, to be classified. What is known of it is one of: ``label``, the name of its class or a number; ``labels``,
    the names of all that hold (maybe none); or neither, when it is to be predicted. ``known``: all labels that its file speaks
    of where it writes down which hold and which do not; what the row says is the same without."""

    text: str
    text_pair: str | None = None
    label: str | float | None = None
    labels: tuple[str, ...] | None = None
    known: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Tagged:
    """A text whose words have tags. ``words``: (start, end) of each in characters of ``text``, in order, not overlapping; where
    spaces are tagged too, they are words. ``tags``: one for each word, None when they are to be predicted."""

    text: str
    words: tuple[tuple[int, int], ...]
    tags: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a text. ``answers``: (text, its first character in ``context``), several when people answered
    differently; empty = the context does not say; None = to be predicted. ``id``: what the data set calls the question."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """A prompt and several answers to it, judged. A preference is a ranking of two.

    ``prompt``: the turns before the answer, or a text to continue. ``answers``: of each the turns that follow, or the text.
    ``ranks``: of each answer, 0 = best; equal = no preference between them. ``scores``: of each answer, higher = better, where
    they are known. ``tools`` as in Chat."""

    prompt: str | tuple[Message, ...]
    answers: tuple[str, ...] | tuple[tuple[Message, ...], ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()

    def written(self) -> list[Chat] | list[PromptCompletion]:
        """Each answer with its prompt before it, as a row that a language model learns to write."""
        if isinstance(self.prompt, str):
            return [PromptCompletion(self.prompt, str(answer)) for answer in self.answers]
        return [Chat((*self.prompt, *turns(answer)), self.tools) for answer in self.answers]

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) of every two answers whose ranks differ, as places in ``answers``."""
        places = range(len(self.answers))
        return [(one, other) for one in places for other in places if self.ranks[one] < self.ranks[other]]


@dataclass(frozen=True, slots=True)
class Judged:
    """A prompt, one response, and whether the response is desirable: a row of unpaired preference.

    ``prompt``, ``response`` and ``tools`` as in Ranking, with one answer. ``desirable``: None = not known."""

    prompt: str | tuple[Message, ...]
    response: str | tuple[Message, ...]
    desirable: bool | None
    tools: tuple[dict[str, Any], ...] = ()

    def ranking(self) -> Ranking:
        """The same response as a ranking of one."""
        answers: Any = (self.response,)  # a tuple of one text, or of one tuple of turns
        return Ranking(self.prompt, answers, (0,), tools=self.tools)

    def written(self) -> list[Chat] | list[PromptCompletion]:
        """The response after its prompt, as a row that a language model learns to write."""
        return self.ranking().written()


Written = Text | Chat | PromptCompletion
"""What a language model learns to write."""

Answered = Ranking | Judged
"""A prompt with answers to it; ``written`` gives each answer after the prompt."""

Row = Written | Labelled | Tagged | Question | Answered


def turns(said: str | tuple[Message, ...]) -> tuple[Message, ...]:
    """A prompt or an answer as turns; plain text has none."""
    return () if isinstance(said, str) else said


def without_gold(row: Row) -> Row:
    """``row`` as somebody has it who does not know the answer."""
    if isinstance(row, Labelled):
        return replace(row, label=None, labels=None)
    if isinstance(row, Tagged):
        return replace(row, tags=None)
    if isinstance(row, Ranking):
        return replace(row, ranks=(0,) * len(row.answers), scores=None)
    if isinstance(row, Judged):
        return replace(row, desirable=None)
    return replace(row, answers=None) if isinstance(row, Question) else row


def digest(row: Row) -> int:
    """64 bits of what a row says; two rows with the same words have the same digest, whatever files they came from."""
    return int.from_bytes(
        hashlib.blake2b(repr(row).encode("utf-8", "backslashreplace"), digest_size=8).digest(), "little"
    )
