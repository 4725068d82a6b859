"""Questions about a text that contains their answers: flat rows, and the nested files of SQuAD 1.1 and 2.0.

Rajpurkar et al. 2016 (arXiv:1606.05250) and 2018 (arXiv:1806.03822).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from tunesmith.data.formats.fields import FieldFault, Values, flag, parse_json, require_text
from tunesmith.data.formats.record_values import unify_line_ends
from tunesmith.data.row_problems import Record, RowProblem, shorten
from tunesmith.data.rows import Question
from tunesmith.json_types import JsonObject

LISTED = 3
"""Positions of an answer that a message lists."""

KEYS = ("id", "question", "answers", "is_impossible")
"""Keys of a question in a nested file."""


def build_question(values: Values) -> Question:
    """The row of a question, its context and answers. Without ``answers`` it is a row to predict."""
    question, context = values.text("question"), values.text("context")
    name = values.get("id")
    answers = _answers(values, context)
    if answers:
        answers = tuple(
            (unify_line_ends(text), start - context.count("\r\n", 0, start)) for text, start in answers
        )
    return Question(question, unify_line_ends(context), answers, None if name is None else str(name))


def _answers(values: Values, context: str) -> tuple[tuple[str, int], ...] | None:
    impossible = flag(values.get("is_impossible"))
    if "answers" not in values:
        return () if impossible else None
    if impossible and not values["answers"]:
        return ()
    answers = tuple(_check_answer(*answer, context) for answer in _parse_answers(values["answers"]))
    if impossible and answers:
        got = f"{len(answers)}, such as {answers[0][0]!r}"
        fix = "Leave the answers empty (SQuAD 2 keeps such answers under plausible_answers), or write is_impossible: false."
        raise FieldFault("answers", "none, because is_impossible is true", got, fix)
    if impossible is False and not answers:
        fix = "Write is_impossible: true if the context has no answer, or add the answer."
        raise FieldFault("answers", "an answer, because is_impossible is false", "none", fix)
    return answers


def _parse_answers(value: object) -> list[tuple[str, object, object]]:
    """(place in the row, text, start) of each answer: from an object of two lists, or a list of objects."""
    if value is None:
        fix = "Write [] if the context has no answer, or delete the row."
        raise FieldFault("answers", "answers", shorten(value), fix)
    value = parse_json(value, "answers", "answers as JSON")
    if isinstance(value, Mapping):
        columns = [value.get("text"), value.get("answer_start")]
        texts, starts = ([item] if isinstance(item, str | int) else item for item in columns)
        if (
            not isinstance(texts, list | tuple)
            or not isinstance(starts, list | tuple)
            or len(texts) != len(starts)
        ):
            fix = 'Write {"text": ["..."], "answer_start": [0]}, with lists of the same length.'
            raise FieldFault("answers", "text and answer_start of each answer", shorten(value), fix)
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(value, list | tuple):
        fix = 'Write [{"text": "...", "answer_start": 0}].'
        raise FieldFault("answers", "a list of answers", shorten(value), fix)
    answers: list[tuple[str, object, object]] = []
    for index, answer in enumerate(value):
        if isinstance(answer, str):
            answers.append((f"answers[{index}]", answer, None))
            continue
        if not isinstance(answer, Mapping) or not {"text", "answer_start"} <= answer.keys():
            expected, fix = (
                "an object with text and answer_start",
                'Write {"text": "...", "answer_start": 0}.',
            )
            raise FieldFault(f"answers[{index}]", expected, shorten(answer), fix)
        answers.append((f"answers[{index}]", answer["text"], answer["answer_start"]))
    return answers


def _check_answer(place: str, value: object, start: object, context: str) -> tuple[str, int]:
    """(text, start) of an answer that ``context`` contains at ``start``."""
    text, field = require_text(value, f"{place}.text"), f"{place}.answer_start"
    if start is None:
        return text, _only_position(place, text, context)
    if not isinstance(start, int) or isinstance(start, bool):
        fix = "Write the position of its first character in the context, from 0."
        raise FieldFault(field, "a whole number", shorten(start), fix)
    if start >= 0 and context.startswith(text, start):
        return text, start
    if 0 <= start < len(context):
        got = f"{start}, where the context has {shorten(context[start : start + len(text)])}"
    else:
        got = f"{start}, outside the context of {len(context)} characters"
    positions = list(islice(_positions(text, context), LISTED + 1))
    fix = "The context does not contain it: copy the answer from the context, or delete the row."
    if positions:
        listed = ", ".join(map(str, positions[:LISTED])) + (", ..." if len(positions) > LISTED else "")
        fix = f"It begins at {listed}: positions count characters from 0."
    raise FieldFault(field, f"the position of {shorten(text)} in the context", got, fix)


def _only_position(place: str, text: str, context: str) -> int:
    """Return the start of an answer in its context.

    Raises FieldFault unless the answer occurs there exactly once.
    """
    positions = list(islice(_positions(text, context), LISTED + 1))
    if len(positions) == 1:
        return positions[0]
    got = f"{shorten(text)}, which the context does not contain"
    fix = "Copy the answer from the context, or delete the row."
    if positions:
        listed = ", ".join(map(str, positions[:LISTED])) + (", ..." if len(positions) > LISTED else "")
        got, fix = f"{shorten(text)}, which begins at {listed}", 'Write {"text": "...", "answer_start": 0}.'
    raise FieldFault(place, "an answer that the context contains once, or its answer_start", got, fix)


def _positions(text: str, context: str) -> Iterator[int]:
    start = context.find(text)
    while start >= 0:
        yield start
        start = context.find(text, start + 1)


def nested_rows(articles: Iterator[tuple[int, object]], path: str) -> Iterator[Record | RowProblem]:
    """A flat row for each question of a nested file. ``articles``: (line where it begins, article)."""
    row = 0
    for number, (line, article) in enumerate(articles):
        for item in _questions(article, f"data[{number}]"):
            row += 1
            if isinstance(item, FieldFault):
                yield RowProblem(path, row, item.field, item.expected, item.got, item.fix, line)
            else:
                yield Record(path, row, line, item)


def _questions(article: object, place: str) -> Iterator[JsonObject | FieldFault]:
    for where, paragraph in _members(article, "paragraphs", place):
        for spot, question in _members(paragraph, "qas", where):
            yield question if isinstance(question, FieldFault) else _flat_row(question, paragraph, spot)


def _flat_row(question: object, paragraph: object, place: str) -> JsonObject | FieldFault:
    if not isinstance(question, Mapping):
        fix = "Write id, question and answers."
        return FieldFault(place, "an object with a question", shorten(question), fix)
    values = {name: question[name] for name in KEYS if name in question}
    if values.get("is_impossible") is True:
        values.setdefault("answers", [])
    if isinstance(paragraph, Mapping) and "context" in paragraph:
        values["context"] = paragraph["context"]
    return values


def _members(value: object, name: str, place: str) -> Iterator[tuple[str, object]]:
    """(place, element) for the list under ``name``; a fault if there is no such list, or ``value`` is one."""
    members = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(members, list):
        yield from ((f"{place}.{name}[{index}]", item) for index, item in enumerate(members))
    elif isinstance(value, FieldFault):
        yield place, value
    else:
        got = shorten(members if isinstance(value, Mapping) else value)
        yield place, FieldFault(f"{place}.{name}", f"a list of {name}", got, f"Write {name} as SQuAD does.")
