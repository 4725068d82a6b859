"""The row types: the meaning of one row of data, independent of the file that it came from."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass, field, replace

from tunesmith.json_types import JsonObject

Message = JsonObject
"""One turn: ``role``, ``content``, and other keys that the chat template reads, such as ``tool_calls``.

``weight`` is 0 in a turn of the assistant that is context only; other turns have no such key."""

TextOrTurns = str | tuple[Message, ...]
"""A prompt or an answer: plain text without a chat template, or turns."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document. All of its tokens are supervised."""

    text: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that the chat template renders. ``tools``: function schemas offered to the assistant."""

    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Two texts without a chat template. The completion follows the prompt directly."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, to classify.

    Single-label rows set ``label`` (the name of a class, or a number). Multi-label rows set ``labels`` (names
    of all labels that hold, possibly none). Rows to predict set neither. ``known``: every label that the file
    marks as holding or not holding; it takes no part in comparisons."""

    text: str
    text_pair: str | None = None
    label: str | float | None = None
    labels: tuple[str, ...] | None = None
    known: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Tagged:
    """A text with one tag per word. ``words``: (start, end) of each word in characters of ``text``, ordered,
    not overlapping; where spaces have tags, they are words as well. ``tags``: None = to predict."""

    text: str
    words: tuple[tuple[int, int], ...]
    tags: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a text. ``answers``: (text, position of its first character in ``context``), several
    where annotators differ; empty = the context has none; None = to predict. ``id``: name in the data set."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """A prompt and several ranked answers. A preference pair is a ranking of two.

    Prompt and answers are all turns or all plain text. ``ranks``: rank of each answer, 0 = best, equal = no
    preference. ``scores``: score of each answer, higher = better, if known. ``tools``: as in Chat."""

    prompt: TextOrTurns
    answers: tuple[TextOrTurns, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    tools: tuple[JsonObject, ...] = ()

    def written(self) -> list[Chat] | list[PromptCompletion]:
        """Each answer after the prompt, as a row of supervised fine-tuning."""
        if isinstance(self.prompt, str):
            return [PromptCompletion(self.prompt, str(answer)) for answer in self.answers]
        return [Chat((*self.prompt, *turns(answer)), self.tools) for answer in self.answers]

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for every two answers of different rank, as indices of ``answers``."""
        indices = range(len(self.answers))
        return [(a, b) for a in indices for b in indices if self.ranks[a] < self.ranks[b]]


@dataclass(frozen=True, slots=True)
class Judged:
    """A prompt, one response, and whether the response is desirable: a row of unpaired preference data.

    ``desirable``: None = unknown. ``tools``: as in Chat."""

    prompt: TextOrTurns
    response: TextOrTurns
    desirable: bool | None
    tools: tuple[JsonObject, ...] = ()

    def ranking(self) -> Ranking:
        """The response as a ranking of one answer."""
        return Ranking(self.prompt, (self.response,), (0,), tools=self.tools)

    def written(self) -> list[Chat] | list[PromptCompletion]:
        """The response after its prompt, as a row of supervised fine-tuning."""
        return self.ranking().written()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that the policy answers while it is trained.

    A text becomes a turn of the user where the tokenizer has a chat template, else it is continued.
    ``columns``: the other columns of the row as plain JSON, such as a reference answer; rewards read them.
    ``tools``: as in Chat."""

    prompt: TextOrTurns
    columns: JsonObject = field(default_factory=dict)
    tools: tuple[JsonObject, ...] = ()

    def asked(self, has_template: bool) -> Text | Chat:
        """The prompt as a row without an answer. ``has_template``: the tokenizer has a chat template."""
        if not isinstance(self.prompt, str):
            return Chat(self.prompt, self.tools)
        return Chat(({"role": "user", "content": self.prompt},)) if has_template else Text(self.prompt)


Written = Text | Chat | PromptCompletion
"""Rows that train a language model to write."""

Answered = Ranking | Judged
"""Rows with a prompt and answers to it. ``written`` returns each answer after the prompt."""

Row = Written | Labelled | Tagged | Question | Answered | Prompt

ROW_TYPES: tuple[type, ...] = (
    Chat,
    PromptCompletion,
    Text,
    Labelled,
    Tagged,
    Question,
    Ranking,
    Judged,
    Prompt,
)


def turns(part: TextOrTurns) -> tuple[Message, ...]:
    """The turns of a prompt or an answer; plain text has none."""
    return () if isinstance(part, str) else part


def without_gold(row: Row) -> Row:
    """``row`` without its label, tags, answers, ranks or judgement."""
    if isinstance(row, Labelled):
        return replace(row, label=None, labels=None)
    if isinstance(row, Tagged):
        return replace(row, tags=None)
    if isinstance(row, Ranking):
        return replace(row, ranks=(0,) * len(row.answers), scores=None)
    if isinstance(row, Judged):
        return replace(row, desirable=None)
    return replace(row, answers=None) if isinstance(row, Question) else row


def row_text(row: Row) -> str:
    """Return a row as a person reads it: prompt, answers and label below each other; turns begin with their role."""
    match row:
        case Text(text) | Tagged(text):
            parts: tuple[TextOrTurns | None, ...] = (text,)
        case Labelled(text, pair, label, labels):
            known = label if labels is None else ", ".join(labels)
            parts = (text, pair, None if known is None else f"→ {known}")
        case Question(question, context, answers):
            parts = (question, context, *(f"→ {text}" for text, _ in (answers or ())[:1]))
        case PromptCompletion(prompt, completion):
            parts = (prompt, completion)
        case Chat(messages):
            parts = (messages,)
        case Ranking(prompt, all_answers):
            parts = (prompt, *all_answers)
        case Judged(prompt, response):
            parts = (prompt, response)
        case _:
            parts = (row.prompt,)
    return "\n\n".join(part if isinstance(part, str) else _lines(part) for part in parts if part)


def _lines(messages: tuple[Message, ...]) -> str:
    return "\n\n".join(f"{turn.get('role')}: {turn.get('content') or ''}" for turn in messages)


def digest(row: Row) -> int:
    """A 64-bit hash of a row's content. Equal rows of different files have the same digest."""
    content = repr(row).encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def group_key(row: Row) -> int:
    """Return a 64-bit hash of a row's prompt. Rows with the same key are held out or trained on together.

    The hash covers the characters of the prompt after NFC, without case and white space.
    """
    text = " ".join(unicodedata.normalize("NFC", _asked(row)).casefold().split())
    content = text.encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _asked(row: Row) -> str:
    """Return the prompt of the last answer; for a Question its context; else the whole text."""
    match row:
        case Text(text) | Tagged(text) | Question(context=text):
            return text
        case Labelled(text, pair):
            return f"{text}\n{pair or ''}"
        case PromptCompletion(prompt, completion):
            return prompt if prompt.strip() else completion
        case Chat(messages):
            answers = [index for index, turn in enumerate(messages) if turn.get("role") == "assistant"]
            return _turns_text(messages[: answers[-1]] if answers and answers[-1] else messages)
    return row.prompt if isinstance(row.prompt, str) else _turns_text(row.prompt)


def _turns_text(messages: tuple[Message, ...]) -> str:
    """Return role and content of each turn, and its other keys as JSON."""
    parts = []
    for turn in messages:
        others = {key: value for key, value in turn.items() if key not in ("role", "content") and value}
        parts += [str(turn.get("role")), str(turn.get("content") or "")]
        parts += [json.dumps(others, sort_keys=True, ensure_ascii=False, default=str)] if others else []
    return "\n".join(parts)
