"""Conversations: lists of turns under ``messages`` (role, content) or ``conversations`` (from, value)."""

from __future__ import annotations

from tunesmith.data.formats.dialogues import is_dialogue, parse_dialogue
from tunesmith.data.formats.fields import (
    FieldFault,
    Values,
    check_list,
    check_nested_text,
    flag,
    optional_text,
    parse_json,
    parse_list,
    require_text,
    without_nulls,
)
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Chat, Message
from tunesmith.json_types import JsonObject
from tunesmith.suggestions import closest

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function": "tool", "ipython": "ipython", "document": "document",
}  # fmt: skip
"""Role as data sets write it -> role as chat templates read it."""

MAY_BE_EMPTY = ("system", "developer", "tool", "ipython")
"""Roles whose turns may have no content."""

RENAMED = {"from": "role", "value": "content"}

WEIGHTS = ("weight", "loss", "train")
"""Keys whose value 0 or false marks a turn that is not trained on."""

MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Keys of media, which a text model cannot read."""

KNOWN_KEYS = {
    "role", "content", "name", "id", "tool_calls", "tool_call_id", "weight", "reasoning_content", "reasoning", "thinking",
}  # fmt: skip
"""Keys of a turn that templates read, and ids."""

TURNS_FIX = 'Write [{"role": "user", "content": "..."}, ...].'


def build_chat(values: Values, field: str) -> Chat:
    """Return a conversation.

    It needs an assistant turn unless it is to be answered. FieldFault names the turn.
    """
    turns = turns_field(values, field)
    messages = with_system(turns, values)
    if any(message["role"] == "system" for message in turns):
        messages = turns
    if values.needs_answer and not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        fix = "Add the answer to learn, or delete the row."
        raise FieldFault(field, "at least one turn of the assistant", f"only {roles}", fix)
    return Chat(tuple(messages), parse_tools(values.get("tools")))


def turns_field(values: Values, field: str) -> list[Message]:
    """The turns of a field, which may have come as JSON text or as a dialogue in one text."""
    if isinstance(values[field], str) and is_dialogue(values[field]):
        return parse_dialogue(values[field], field)
    return parse_turns(parse_json(values[field], field, "a list of turns"), field)


def parse_turns(value: object, field: str) -> list[Message]:
    """A list of at least one turn, with the roles and keys that templates read."""
    turns = check_list(value, field, "a list of turns", TURNS_FIX)
    if not turns:
        raise FieldFault(field, "a list of turns", "an empty list", "Add the turns or delete the row.")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        message = parse_turn(turn, place := f"{field}[{index}]")
        if messages and _continues(messages[-1], message):
            messages[-1] = _with_calls(messages[-1], message, place)
        else:
            messages.append(message)
    return messages


def _continues(before: Message, message: Message) -> bool:
    """Return True if ``message`` has only calls and follows an assistant turn: both become one turn."""
    is_call = bool(message.get("tool_calls")) and not message["content"].strip()
    return is_call and message["role"] == before["role"] == "assistant" and "reasoning_content" not in message


def _with_calls(before: Message, message: Message, place: str) -> Message:
    """Return ``before`` with the calls of the turn after it. Raises FieldFault if their weights differ."""
    if before.get("weight") != message.get("weight"):
        fix = "Give both the same weight: text and calls in a row are one turn of the assistant."
        raise FieldFault(place, "the weight of the turn before it", "another weight", fix)
    return {**before, "tool_calls": [*before.get("tool_calls", ()), *message["tool_calls"]]}


def with_system(messages: list[Message], values: Values) -> list[Message]:
    """``messages`` after the field ``system``, unless it is blank or they begin with a system turn."""
    system = values.optional_text("system")
    if not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def alpaca_prompt(values: Values) -> list[Message]:
    """The turns ``system``, ``history``, and ``instruction`` with ``input`` after a blank line."""
    instruction, more = values.text("instruction"), values.optional_text("input")
    messages: list[Message] = []
    fix = "Write [[question, answer], ...]."
    history = parse_list(values.get("history") or [], "history", "a list of pairs", fix)
    for index, pair in enumerate(history):
        place = f"history[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            fix = "Write both, or delete the pair."
            raise FieldFault(place, "a pair [question, answer]", shorten(pair), fix)
        messages += exchange(require_text(pair[0], f"{place}[0]"), require_text(pair[1], f"{place}[1]"))
    content = f"{instruction}\n\n{more}" if more.strip() else instruction
    return with_system([*messages, {"role": "user", "content": content}], values)


def exchange(question: str, answer: str) -> tuple[Message, ...]:
    """A turn of the user and the assistant's answer, if there is one."""
    asked: Message = {"role": "user", "content": question}
    return (asked, {"role": "assistant", "content": answer}) if answer else (asked,)


def parse_tools(value: object) -> tuple[JsonObject, ...]:
    """The function schemas, each as {"type": "function", "function": ...}; bare ones are wrapped."""
    if value is None or value == "":
        return ()
    schemas = []
    tools = parse_list(value, "tools", "a list of function schemas", "Write the schemas in a list.")
    for index, item in enumerate(tools):
        place = f"tools[{index}]"
        tool = without_nulls(parse_json(item, place, "a function schema"))
        if not isinstance(tool, dict):
            fix = "Write one schema for each function."
            raise FieldFault(place, "an object with a name", shorten(tool), fix)
        bare = "function" not in tool and "name" in tool
        schemas.append({"type": "function", "function": tool} if bare else tool)
        check_nested_text(tool, place)
    return tuple(schemas)


