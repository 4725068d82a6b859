"""One source of a recipe, opened: its format is known, its rows have a type, its bad rows are problems."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.data_config import KEEP_IF, READING_KEYS, DataConfig, Source
from tunesmith.data.formats import column_advice, columns
from tunesmith.data.formats.columns import Converter, choose_converter
from tunesmith.data.formats.fields import FieldFault
from tunesmith.data.formats.judgement_fields import judgement_column, parse_judgement, split_pair
from tunesmith.data.formats.prompt_columns import choose_prompt_converter
from tunesmith.data.formats.record_values import with_nested
from tunesmith.data.read import hub_set, layout_advice
from tunesmith.data.read.row_files import READERS, Rows, read, reader_of
from tunesmith.data.read.text_file import ending
from tunesmith.data.row_problems import Record, RowFault, RowProblem, shorten
from tunesmith.data.rows import (
    ROW_TYPES,
    Answered,
    Chat,
    Judged,
    Labelled,
    Prompt,
    PromptCompletion,
    Ranking,
    Row,
    Text,
)
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLED = 100
"""Rows from which the format is detected."""


@dataclass(frozen=True)
class OpenedSource:
    """A source whose format is known; ``convert`` is None if none of its first rows could be read.

    ``accepted``: row types to return. ``description``: format and columns. ``gold``: rows must have gold.
    ``held_out``: rows are evaluated and never trained on.
    ``kinds``: types of the first rows, and Chat if answers are turns, which the template renders."""

    source: Source
    accepted: tuple[type, ...]
    convert: Converter | None
    description: str
    kinds: frozenset[type] = frozenset()
    gold: bool = True
    held_out: bool = False

    def rows(self) -> Iterator[tuple[Record, Row] | RowProblem]:
        """Yield each row with its record, or its problem. At most ``limit`` rows of the file are read.

        Where a pair becomes two rows, they follow each other with the same record."""
        numbers: bool | None = None  # the type of the first label decides for all
        for item in itertools.islice(_rows(self.source), self.source.limit):
            if isinstance(item, RowProblem):
                yield item
                continue
            if self.convert is None:
                continue
            row = self.convert(item)
            if isinstance(row, Labelled) and row.label is not None:
                is_number = not isinstance(row.label, str)
                numbers = is_number if numbers is None else numbers
                if is_number is not numbers:
                    expected = f"a {'number' if numbers else 'name'}, as in the rows before"
                    fix = "Write all labels as numbers, or all as text in quotes."
                    row = item.problem("label", expected, shorten(row.label), fix)
            if isinstance(row, RowProblem):
                yield row
            elif isinstance(row, Ranking) and self.convert.splits_pairs:
                yield from ((item, half) for half in split_pair(row))
            elif isinstance(row, self.accepted):
                yield item, row
            else:
                names = " or ".join(kind.__name__ for kind in self.accepted)
                fix = "Write all rows in one form, or choose another objective."
                yield item.problem("row", f"a {names} row", f"a {type(row).__name__} row", fix)

    def uses_template(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """True if the chat template renders the rows."""
        return Chat in self.kinds or (Prompt in self.kinds and bool(tokenizer.chat_template))

    def problem(self, record: Record, fault: RowFault) -> RowProblem:
        """The problem of a row that was read but cannot become an example."""
        assert self.convert is not None
        return self.convert.problem(record, fault)


def open_source(
    source: Source, accepted: tuple[type, ...] = ROW_TYPES, gold: bool = True, prompts: bool = False
) -> OpenedSource:
    """Detect the format of a source from its first rows. That of a stream is kept with its commit, and
    detected once.

    ``gold``: False = the rows are to be predicted, and may lack their label, tags or answers. ``prompts``:
    True = the rows are to be answered; their own answers are read if they are valid. Raises
    DataError if the file cannot be opened, has no rows, or no format has its columns."""
    question = _question(source, accepted, gold, prompts) if source.streaming else ""
    is_headed = layout_advice.txt_layout(source) == "header"
    seen = (hub_set.recall(source, question) if source.streaming else None) or {}
    records = [] if seen else _first_records(source, accepted)
    keys = [tuple(row) for row in seen.get("keys") or (record.value for record in records)]
    if not keys:
        return OpenedSource(source, accepted, None, "unknown: no row could be read", gold=gold)
    if is_headed and accepted == (Text,):
        raise layout_advice.prose_or_table(source, keys[0])
    try:
        convert = _choose_converter(source, accepted, gold, keys, prompts)
    except DataError as error:
        raise layout_advice.misread(source, keys[0]) or error from None
    if gold and not prompts and convert.form.row in (Chat, PromptCompletion):
        convert = _check_judgements(source, accepted, keys, records, convert)
        _check_last_turns(source, keys, records, convert)
    if is_headed and convert.form.row is Text:
        raise layout_advice.prose_or_table(source, keys[0])
    asked: JsonObject = {"separator": source.separator} if source.separator else {}
    asked |= {"numbers_as_text": True} if source.numbers_as_text else {}
    convert = replace(convert, facts=asked)
    try:
        facts = seen["facts"] if seen else convert.scan(records)
    except FieldFault as fault:
        raise DataError(f"{source.label}: {fault}") from None
    convert = replace(convert, facts=facts | asked)
    if not seen:
        names = {kind.__name__ for record in records for kind in _kinds(convert(record))}
        seen = {"keys": keys, "kinds": sorted(names), "facts": facts}
        if source.streaming:
            hub_set.remember(source, question, seen)
    kinds = frozenset(kind for kind in (*accepted, *ROW_TYPES) if kind.__name__ in seen["kinds"])
    description = convert.describe(dict.fromkeys(key for row in keys for key in row))
    if source.keep_if:
        description += f"; only rows whose {source.keep_if!r} is true"
    return OpenedSource(source, accepted, convert, description, kinds, gold)


def _choose_converter(
    source: Source,
    accepted: tuple[type, ...],
    gold: bool,
    keys: Sequence[tuple[str, ...]],
    prompts: bool = False,
) -> Converter:
    is_conll = not source.hub and reader_of(ending(source.path)) is READERS[".conll"]
    format = source.format or ("conll" if is_conll else None)
    if prompts:
        return choose_prompt_converter(
            keys, source.label, accepted, format, source.mapping, source.prompt_template
        )
    convert = choose_converter(
        keys, path=source.label, accepted=accepted, format=format, columns=source.mapping,
        prompt_template=source.prompt_template, gold=gold,
    )  # fmt: skip
    if source.separator and convert.form.gold != "labels":
        raise DataError(
            f"{source.label}: separator does nothing: the format {convert.form.name} has no list of labels.\n"
            "  Leave it out, or name the column: columns: {labels: COLUMN}."
        )
    return convert


def _check_judgements(
    source: Source,
    accepted: tuple[type, ...],
    keys: Sequence[tuple[str, ...]],
    records: Sequence[Record],
    convert: Converter,
) -> Converter:
    """Return the converter for rows of written text, of which a column may label each answer as good or bad.

    With such a column, rows are read as Judged if that type is accepted. If it is not, raises DataError
    unless the recipe keeps only the rows with good answers."""
    column = judgement_column([record.value for record in records])
    if column is None or (source.keep_if or "").strip().casefold() == column.strip().casefold():
        return convert
    if Judged in accepted:
        return convert if source.format else _choose_converter(source, (Judged,), True, keys)
    raise DataError(
        f"{source.label}: the column {column!r} says of each answer whether it is good, and this objective would train on "
        f"the bad ones, too.\n  To learn from both, set {column_advice.ADVICE[Judged]}.\n"
        f"  To train on the good answers alone, set {column_advice.typed({KEEP_IF: column})}."
    )


def _check_last_turns(
    source: Source, keys: Sequence[tuple[str, ...]], records: Sequence[Record], convert: Converter
) -> None:
    """Raise DataError if every conversation ends with a question and a pair of columns has its answers."""
    rows = [convert(record) for record in records]
    if not rows or any(isinstance(row, Chat) and row.messages[-1]["role"] == "assistant" for row in rows):
        return
    if not any(isinstance(row, RowProblem | Chat) for row in rows):
        return
    try:
        pairs = _choose_converter(source, (Ranking,), True, keys)
    except DataError:
        return
    message = column_advice.other_rows([pairs.form], columns.TABLE, (Chat,), keys)
    raise DataError(f"{source.label}: {message}")


def _first_records(source: Source, accepted: tuple[type, ...]) -> list[Record]:
    count = min(SAMPLED, source.limit or SAMPLED)
    sample = list(itertools.islice(_rows(source.model_copy(update={"limit": count})), count))
    if not sample:
        example = columns.EXAMPLES.get(accepted[0], columns.EXAMPLES[Chat])
        raise DataError(
            f"{source.label} has no rows. Expected at least one, such as {example}. Add rows, or name another file."
        )
    return [item for item in sample if isinstance(item, Record)]


def _rows(source: Source) -> Rows:
    rows = hub_set.rows(source) if source.hub else read(source.path, source.format, source.columns)
    if nested := source.nested_columns():
        rows = (
            replace(item, value=with_nested(item.value, nested)) if isinstance(item, Record) else item
            for item in rows
        )
    return rows if source.keep_if is None else _true_rows(rows, source.keep_if)


def _true_rows(rows: Rows, column: str) -> Rows:
    """Yield the rows whose ``column`` is true, and every problem."""
    for item in rows:
        if isinstance(item, Record):
            keys = {str(key).strip().casefold(): key for key in item.value}
            key = keys.get(column.strip().casefold())
            try:
                if key is None:
                    fix = "Name another column in columns: {keep_if: COLUMN}."
                    raise FieldFault(column, f"the column {column!r}", ", ".join(map(str, item.value)), fix)
                if not parse_judgement(item.value[key]):
                    continue
            except FieldFault as fault:
                item = item.problem(column, fault.expected, fault.got, fault.fix)
        yield item


def _kinds(row: Row | RowProblem) -> tuple[type, ...]:
    if isinstance(row, RowProblem):
        return ()
    has_turns = isinstance(row, Answered | Prompt) and not isinstance(row.prompt, str)
    return (type(row), Chat) if has_turns else (type(row),)


def _question(source: Source, accepted: tuple[type, ...], gold: bool, prompts: bool) -> str:
    """Hash of everything that the format of a source depends on, except its rows."""
    names = [kind.__name__ for kind in accepted]
    asked = [source.format, source.columns, source.prompt_template, source.limit, gold, prompts, names]
    asked.append(source.numbers_as_text)
    content = hashlib.sha256(json.dumps(asked).encode())
    for file in sorted(Path(columns.__file__).parent.glob("*.py")):
        content.update(file.read_bytes())
    return content.hexdigest()[:16]


def eval_sources(config: DataConfig) -> dict[str, Source]:
    """The evaluation sets of the recipe: ``data.eval.sets``, or ``data.eval.path`` under the empty name.

    The latter is read like the first training source, with its READING_KEYS."""
    if config.eval.path is None:
        return dict(config.eval.sets or {})
    asked = config.train[0].model_dump(include=set(READING_KEYS))
    return {"": Source(path=config.eval.path, limit=config.eval.limit).model_copy(update=asked)}
