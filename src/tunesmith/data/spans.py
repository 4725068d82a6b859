"""Where the assistant speaks in a rendered conversation, by construction, whatever the template.

A turn begins where the template's own generation prompt ends, and ends with the token that stops it. Both are found from
renderings of parts of the conversation. Where a template rewrites earlier turns (reasoning is stripped, say), the turn is
rendered once more with two private characters around its content, which show where it went.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from tunesmith.data.rows import Chat, Message
from tunesmith.data.templates import RENDER_ERRORS

END = 1 << 62
"""Past every text."""

OPEN, CLOSE = "\ue0f0", "\ue0f1"
"""Private-use characters that mark a turn's content in a trial rendering."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters ``start`` to ``end`` of the rendered text. ``stopped``: a special token closes them."""

    start: int
    end: int
    stopped: bool = True


class SpanError(Exception):
    """A turn whose place in the rendering cannot be made out."""

    def __init__(self, expected: str, got: str, fix: str) -> None:
        super().__init__(f"expected {expected}, got {got}. {fix}")
        self.expected, self.got, self.fix = expected, got, fix


class Render(Protocol):
    """The chat template over some turns, with the tokenizer's special tokens at hand."""

    eos: str | None
    specials: tuple[str, ...]

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any], prompt: bool = False) -> str: ...


def assistant_turns(messages: Sequence[Message]) -> list[int]:
    """Positions of the assistant's turns."""
    return [position for position, message in enumerate(messages) if message["role"] == "assistant"]


def find_span(render: Render, row: Chat, full: str, turn: int) -> Span:
    """The span of assistant turn ``turn`` in ``full``, the rendering of the whole row. Raises SpanError."""
    last = turn == len(row.messages) - 1
    upto = full if last else render(row.messages[: turn + 1], row.tools)
    shared = len(full) if last else _common(full, upto)
    start = _prompt_length(render, row, turn, full, shared)
    message = row.messages[turn]
    core = str(message.get("content") or "").strip()
    if message.get("tool_calls") or not core:
        if start is None or start > shared:
            raise _unclear(turn)
        return _closed_at_end(render, full, upto, start, shared, last)
    end = None if start is None else _content_end(full, start, shared, core)
    if start is None or end is None:
        marked = _marked(render, row, turn, full)
        start = marked[0] if start is None else start
        if start is None or marked[1] is None or start > marked[1]:
            raise _unclear(turn)
        end = marked[1]
    whole = shared == len(upto)
    if not whole:  # the two go apart inside or after this turn; what they share after the content is the turn's own
        shared = end + _shared_tail(render, row, turn, full, end)
    return _closed_after(render, full, start, end, shared, last, whole)


def _prompt_length(render: Render, row: Chat, turn: int, full: str, shared: int) -> int | None:
    """Length of what generation would be given before this turn, if ``full`` begins with exactly that."""
    if turn == 0:  # templates do not render an empty conversation
        return None
    try:
        prompt = render(row.messages[:turn], row.tools, prompt=True)
    except RENDER_ERRORS:  # a template may refuse turns that end with a tool's answer
        return None
    return len(prompt) if full.startswith(prompt) and len(prompt) <= shared else None


def _content_end(full: str, start: int, shared: int, core: str) -> int | None:
    """Where the content ends, if there is only one place it can be."""
    begin = start
    while begin < len(full) and full[begin].isspace():
        begin += 1
    if full.startswith(core, begin):
        return begin + len(core)
    first = full.find(core, start, shared)
    return first + len(core) if first >= 0 and full.find(core, first + 1, shared) < 0 else None


def _marked(render: Render, row: Chat, turn: int, full: str) -> tuple[int | None, int | None]:
    """(start, end) of the content in ``full``, from a rendering with marks around it; None for a mark that was lost."""
    content = str(row.messages[turn]["content"])
    core = content.strip()
    lead, trail = content[: content.index(core)], content[content.index(core) + len(core) :]
    message = {**row.messages[turn], "content": lead + OPEN + core + CLOSE + trail}
    try:
        text = render([*row.messages[:turn], message, *row.messages[turn + 1 :]], row.tools)
    except RENDER_ERRORS:
        return None, None
    if OPEN in full or CLOSE in full or text.replace(OPEN, "").replace(CLOSE, "") != full:
        return None, None
    if text.count(OPEN) > 1 or text.count(CLOSE) > 1:
        return None, None
    start, end = text.find(OPEN), text.find(CLOSE)
    return (start if start >= 0 else None), (end - (0 <= start < end) if end >= 0 else None)


def _shared_tail(render: Render, row: Chat, turn: int, full: str, end: int) -> int:
    """How many characters after the content are the turn's own: the same with and without what follows the turn."""
    alone = Chat(row.messages[: turn + 1], row.tools)
    upto = render(alone.messages, alone.tools)
    _, close = _marked(render, alone, turn, upto)
    if close is None:
        return 0
    return _common(upto[close:], full[end:])


def _closed_after(render: Render, full: str, start: int, end: int, shared: int, last: bool, whole: bool) -> Span:
    """The span that ends with the first special token after the content, or without one where the template writes none."""
    match = _pattern(render.specials).search(full, end, shared)
    if match:
        stop = match.end()
        while render.eos and match and match.group() != render.eos:  # <|im_end|></s>: the end token is learnt with it
            match = _pattern(render.specials).match(full, match.end(), shared)
            stop = match.end() if match and match.group() == render.eos else stop
        return Span(start, stop)
    if last:
        return Span(start, END, stopped=False)
    return Span(start, shared if whole else end, stopped=False)


def _closed_at_end(render: Render, full: str, upto: str, start: int, shared: int, last: bool) -> Span:
    """The span of a turn that ends with calls (or says nothing): special tokens inside it are no stops, those at its end are."""
    found = list(_pattern(render.specials).finditer(upto, start))
    trailing = []
    edge = len(upto)
    for match in reversed(found):
        if upto[match.end() : edge].strip():
            break
        trailing.append(match)
        edge = match.start()
    stops = [match for match in trailing if match.end() <= shared]
    if stops:
        closing = next((match for match in stops if match.group() == render.eos), stops[0])
        return Span(start, closing.end())
    return Span(start, END if last else shared, stopped=False)


def _common(a: str, b: str) -> int:
    """Length of the common beginning."""
    if b.startswith(a) or a.startswith(b):
        return min(len(a), len(b))
    return next(position for position, (x, y) in enumerate(zip(a, b)) if x != y)


@lru_cache(maxsize=64)
def _pattern(specials: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, specials)) or r"(?!)")


def _unclear(turn: int) -> SpanError:
    fix = "Use train_on: completion, or expand_turns: true, which renders each turn as generation would see it."
    return SpanError("a template that keeps the assistant's turns", f"messages[{turn}] rewritten beyond recognition", fix)
