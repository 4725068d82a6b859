"""One source of a recipe, opened: its format known, its rows typed, what is wrong with them said."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.data.data_config import DataConfig, Source
from tunesmith.data.formats import columns, judgement_fields, preference_fields, ratings
from tunesmith.data.formats.columns import Converter, converter
from tunesmith.data.read import hub_set
from tunesmith.data.read.row_files import READERS, Rows, read
from tunesmith.data.row_problems import Record, RowFault, RowProblem, shorten
from tunesmith.data.rows import (
    Answered,
    Chat,
    Judged,
    Labelled,
    PromptCompletion,
    Question,
    Ranking,
    Row,
    Tagged,
    Text,
)
from tunesmith.errors import DataError

ROW_TYPES: tuple[type, ...] = (Chat, PromptCompletion, Text, Labelled, Tagged, Question, Ranking, Judged)

SAMPLED = 100
"""Rows looked at to find out the format."""


@dataclass(frozen=True)
class Opened:
    """A source whose format is known. ``description`` says format and columns; ``kinds``: row types of its first rows, with Chat
    among them where a ranking is of turns, which the chat template renders.
    ``gold``: whether every row must have what is to be learnt."""

    source: Source
    accepted: tuple[type, ...]
    convert: Converter | None
    description: str
    kinds: frozenset[type] = frozenset()
    gold: bool = True

    def rows(self) -> Iterator[tuple[Record, Row] | RowProblem]:
        """Each row with where it came from, or what is wrong with it. At most ``limit`` rows of the file are read; where pairs
        become two rows each, both come from the same place, one after the other."""
        if self.convert is None:
            yield from (item for item in self._read() if isinstance(item, RowProblem))
            return
        numbers: bool | None = None  # whether the first label is one
        for item in self._read():
            row = item if isinstance(item, RowProblem) else self.convert(item)
            if isinstance(row, Labelled) and row.label is not None:
                numbers = not isinstance(row.label, str) if numbers is None else numbers
                if isinstance(row.label, str) is numbers and isinstance(item, Record):
                    row = _mixed(item, row.label, numbers)
            if isinstance(row, RowProblem):
                yield row
            elif isinstance(item, Record) and isinstance(row, Ranking) and self.convert.unpairs:
                yield from ((item, one) for one in judgement_fields.unpaired(row))
            elif isinstance(item, Record) and isinstance(row, self.accepted):
                yield item, row
            elif isinstance(item, Record):
                names = " or ".join(kind.__name__ for kind in self.accepted)
                fix = "Bring all rows to one form, or choose another objective."
                yield RowProblem(
                    item.path,
                    item.row,
                    "row",
                    f"a {names} row",
                    f"a {type(row).__name__} row",
                    fix,
                    item.line,
                )

    def problem(self, record: Record, fault: RowFault) -> RowProblem:
        """What is wrong with a row of this source that could be read, but not be made an example."""
        assert self.convert is not None
        return self.convert.problem(record, fault)

    def _read(self) -> Rows:
        return itertools.islice(_rows(self.source), self.source.limit)


def _mixed(record: Record, label: str | float, numbers: bool) -> RowProblem:
    expected = "a number, as in the rows before" if numbers else "a name, as in the rows before"
    fix = "Write all labels as numbers, or all as text in quotes."
    return RowProblem(record.path, record.row, "label", expected, shorten(label), fix, record.line)


def open_source(source: Source, accepted: tuple[type, ...] = ROW_TYPES, gold: bool = True) -> Opened:
    """Find out the format of a source by its first rows (of a streamed one only once: the answer is kept with its commit).

    ``gold``: False = the rows are to be predicted, and what they lack of label, tags or answers is no fault.
    Raises DataError when the file cannot be opened, has no rows, or its columns fit no format (listing both).
    """
    question = _question(source, accepted, gold) if source.streaming else ""
    seen = hub_set.recall(source, question) if source.streaming else None
    sample: list[Record | RowProblem] = []
    if seen is None:
        count = min(SAMPLED, source.limit or SAMPLED)
        sample = list(itertools.islice(_rows(source.model_copy(update={"limit": count})), count))
        if not sample:
            raise DataError(
                f"{source.label} has no rows. Expected at least one, such as "
                f"{columns.EXAMPLES.get(accepted[0], columns.EXAMPLES[Chat])}. Write some into it, or name another file."
            )
        keys = [tuple(item.value) for item in sample if isinstance(item, Record)]
    else:
        keys = [tuple(row) for row in seen["keys"]]
    if not keys:
        return Opened(source, accepted, None, "unknown: no row could be read", gold=gold)
    convert = converter(
        keys,
        path=source.label,
        accepted=accepted,
        format=source.format or ("conll" if _conll(source) else None),
        gold=gold,
        columns=source.columns,
        prompt_template=source.prompt_template,
    )
    facts = (
        convert.look(item for item in sample if isinstance(item, Record)) if seen is None else seen["facts"]
    )
    if source.separator and convert.form.gold != "labels":
        raise DataError(
            f"{source.label}: separator does nothing: the format is {convert.form.name}, which has no list of labels.\n"
            "  Leave it out, or name the column: columns: {labels: COLUMN}."
        )
    convert = replace(convert, facts=facts | {"separator": source.separator} if source.separator else facts)
    described = convert.describe(dict.fromkeys(key for row in keys for key in row))
    if seen is None:
        kinds = frozenset(
            kind for item in sample if isinstance(item, Record) for kind in _kinds(convert(item))
        )
        if source.streaming:
            hub_set.remember(
                source,
                question,
                {"keys": keys, "kinds": sorted(kind.__name__ for kind in kinds), "facts": facts},
            )
    else:
        kinds = frozenset(kind for kind in (*accepted, *ROW_TYPES) if kind.__name__ in seen["kinds"])
    return Opened(source, accepted, convert, described, kinds, gold)


def _rows(source: Source) -> Rows:
    return hub_set.rows(source) if source.hub else read(source.path, source.format)


def _kinds(row: Row | RowProblem) -> tuple[type, ...]:
    if isinstance(row, RowProblem):
        return ()
    return (
        (type(row), Chat) if isinstance(row, Answered) and not isinstance(row.prompt, str) else (type(row),)
    )


def _conll(source: Source) -> bool:
    return not source.hub and READERS.get(Path(source.path).suffix.lower()) is READERS[".conll"]


def _question(source: Source, accepted: tuple[type, ...], gold: bool) -> str:
    """Hash of all that the format of a source depends on, besides its rows."""
    asked = [
        source.format,
        source.columns,
        source.prompt_template,
        source.limit,
        gold,
        [kind.__name__ for kind in accepted],
    ]
    content = hashlib.sha256(json.dumps(asked).encode())
    for file in (columns.__file__, preference_fields.__file__, judgement_fields.__file__, ratings.__file__):
        content.update(Path(file).read_bytes())
    return content.hexdigest()[:16]


def eval_sources(config: DataConfig) -> dict[str, Source]:
    """The evaluation files that the recipe names: ``data.eval.sets``, or ``data.eval.path`` under the empty name; {} for neither.

    ``data.eval.path`` is read as the first training source is: its format, columns, separator and prompt_template, if given.
    """
    if config.eval.path is None:
        return dict(config.eval.sets or {})
    file = Source(path=config.eval.path, limit=config.eval.limit)
    asked = {
        key: getattr(config.train[0], key) for key in ("format", "columns", "separator", "prompt_template")
    }
    return {"": file.model_copy(update=asked)}