def parse_turn(turn: object, place: str) -> Message:
    """One turn, with the role and keys that templates read. Raises FieldFault naming the key."""
    if not isinstance(turn, dict):
        fix = 'Write {"role": ..., "content": ...}.'
        raise FieldFault(place, "an object with role and content", shorten(turn), fix)
    message: Message = {
        RENAMED.get(str(key), str(key)): without_nulls(value)
        for key, value in turn.items()
        if value is not None
    }
    names = {RENAMED.get(key, key): key for key in turn}
    role = _file_role(message, f"{place}.{names.get('role', 'role')}")
    message["role"] = ROLES[role]
    refuse_media(message, f"{place}.")
    content_place = f"{place}.{names.get('content', 'content')}"
    if role == "function_call":
        calls = parse_json(message.get("content"), content_place, 'a call {"name": ..., "arguments": ...}')
        message["tool_calls"], message["content"] = calls if isinstance(calls, list) else [calls], ""
    if "function_call" in message:  # OpenAI's name of a single call, before tool_calls
        message["tool_calls"] = [message.pop("function_call")]
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = _parse_calls(calls, f"{place}.tool_calls")
    message["content"] = optional_text(_join_parts(message.get("content"), content_place), content_place)
    is_empty = not (
        message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
    )
    if is_empty and message["role"] not in MAY_BE_EMPTY:
        got = "empty text" if "content" in names else "no such field"
        raise FieldFault(content_place, "text", got, "Fill it in, or delete the turn or the row.")
    check_nested_text({key: value for key, value in message.items() if key != "content"}, place)
    return _with_weight(message, place)


def _with_weight(message: Message, place: str) -> Message:
    """Return ``message`` with ``weight`` 0 if a key of ``WEIGHTS`` is 0 or false, else without these keys."""
    given = {key: message.pop(key) for key in WEIGHTS if key in message}
    for key, value in given.items():
        trained = bool(value) if value in (0, 1) else flag(value)
        if trained is None:
            fix = "Write 0 for a turn that is context only, else 1. To repeat rows, give the file a weight in the recipe."
            raise FieldFault(f"{place}.{key}", "0 or 1, true or false", shorten(value), fix)
        if not trained and message["role"] == "assistant":
            message["weight"] = 0
    return message


def refuse_media(values: Message, place: str = "") -> None:
    """Raise FieldFault for images, audio or video next to text: the model would be trained without them."""
    for key in MEDIA:
        if values.get(key):
            fix = "Remove it if the text makes sense without it, else the row: images, audio and video are not trained on."
            raise FieldFault(f"{place}{key}", "text only", shorten(values[key]), fix)


def _file_role(message: Message, place: str) -> str:
    """The role of a turn as the file writes it, a key of ROLES."""
    value = message.get("role")
    if isinstance(value, str) and value.strip().lower() in ROLES:
        return value.strip().lower()
    close = closest(value, ROLES) if isinstance(value, str) else []
    fix = f"Did you mean {close[0]!r}?" if close else "Write the speaker of the turn."
    got = shorten(value) if "role" in message else "no such field"
    raise FieldFault(place, "a role (user, assistant, system, tool, ...)", got, fix)


def _join_parts(content: object, place: str) -> object:
    """Join [{"type": "text", "text": ...}, ...] to one string, because text models read strings.

    The text may also be under ``value`` or ``content``."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        spot = f"{place}[{index}]"
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            got = shorten(part["type"] if isinstance(part, dict) and "type" in part else part)
            fix = "Remove the part or the row: images, audio and video are not trained on."
            raise FieldFault(spot, "a part of type text", got, fix)
        text = next((part[key] for key in ("text", "value", "content") if key in part), None)
        if not isinstance(text, str):
            got = f"the keys {', '.join(map(str, part))}" if text is None else shorten(text)
            raise FieldFault(
                spot, "a text under the key 'text'", got, 'Write {"type": "text", "text": "..."}.'
            )
        texts.append(text)
    return "".join(texts)


def _parse_calls(value: object, place: str) -> list[JsonObject]:
    """Tool calls, each as {"type": "function", "function": {"name": ..., "arguments": {...}}}."""
    calls = []
    listed = parse_list(value, place, "a list of calls", "Write the calls in a list.")
    for index, item in enumerate(listed):
        spot = f"{place}[{index}]"
        call = parse_json(item, spot, 'a call {"name": ..., "arguments": ...}')
        if isinstance(call, dict) and "function" not in call:
            call = {"type": "function", "function": call}
        function = call["function"] if isinstance(call, dict) else None
        if (
            not isinstance(call, dict)
            or not isinstance(function, dict)
            or type(function.get("name")) is not str
        ):
            fix = 'Write {"name": ..., "arguments": {...}}.'
            raise FieldFault(spot, "a call with the name of a function", shorten(call), fix)
        where = f"{spot}.arguments"
        arguments = parse_json(function.get("arguments", {}), where, "arguments as a JSON object")
        if not isinstance(arguments, dict):
            raise FieldFault(where, "an object", shorten(arguments), "Write the arguments by name.")
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls
