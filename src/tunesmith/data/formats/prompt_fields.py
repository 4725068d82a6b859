"""Rows of prompts, in the ways that files write them: a text, turns, an instruction or a question.

The policy answers the prompt while it is trained. All other columns stay with the row, for rewards to read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from tunesmith.data.formats.column_mapping import Names, as_tuple
from tunesmith.data.formats.fields import (
    SYSTEM,
    TOOLS,
    FieldFault,
    Format,
    Values,
    check_nested_text,
    optional,
    required,
    without_nulls,
)
from tunesmith.data.formats.preference_fields import (
    BEFORE_ANSWER,
    CONVERSATION,
    check_prompt_end,
    parse_prompt,
)
from tunesmith.data.formats.record_values import unify_line_ends
from tunesmith.data.formats.turns import alpaca_prompt, exchange, parse_tools, turns_field, with_system
from tunesmith.data.rows import Message, Prompt
from tunesmith.json_types import JsonObject

ANSWER = "answer"
"""Column of the answer that a conversation of the file ends with, unless the file has such a column."""


def build_prompt(values: Values) -> Prompt:
    """Return the row of a text, or of turns that end with a turn of the user."""
    prompt = parse_prompt(values, plain_answers=True)
    if isinstance(prompt, str):
        return Prompt(prompt)
    check_prompt_end(prompt, "prompt")
    return _of_turns(prompt, values)


def build_prompt_turns(values: Values) -> Prompt:
    """Return the row of a conversation. The turns after the last question become the column ANSWER."""
    turns = turns_field(values, "messages")
    asked = [index for index, message in enumerate(turns) if message["role"] in BEFORE_ANSWER]
    if not asked:
        roles = ", ".join(message["role"] for message in turns)
        fix = "Add the question, or delete the row."
        raise FieldFault("messages", "a turn of the user", f"only {roles}", fix)
    prompt, answer = turns[: asked[-1] + 1], turns[asked[-1] + 1 :]
    only_text = len(answer) == 1 and answer[0].keys() <= {"role", "content"}
    columns = {ANSWER: answer[0]["content"] if only_text else answer} if answer else {}
    return replace(_of_turns(with_system(prompt, values), values), columns=columns)


def build_prompt_alpaca(values: Values) -> Prompt:
    """Return the row of an instruction with its input."""
    return _of_turns(alpaca_prompt(values), values)


def build_prompt_question(values: Values) -> Prompt:
    """Return the row of a question; a context follows it after a blank line."""
    context = values.optional_text("context")
    asked = values.text("question") + (f"\n\n{context}" if context.strip() else "")
    return _of_turns(with_system(list(exchange(asked, "")), values), values)


def _of_turns(prompt: list[Message], values: Values) -> Prompt:
    return Prompt(tuple(prompt), tools=parse_tools(values.get("tools")))


def with_columns(row: Prompt, record: JsonObject, names: Mapping[str, Names]) -> Prompt:
    """Return ``row`` with the columns of ``record`` that are no field of it. ``names``: field -> its column.

    A null is left out: a parquet file has one wherever a row lacks a column that another row has.
    """
    used = {column for found in names.values() for column in as_tuple(found)}
    columns: JsonObject = {}
    for name, value in record.items():
        plain = None if name in used else without_nulls(_plain(unify_line_ends(value)))
        if plain is not None:
            check_nested_text(plain, str(name))
            columns[str(name)] = plain
    return replace(row, columns={**row.columns, **columns})


def _plain(value: object) -> object:
    """Return ``value`` as JSON has it: dates and decimals of a parquet file as text, bytes and NaN as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, bytes) else str(value)


INPUT = optional("input", "context", "입력")
FORMATS = (
    Format("prompt", Prompt, (required("prompt"), TOOLS, SYSTEM), build_prompt, "prompt"),
    Format("prompt_turns", Prompt, (CONVERSATION, TOOLS, SYSTEM), build_prompt_turns),
    Format(
        "prompt_alpaca",
        Prompt,
        (required("instruction", "지시"), INPUT, optional("history"), TOOLS, SYSTEM),
        build_prompt_alpaca,
        "instruction",
    ),
    Format(
        "prompt_question",
        Prompt,
        (required("question", "q", "query", "input", "질문"), optional("context"), TOOLS, SYSTEM),
        build_prompt_question,
        "question",
    ),
)
"""Formats of prompts, tried after all others: most of those have a prompt and its answer."""
