"""Locate the assistant's turns in a rendered conversation, whatever the template.

A turn begins where the template's own generation prompt ends, and ends with the token that stops it. Both are
found by rendering parts of the conversation. Where a template rewrites earlier turns (it strips reasoning,
for example), the turn is rendered again with two private characters around its content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tunesmith.data.encode.templates import RENDER_ERRORS, Renderer
from tunesmith.data.rows import Chat, Message

END = 1 << 62  # an end after the end of any text
OPEN, CLOSE = "\ue0f0", "\ue0f1"  # private-use characters that mark a turn's content in a second rendering


MARK = "qzMark"
"""Begins the names in a rendering that shows which calls a template writes; in ASCII, which no JSON escapes."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters ``start`` to ``end`` of the rendered text. ``stopped``: a special token ends them."""

    start: int
    end: int
    stopped: bool = True


class SpanError(Exception):
    """A turn that cannot be found in the rendering."""

    def __init__(self, expected: str, got: str, fix: str) -> None:
        super().__init__(f"expected {expected}, got {got}. {fix}")
        self.expected, self.got, self.fix = expected, got, fix


def assistant_turns(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def find_span(render: Renderer, row: Chat, full: str, turn: int) -> Span:
    """The span of assistant turn ``turn`` in ``full``, the rendering of the whole row. Raises SpanError."""
    last = turn == len(row.messages) - 1
    alone = full if last else render(row.messages[: turn + 1], row.tools)
    shared = len(full) if last else _common(full, alone)
    whole = shared == len(alone)  # else the two renderings differ in this turn or right after it
    start = _prompt_length(render, row, turn, full, shared)
    message = row.messages[turn]
    core = str(message.get("content") or "").strip()
    if message.get("tool_calls") or not core:
        if start is None:
            raise _unclear(turn)
        moved = 0
        if not whole and message.get("tool_calls"):
            _, end = _marked(render, row, turn, full)
            _, close = _marked(render, Chat(row.messages[: turn + 1], row.tools), turn, alone)
            if end is None or close is None:
                raise _unclear(turn)
            moved, shared = end - close, close + _common(alone[close:], full[end:])
        return _closed_at_end(render, alone, start, shared, last, whole, moved, turn)
    end = None if start is None else _content_end(full, start, shared, core, render.opens_answers)
    if end is None:
        begin, end = _marked(render, row, turn, full)
        start = begin if start is None else start
    if start is None or end is None or start > end:
        raise _unclear(turn)
    if not whole:
        _, close = _marked(render, Chat(row.messages[: turn + 1], row.tools), turn, alone)
        shared = end if close is None else end + _common(alone[close:], full[end:])
    return _closed_after(render, full, start, end, shared, last, whole)


def check_rendered(render: Renderer, row: Chat, full: str, turn: int, span: Span) -> None:
    """Raise SpanError if the template leaves out the calls, or all of the content, of a supervised turn.

    Without its calls, the turn would teach an empty answer, or one that announces a call and never makes it.
    """
    message, text = row.messages[turn], full[span.start : span.end]
    if message.get("tool_calls"):
        core = str(message.get("content") or "").strip()
        beyond = text.replace(core, "", 1) if core else text
        if missing := omitted_calls(render, row, full, turn, beyond):
            raise _omitted_call(turn, missing[0])
    elif message.get("reasoning_content") and not _pattern(render.specials).sub("", text).strip():
        got = f"messages[{turn}].reasoning_content alone, which the template leaves out"
        raise SpanError("an answer that the template renders", got, "Add the answer, or delete the row.")


def check_context_calls(render: Renderer, row: Chat, full: str, supervised: Sequence[int] = ()) -> None:
    """Raise SpanError if the template leaves out a call of a turn that is not ``supervised``.

    The model would read the answer of a tool that nobody called. One rendering, in which every call has
    another name and other arguments, shows all calls that are rendered; the others are then tried one by one.
    """
    turns = [
        turn
        for turn, message in enumerate(row.messages)
        if message.get("tool_calls") and turn not in supervised
    ]
    if not turns:
        return
    changed, marks = list(row.messages), dict[int, list[str]]()
    for turn in turns:
        changed[turn], marks[turn] = _with_marked_calls(row.messages[turn], turn)
    try:
        text = render(changed, row.tools)
    except RENDER_ERRORS:
        text = ""
    for turn in turns:
        if not all(mark in text for mark in marks[turn]) and (
            missing := omitted_calls(render, row, full, turn)
        ):
            raise _omitted_call(turn, missing[0])


def _with_marked_calls(message: Message, turn: int) -> tuple[Message, list[str]]:
    """Return the turn with a mark in place of each name of a function and of an argument, and the marks."""
    calls, marks = [], []
    for index, call in enumerate(message["tool_calls"]):
        keys = {
            key: f"{MARK}{turn}a{index}x{place}z" for place, key in enumerate(call["function"]["arguments"])
        }
        name = f"{MARK}{turn}n{index}z"
        arguments = {keys[key]: value for key, value in call["function"]["arguments"].items()}
        calls.append({**call, "function": {**call["function"], "name": name, "arguments": arguments}})
        marks += [name, *keys.values()]
    return {**message, "tool_calls": calls}, marks


def _omitted_call(turn: int, missing: str) -> SpanError:
    fix = "Use a template with tools (data.template=chatml, --template chatml), or delete the row."
    got = f"messages[{turn}].{missing}, which the template leaves out"
    return SpanError("a template that renders tool calls", got, fix)


def omitted_calls(render: Renderer, row: Chat, full: str, turn: int, text: str = "") -> list[str]:
    """Return the names and arguments of calls that the template leaves out.

    An item is ``tool_calls[0]: the argument 'city' of weather``. ``full``: the rendering of the row.
    ``text``: that of the turn. A part that is not found in ``text`` is still rendered if a change of it
    changes ``full``.
    """
    missing = []
    for index, call in enumerate(row.messages[turn].get("tool_calls") or ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if name not in text and not _matters(render, row, full, turn, index, name=f"{name}_"):
            missing.append(f"tool_calls[{index}]: {name}")
            continue
        for key, value in arguments.items():
            rest = {other: item for other, item in arguments.items() if other != key}
            is_there = key in text and _is_written(value, text)
            if not is_there and not _matters(render, row, full, turn, index, arguments=rest):
                missing.append(f"tool_calls[{index}]: the argument {key!r} of {name}")
    return missing


def _matters(render: Renderer, row: Chat, full: str, turn: int, index: int, **changes: object) -> bool:
    """Return True if ``changes`` to the function of a call change the rendering ``full`` of the row."""
    message = row.messages[turn]
    calls = list(message["tool_calls"])
    calls[index] = {**calls[index], "function": {**calls[index]["function"], **changes}}
    changed = {**message, "tool_calls": calls}
    try:
        return render([*row.messages[:turn], changed, *row.messages[turn + 1 :]], row.tools) != full
    except RENDER_ERRORS:
        return True


def _is_written(value: object, text: str) -> bool:
    """Return True if ``text`` contains the value of an argument, as JSON or as Python writes it."""
    if isinstance(value, dict):
        return all(str(key) in text and _is_written(item, text) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_written(item, text) for item in value)
    if isinstance(value, str):
        return value in text or json.dumps(value, ensure_ascii=False)[1:-1] in text
    return str(value) in text or json.dumps(value) in text


def _prompt_length(render: Renderer, row: Chat, turn: int, full: str, shared: int) -> int | None:
    """Length of the generation prompt before this turn; None if ``full`` does not begin with it."""
    if turn == 0:  # templates do not render an empty conversation
        return None
    try:
        prompt = render(row.messages[:turn], row.tools, prompt=True)
    except RENDER_ERRORS:  # a template may refuse turns that end with a tool's answer
        return None
    return len(prompt) if full.startswith(prompt) and len(prompt) <= shared else None


def _content_end(full: str, start: int, shared: int, core: str, opened: bool) -> int | None:
    """Return the end of the content in ``full``; None if it is not found exactly once.

    ``opened``: the generation prompt, which ends at ``start``, has already written the header of the turn. If
    not, the header follows ``start``, and may begin with the same text as the content.
    """
    begin = start
    while begin < len(full) and full[begin].isspace():
        begin += 1
    if full.startswith(core, begin):
        return begin + len(core) if opened or full.find(core, begin + 1) < 0 else None
    first = full.find(core, start, shared)
    return first + len(core) if first >= 0 and full.find(core, first + 1, shared) < 0 else None


def _marked(render: Renderer, row: Chat, turn: int, full: str) -> tuple[int | None, int | None]:
    """(start, end) in ``full`` of the turn's content, or of its last call's name; None for a lost mark.

    Renders the row with marks around it. The result counts only if it equals ``full`` without the marks.
    """
    messages = [*row.messages[:turn], _with_marks(row.messages[turn]), *row.messages[turn + 1 :]]
    try:
        text = render(messages, row.tools)
    except RENDER_ERRORS:
        return None, None
    start, end = text.find(OPEN), text.find(CLOSE)
    ambiguous = OPEN in full or CLOSE in full or text.count(OPEN) > 1 or text.count(CLOSE) > 1
    reversed_marks = 0 <= end < start
    if ambiguous or reversed_marks or text.replace(OPEN, "").replace(CLOSE, "") != full:
        return None, None
    return (start if start >= 0 else None), (end - (start >= 0) if end >= 0 else None)


def _with_marks(message: Message) -> Message:
    calls = message.get("tool_calls")
    if calls:
        function = {**calls[-1]["function"], "name": OPEN + calls[-1]["function"]["name"] + CLOSE}
        return {**message, "tool_calls": [*calls[:-1], {**calls[-1], "function": function}]}
    content = str(message["content"])
    core = content.strip()
    lead, _, trail = content.partition(core)
    return {**message, "content": lead + OPEN + core + CLOSE + trail}


def _closed_after(
    render: Renderer, full: str, start: int, end: int, shared: int, last: bool, whole: bool
) -> Span:
    """The span that ends with the first special token after the content, if there is one."""
    match = _pattern(render.specials).search(full, end, shared)
    if match:
        stop = match.end()
        while (
            render.eos and match and match.group() != render.eos
        ):  # <|im_end|></s>: the end token is supervised too
            match = _pattern(render.specials).match(full, match.end(), shared)
            stop = match.end() if match and match.group() == render.eos else stop
        return Span(start, stop)
    if last:
        return Span(start, END, stopped=False)
    return Span(start, shared if whole else end, stopped=False)


def _closed_at_end(
    render: Renderer, alone: str, start: int, shared: int, last: bool, whole: bool, moved: int, turn: int
) -> Span:
    """The span of a turn that ends with calls or is empty: only special tokens at its end are stops.

    ``alone``: the rendering up to this turn. It and the full rendering agree up to ``shared``; in the
    full rendering that text is shifted by ``moved`` characters.
    """
    trailing = []
    edge = len(alone)
    for match in reversed(list(_pattern(render.specials).finditer(alone, start))):
        if alone[match.end() : edge].strip():
            break
        trailing.append(match)
        edge = match.start()
    stops = [match for match in trailing if match.end() <= shared]
    if stops:
        closing = next((match for match in stops if match.group() == render.eos), stops[0])
        return Span(start, closing.end() + moved)
    if not whole:
        raise _unclear(turn)
    return Span(start, END if last else shared, stopped=False)


def _common(a: str, b: str) -> int:
    """Length of the common prefix."""
    if b.startswith(a) or a.startswith(b):
        return min(len(a), len(b))
    return next(position for position, (x, y) in enumerate(zip(a, b)) if x != y)


@lru_cache(maxsize=64)
def _pattern(specials: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, specials)) or r"(?!)")


def _unclear(turn: int) -> SpanError:
    got = f"messages[{turn}], which the template rewrites so that it cannot be found"
    fix = (
        "Use train_on: completion, or expand_turns: true, which renders each turn as generation would see it."
    )
    return SpanError("a template that keeps the assistant's turns", got, fix)
