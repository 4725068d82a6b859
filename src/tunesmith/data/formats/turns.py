"""Conversations: lists of turns under ``messages`` (role/content) or ``conversations`` (from/value)."""

from __future__ import annotations

from typing import Any

from tunesmith.data.formats.fields import FieldFault, Values, clean_inside, optional_text, parsed, text
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Chat, Message
from tunesmith.suggestions import closest

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function": "tool", "ipython": "ipython", "document": "document",
}  # fmt: skip
"""Role as data sets write it -> role as chat templates read it."""

RENAMED = {"from": "role", "value": "content"}


def chat(turns: Any, field: str, tools: Any = None, system: str = "") -> Chat:
    """Check a list of turns and bring it to what templates read. Raises FieldFault naming the turn."""
    turns = parsed(turns, field, "a list of turns")
    messages = conversation(turns, field)
    if system.strip() and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise FieldFault(
            field,
            "at least one turn of the assistant",
            f"only {roles}",
            "Add the answer to learn, or delete the row.",
        )
    return Chat(tuple(messages), tool_schemas(tools))


def conversation(turns: Any, field: str) -> list[Message]:
    """A list of turns with at least one in it."""
    if not isinstance(turns, list | tuple):
        raise FieldFault(
            field, "a list of turns", shorten(turns), 'Write [{"role": "user", "content": "..."}, ...].'
        )
    if not turns:
        raise FieldFault(field, "a list of turns", "an empty list", "Add the turns or delete the row.")
    return [turn(item, f"{field}[{position}]") for position, item in enumerate(turns)]


def opening_of(values: Values) -> list[Message]:
    """The turns before an answer: ``system``, ``history``, then ``instruction`` with ``input`` after a blank line."""
    question, more = text(values["instruction"], "instruction"), optional_text(values.get("input"), "input")
    messages: list[Message] = []
    system = optional_text(values.get("system"), "system")
    if system.strip():
        messages.append({"role": "system", "content": system})
    history = parsed(values.get("history") or [], "history", "a list of pairs")
    if not isinstance(history, list | tuple):
        raise FieldFault("history", "a list of pairs", shorten(history), "Write [[question, answer], ...].")
    for position, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise FieldFault(
                f"history[{position}]",
                "a pair [question, answer]",
                shorten(pair),
                "Write both, or delete the pair.",
            )
        messages += exchange(
            text(pair[0], f"history[{position}][0]"), text(pair[1], f"history[{position}][1]")
        )
    return [*messages, {"role": "user", "content": f"{question}\n\n{more}" if more.strip() else question}]


def exchange(question: str, answer: str) -> tuple[Message, Message]:
    """A question and its answer."""
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def tool_schemas(tools: Any) -> tuple[dict[str, Any], ...]:
    """The functions offered to the assistant: a list of JSON schemas, bare or under {"type": "function", "function": ...}."""
    if tools is None or tools == "":
        return ()
    tools = parsed(tools, "tools", "a list of function schemas")
    if not isinstance(tools, list | tuple):
        raise FieldFault(
            "tools", "a list of function schemas", shorten(tools), "Write the schemas in a list."
        )
    out = []
    for position, tool in enumerate(tools):
        place = f"tools[{position}]"
        if not isinstance(tool, dict):
            raise FieldFault(
                place, "an object with a name", shorten(tool), "Write one schema for each function."
            )
        bare = "function" not in tool and "name" in tool
        out.append({"type": "function", "function": tool} if bare else tool)
        clean_inside(tool, place)
    return tuple(out)


def turn(turn: Any, place: str) -> Message:
    """One turn, checked. Raises FieldFault naming what is wrong in it."""
    if not isinstance(turn, dict):
        raise FieldFault(
            place, "an object with role and content", shorten(turn), 'Write {"role": ..., "content": ...}.'
        )
    message: Message = {
        RENAMED.get(str(key), str(key)): value for key, value in turn.items() if value is not None
    }
    names = {RENAMED.get(key, key): key for key in turn}
    said = message.get("role")
    if not isinstance(said, str) or said.strip().lower() not in ROLES:
        close = closest(said, ROLES) if isinstance(said, str) else []
        fix = f"Did you mean {close[0]!r}?" if close else "Write the speaker of the turn."
        got = "no such field" if "role" not in message else shorten(said)
        raise FieldFault(
            f"{place}.{names.get('role', 'role')}", "a role (user, assistant, system, tool, ...)", got, fix
        )
    message["role"] = ROLES[said.strip().lower()]
    content_place = f"{place}.{names.get('content', 'content')}"
    if said.strip().lower() == "function_call":
        message["tool_calls"], message["content"] = _calls(message.get("content"), content_place), ""
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{place}.tool_calls")
    message["content"] = optional_text(_joined(message.get("content"), content_place), content_place)
    silent = message["role"] in ("system", "developer", "tool", "ipython")
    if (
        not message["content"].strip()
        and not silent
        and not message.get("tool_calls")
        and not message.get("reasoning_content")
    ):
        got = "empty text" if "content" in names else "no such field"
        raise FieldFault(content_place, "text", got, "Fill it in, or delete the turn or the row.")
    clean_inside({key: value for key, value in message.items() if key != "content"}, place)
    return message


def _joined(content: Any, place: str) -> Any:
    """[{"type": "text", "text": ...}, ...] -> one string; text models read strings."""
    if not isinstance(content, list):
        return content
    for position, part in enumerate(content):
        if (
            not isinstance(part, dict)
            or part.get("type", "text") != "text"
            or not isinstance(part.get("text"), str)
        ):
            got = shorten(part.get("type") if isinstance(part, dict) and "type" in part else part)
            raise FieldFault(
                f"{place}[{position}]",
                "a part of type text",
                got,
                "Only text can be learnt; remove the part.",
            )
    return "".join(part["text"] for part in content)


def _calls(value: Any, place: str) -> list[Any]:
    """The value of a sharegpt ``function_call`` turn: one call or a list of calls."""
    calls = parsed(value, place, 'a call {"name": ..., "arguments": ...}')
    return calls if isinstance(calls, list) else [calls]


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    calls = parsed(calls, place, "a list of calls")
    if not isinstance(calls, list | tuple):
        raise FieldFault(place, "a list of calls", shorten(calls), "Write the calls in a list.")
    out = []
    for position, call in enumerate(calls):
        spot = f"{place}[{position}]"
        call = (
            {"type": "function", "function": call}
            if isinstance(call, dict) and "function" not in call
            else call
        )
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            fix = 'Write {"name": ..., "arguments": {...}}.'
            raise FieldFault(spot, "a call with the name of a function", shorten(call), fix)
        arguments = parsed(function.get("arguments", {}), f"{spot}.arguments", "arguments as a JSON object")
        if not isinstance(arguments, dict):
            raise FieldFault(
                f"{spot}.arguments", "an object", shorten(arguments), "Write the arguments by name."
            )
        out.append({**call, "function": {**function, "arguments": arguments}})
    return out
