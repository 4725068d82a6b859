"""Questions about a text whose answers stand in it: rows, and the nested files of SQuAD 1.1 and 2.0.

Rajpurkar et al. 2016 (arXiv:1606.05250) and 2018 (arXiv:1806.03822).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tunesmith.data.formats.fields import FieldFault, parsed, text
from tunesmith.data.row_problems import Record, RowProblem, shorten
from tunesmith.data.rows import Question

LISTED = 3
"""Places of an answer that a message names."""

MARKS = {"": False, "0": False, "false": False, "1": True, "true": True}


def question(values: Mapping[str, Any]) -> Question:
    """A question, its context and its answers; without the field ``answers`` it is to be predicted."""
    asked, context = text(values["question"], "question"), text(values["context"], "context")
    called = values.get("id")
    return Question(asked, context, _answers(values, context), None if called is None else str(called))


def _answers(values: Mapping[str, Any], context: str) -> tuple[tuple[str, int], ...] | None:
    given = values.get("is_impossible")
    impossible = MARKS.get(str(given).strip().lower()) if given is not None else None
    if "answers" not in values:
        return () if impossible else None
    answers = tuple(_checked(answer, context) for answer in _listed(values["answers"], bool(impossible)))
    if impossible and answers:
        fix = "Leave the answers empty (SQuAD 2 keeps such ones under plausible_answers), or write is_impossible: false."
        raise FieldFault(
            "answers",
            "none, because is_impossible is true",
            f"{len(answers)}, such as {answers[0][0]!r}",
            fix,
        )
    if impossible is False and given != "" and not answers:
        fix = "Write is_impossible: true where the context does not say, or add the answer."
        raise FieldFault("answers", "an answer, because is_impossible is false", "none", fix)
    return answers


def _listed(value: Any, impossible: bool) -> list[tuple[str, Any, Any]]:
    """(place in the file, text, start) of each answer: an object of two lists, or a list of objects."""
    if impossible and not value:
        return []
    if value is None:
        raise FieldFault(
            "answers",
            "answers",
            "nothing (null)",
            "Write [] where the context does not say, or delete the row.",
        )
    value = parsed(value, "answers", "answers as JSON")
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        texts, starts = ([item] if isinstance(item, str | int) else item for item in (texts, starts))
        if (
            not isinstance(texts, list | tuple)
            or not isinstance(starts, list | tuple)
            or len(texts) != len(starts)
        ):
            fix = 'Write {"text": ["..."], "answer_start": [0]}, as many of one as of the other.'
            raise FieldFault("answers", "text and answer_start of each answer", shorten(value), fix)
        return [(f"[{place}]", *pair) for place, pair in enumerate(zip(texts, starts, strict=True))]
    if not isinstance(value, list | tuple):
        raise FieldFault(
            "answers", "a list of answers", shorten(value), 'Write [{"text": "...", "answer_start": 0}].'
        )
    for place, answer in enumerate(value):
        if not isinstance(answer, Mapping) or not {"text", "answer_start"} <= answer.keys():
            fix = 'Write {"text": "...", "answer_start": 0}.'
            raise FieldFault(
                f"answers[{place}]", "an object with text and answer_start", shorten(answer), fix
            )
    return [(f"[{place}]", answer["text"], answer["answer_start"]) for place, answer in enumerate(value)]


def _checked(answer: tuple[str, Any, Any], context: str) -> tuple[str, int]:
    """The answer, when it stands in the context where the row says."""
    place, said, start = answer
    said = text(said, f"answers{place}.text")
    field = f"answers{place}.answer_start"
    if not isinstance(start, int) or isinstance(start, bool):
        fix = "Write the number of its first character in the context, from 0."
        raise FieldFault(field, "a whole number", shorten(start), fix)
    if start >= 0 and context.startswith(said, start):
        return said, start
    there = f"{start}, where the context says {shorten(context[start : start + len(said)])}"
    got = there if 0 <= start < len(context) else f"{start}, outside the context of {len(context)} characters"
    found = _places(said, context)
    if found:
        listed = ", ".join(map(str, found[:LISTED])) + (", ..." if len(found) > LISTED else "")
        fix = f"It begins at {listed}: places are counted in characters from 0."
    else:
        fix = "The context does not say it so: write the answer as it stands there, or delete the row."
    raise FieldFault(field, f"the place of {shorten(said)} in the context", got, fix)


def _places(said: str, context: str) -> list[int]:
    found: list[int] = []
    at = context.find(said)
    while at >= 0 and len(found) <= LISTED:
        found.append(at)
        at = context.find(said, at + 1)
    return found


def nested(articles: Iterator[tuple[int, Any]], path: str) -> Iterator[Record | RowProblem]:
    """A row for each question of the articles of a SQuAD file: (line where it begins, article)."""
    row = 0
    for number, (line, article) in enumerate(articles):
        for item in _questions(article, f"data[{number}]"):
            row += 1
            if isinstance(item, FieldFault):
                yield RowProblem(path, row, item.field, item.expected, item.got, item.fix, line)
            else:
                yield Record(path, row, line, item)


def _questions(article: Any, place: str) -> Iterator[dict[str, Any] | FieldFault]:
    for where, paragraph in _members(article, "paragraphs", place):
        if isinstance(paragraph, FieldFault):
            yield paragraph
            continue
        for spot, asked in _members(paragraph, "qas", where):
            if isinstance(asked, FieldFault):
                yield asked
            elif not isinstance(asked, Mapping):
                yield FieldFault(
                    spot, "an object with a question", shorten(asked), "Write id, question and answers."
                )
            else:
                value = {
                    name: asked[name]
                    for name in ("id", "question", "answers", "is_impossible")
                    if name in asked
                }
                if value.get("is_impossible") is True:
                    value.setdefault("answers", [])
                if isinstance(paragraph, Mapping) and "context" in paragraph:
                    value["context"] = paragraph["context"]
                yield value


def _members(value: Any, name: str, place: str) -> Iterator[tuple[str, Any]]:
    """(place, element) of a list that an object holds, or one fault."""
    listed = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(listed, list):
        yield from ((f"{place}.{name}[{number}]", item) for number, item in enumerate(listed))
    else:
        yield (
            place,
            FieldFault(
                f"{place}.{name}",
                f"a list of {name}",
                shorten(listed if isinstance(value, Mapping) else value),
                f"Write {name} as SQuAD has them.",
            ),
        )
