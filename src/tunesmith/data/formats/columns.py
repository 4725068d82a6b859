"""The table of formats: the columns of a row, and the row type. Chooses the format of a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from tunesmith.data.formats import column_advice, judgement_fields, preference_fields, prompt_fields
from tunesmith.data.formats.column_mapping import Names, as_tuple, find_columns, fold, with_fields
from tunesmith.data.formats.fields import (
    SYSTEM,
    TOOLS,
    Columns,
    Field,
    FieldFault,
    Format,
    Values,
    are_python_text,
    optional,
    refuse_collection,
    require_text,
    required,
)
from tunesmith.data.formats.label_fields import build_labelled, build_multilabel, scan_vectors
from tunesmith.data.formats.preference_fields import build_prompt_completion, turns_from_json
from tunesmith.data.formats.record_values import (
    NUMERIC_FIELDS,
    STRUCTURED_FIELDS,
    numbers_to_text,
    unify_line_ends,
)
from tunesmith.data.formats.squad_file import build_question
from tunesmith.data.formats.turns import (
    MEDIA,
    alpaca_prompt,
    build_chat,
    exchange,
    refuse_media,
    with_system,
)
from tunesmith.data.formats.word_fields import build_tokens, build_words, scan_spaces
from tunesmith.data.row_problems import Record, RowFault, RowProblem, shorten
from tunesmith.data.rows import (
    Chat,
    Judged,
    Labelled,
    Prompt,
    PromptCompletion,
    Question,
    Ranking,
    Row,
    Tagged,
    Text,
)
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject
from tunesmith.suggestions import did_you_mean


def _build_alpaca(values: Values) -> Chat:
    *before, question = alpaca_prompt(values)
    return Chat((*before, *exchange(question["content"], values.answer("output"))))


def _single_exchange(name: str, question: Field, answer: Field, *more: Field) -> Format:
    """Return the format of a question and its answer.

    ``more``: further fields, such as a system prompt. A context is appended to the question after a blank
    line.
    """

    def build(values: Values) -> Chat:
        context = values.optional_text("context")
        asked = values.text(question.name) + (f"\n\n{context}" if context.strip() else "")
        return Chat(tuple(with_system(list(exchange(asked, values.answer(answer.name))), values)))

    return Format(name, Chat, (question, answer, *more), build, question.name, (answer.name,))


def _chat(turns: str) -> Callable[[Values], Chat]:
    return lambda values: build_chat(values, turns)


def _build_text(values: Values) -> Text:
    return Text(values.text("text"))


CHAT = (TOOLS, SYSTEM)
QUESTION = required("question", "q", "query", "prompt", "질문")
ANSWER = required("answer", "a", "response", "답변")
SUMMARISED = required("text", "document", "article", "dialogue", "본문")
SUMMARY = required("summary", "highlights", "요약")
TEXT = required(
    "text", "sentence", "document", "review", "content", "comment", "sentence1", "premise", "question1"
)
TEXTS = (TEXT, optional("text_pair", "sentence2", "hypothesis", "question2"))
LABEL = required("label", "class", "category", "sentiment", "target", "score", "rating", "stars")
LABELS = required("labels", "classes", "categories", several=True)
TAGS = required("tags", "ner_tags", "tags", "pos_tags", "chunk_tags")
TOKENS = (required("tokens", "words"), TAGS)
ALPACA = (
    required("instruction", "지시"), optional("input", "context", "입력"), required("output", "response", "출력"), SYSTEM,
    optional("history"),
)  # fmt: skip
COMPLETION = (required("prompt"), required("completion"), TOOLS, SYSTEM)
SQUAD = (
    required("question"), required("context"), required("answers"), optional("is_impossible"), optional("id"),
)  # fmt: skip

TABLE = (
    *(form for form in preference_fields.PAIRS if not form.marks),
    Format("messages", Chat, (required("messages"), *CHAT), _chat("messages")),
    Format("sharegpt", Chat, (required("conversations", "conversation"), *CHAT), _chat("conversations")),
    *(form for form in preference_fields.PAIRS if form.marks),
    Format("alpaca", Chat, ALPACA, _build_alpaca, "instruction", ("output",)),
    Format("prompt_completion", PromptCompletion, COMPLETION, build_prompt_completion, "prompt", ("completion",)),
    _single_exchange("input_output", required("input"), required("output"), SYSTEM),
    _single_exchange("summary", SUMMARISED, SUMMARY, SYSTEM),
    _single_exchange("question_answer", QUESTION, ANSWER, optional("context"), SYSTEM),
    Format("squad", Question, SQUAD, build_question, gold="answers", exact=("context", "answers")),
    *preference_fields.RANKINGS,
    Format("tokens", Tagged, TOKENS, build_tokens, gold="tags", scan=scan_spaces),
    Format("conll", Tagged, TOKENS, build_tokens, gold="tags", scan=scan_spaces),
    Format("words", Tagged, (TEXT, TAGS), build_words, gold="tags"),
    Format("labelled", Labelled, (*TEXTS, LABEL), build_labelled, "text", ("label",), "label"),
    Format("multilabel", Labelled, (*TEXTS, LABELS), build_multilabel, "text", ("labels",), "labels", scan_vectors),
    Format("text", Text, (required("text"),), _build_text, "text"),
    *judgement_fields.FORMATS,
    *judgement_fields.UNPAIRED,
    *prompt_fields.FORMATS,
)  # fmt: skip
FORMATS: dict[str, Format] = {form.name: form for form in TABLE}
"""In the order in which they are tried; formats with ``marks`` in a file come first."""

LANGUAGE_ROWS = (Chat, PromptCompletion, Ranking, Judged, Prompt)
"""Row types that are refused if the record has images, audio or video: their answers could describe these."""

COLUMN_NAMES = {"id", *(column for form in TABLE for part in form.fields for column in part.columns)}
"""Names of columns that a format reads, in lower case."""

EXAMPLES: dict[type, str] = {
    Chat: '{"prompt": "...", "completion": "..."}',
    Labelled: '{"text": "...", "label": "..."}',
    Tagged: '{"tokens": ["Kim", "left"], "ner_tags": ["B-PER", "O"]}',
    Judged: '{"prompt": "...", "completion": "...", "label": true}',
    Prompt: '{"prompt": "..."}',
    Question: '{"question": "...", "context": "...", "answers": {"text": ["..."], "answer_start": [0]}}',
}
"""A row of each type, as a file may have it."""

PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Converter:
    """Makes rows of records. ``columns``: the recipe's mapping. ``facts``: result of ``Format.scan``.
    ``prompts``: the rows are to be answered; their gold is read if it is present and valid."""

    form: Format
    columns: Mapping[str, Names]
    prompt_template: str | None = None
    gold: bool = True
    facts: JsonObject = field(default_factory=dict)
    prompts: bool = False

    def __call__(self, record: Record) -> Row | RowProblem:
        row = self._row(record)
        if self.prompts and self.gold and isinstance(row, RowProblem):
            return replace(self, gold=False)(record)
        return row

    def _row(self, record: Record) -> Row | RowProblem:
        names, missing = self.match(tuple(record.value))
        try:
            if missing:
                got = "the columns " + ", ".join(shorten(str(name))[1:-1] for name in list(record.value)[:8])
                raise FieldFault(missing, f"the column {missing!r}", got, "Add it, or delete the row.")
            if self.form.row in LANGUAGE_ROWS:
                refuse_media({key: record.value.get(key) for key in MEDIA if key not in names.values()})
            values = self._values(record.value, names)
            if self.prompt_template is not None and self.form.prompt:
                values[self.form.prompt] = self._fill_template(record.value)
            for name in self.facts.get("lists", ()):
                if name in values and turns_from_json(values[name]) is values[name]:
                    refuse_collection(values[name], name)
            unanswered = self.prompts and not self.gold
            row = self.form.build(Values(values | self.facts | {"gold": self.gold, "unanswered": unanswered}))
            return prompt_fields.with_columns(row, record.value, names) if isinstance(row, Prompt) else row
        except FieldFault as fault:
            return self.problem(record, fault)

    def match(self, keys: tuple[str, ...]) -> tuple[dict[str, Names], str | None]:
        """(field -> column of a row with these keys, the first required column that the row lacks)."""
        mapped = tuple(sorted(self.columns.items()))
        return _match(self.form.name, keys, mapped, self.prompt_template is not None, self._left_out)

    @property
    def _left_out(self) -> tuple[str, ...]:
        """Fields that are not read: gold that is not required, and answers of rows to be answered."""
        if self.gold:
            return ()
        answers = self.form.answer if self.prompts and self.form.row in (Chat, PromptCompletion) else ()
        return (*answers, *((self.form.gold,) if self.form.gold else ()))

    def count(self, keys: Sequence[tuple[str, ...]]) -> int:
        """Count the rows that have all required columns."""
        return sum(self.match(row)[1] is None for row in keys)

    def problem(self, record: Record, fault: FieldFault | RowFault) -> RowProblem:
        """A row's problem under the file's column names: messages[2].content -> chat[2].content."""
        names, _ = self.match(tuple(record.value))
        head, bracket, rest = fault.field.partition("[")
        name, dot, part = head.partition(".")
        if dot and not isinstance(names.get(name, ""), str):
            head = part
        column = names.get(head, self.columns.get(head, head))
        place = (column if isinstance(column, str) else head) + bracket + rest
        return record.problem(place, fault.expected, fault.got, fault.fix)

    def _values(self, record: JsonObject, names: Mapping[str, Names]) -> Values:
        """Return field -> value. Gold is left out where it is not needed, so that invalid gold raises no error."""
        values = Values()
        for name, column in names.items():
            if name in self._left_out:
                continue
            if isinstance(column, str):
                values[name] = self._value(name, record[column])
            else:
                values[name] = {asked: record[key] for asked, key in zip(self.columns[name], column)}
        return values

    def _value(self, name: str, value: object) -> object:
        """Return the value of the field ``name`` with unified line ends and, if configured, numbers as
        text."""
        if self.facts.get("numbers_as_text") and name not in NUMERIC_FIELDS:
            value = numbers_to_text(value)
        return value if name in self.form.exact else unify_line_ends(value)

    def scan(self, records: Iterable[Record]) -> JsonObject:
        """Facts about the whole file, from its first rows."""
        matches = [(record.value, *self.match(tuple(record.value))) for record in records]
        sample = [self._values(value, names) for value, names, missing in matches if not missing]
        text_fields = [part.name for part in self.form.fields if part.name not in STRUCTURED_FIELDS]
        lists = [name for name in text_fields if are_python_text([values.get(name) for values in sample])]
        facts = self.form.scan(sample) if self.form.scan else {}
        return facts | ({"lists": lists} if lists else {})

    def _fill_template(self, record: JsonObject) -> str:
        def fill(match: re.Match[str]) -> str:
            name = match[1]
            if name not in record:
                expected = f"the column {name!r} of the prompt_template"
                raise FieldFault(name, expected, "no such column", "Add it.")
            return require_text(self._value(name, record[name]), name)

        return PLACEHOLDER.sub(fill, self.prompt_template or "")

    def describe(self, columns: Iterable[str]) -> str:
        """``alpaca (instruction, output); not used: id``."""
        columns = list(columns)
        names = {name: as_tuple(column) for name, column in self.match(tuple(columns))[0].items()}
        used = {
            *PLACEHOLDER.findall(self.prompt_template or ""),
            *(key for keys in names.values() for key in keys),
        }
        parts = [name if keys == (name,) else f"{name} <- {' + '.join(keys)}" for name, keys in names.items()]
        if self.prompt_template is not None:
            parts.append(f"{self.form.prompt} <- {self.prompt_template!r}")
        text = f"{self.form.name} ({', '.join(parts)})"
        used |= {name.partition(".")[0] for name in used}
        unused = [column for column in columns if column not in used]
        kept = "columns for rewards" if self.form.row is Prompt else "not used"
        text += f"; {kept}: {', '.join(unused)}" if unused else ""
        if self.form.better and self.gold and not self.splits_pairs:
            text += f"; {self.form.better({name: ' + '.join(keys) for name, keys in names.items()})}"
        if self.splits_pairs:
            text += "; each pair becomes two rows: chosen is desirable, rejected is undesirable"
        return text

    @property
    def splits_pairs(self) -> bool:
        """True if each pair of the file becomes two rows."""
        return self.form in judgement_fields.UNPAIRED

    @property
    def row_types(self) -> set[type]:
        """The types of the rows: prompt and completion become a Chat where they are turns."""
        return {self.form.row, Chat} if self.form.row is PromptCompletion else {self.form.row}


@lru_cache(maxsize=4096)
def _match(
    name: str,
    keys: tuple[str, ...],
    mapped: tuple[tuple[str, Names], ...],
    templated: bool,
    left_out: tuple[str, ...],
) -> tuple[dict[str, Names], str | None]:
    """``Converter.match``, with hashable arguments."""
    form, columns = FORMATS[name], dict(mapped)
    folded = {fold(str(key)): key for key in reversed(keys)}
    names: dict[str, Names] = {}
    missing = None
    for part in form.fields:
        if templated and part.name not in form.answer and part.name not in columns:
            continue
        column, lacking = find_columns(part, columns.get(part.name), folded)
        if column != ():
            names[part.name] = column
        elif (part.required or part.name in columns) and part.name not in left_out:
            missing = missing or lacking
    return names, missing


def candidates(
    keys: Sequence[tuple[str, ...]],
    path: str,
    format: str | None,
    columns: Columns | None,
    prompt_template: str | None,
) -> list[tuple[Format, dict[str, Names]]]:
    """Return the formats that rows with these columns may have, each with the mapping of its fields."""
    mapped = {name: to if isinstance(to, str) else tuple(to) for name, to in (columns or {}).items()}
    if format is not None and format not in FORMATS:
        raise DataError(f"{path}: unknown format {format!r}. {did_you_mean(format, FORMATS)}")
    pairs = with_fields([FORMATS[format]] if format else _detectable(keys), mapped, path)
    if prompt_template is not None:
        forms = _with_prompt([form for form, _ in pairs], prompt_template, keys, path)
        pairs = [pair for pair in pairs if pair[0] in forms]
    return pairs


def choose_converter(
    keys: Sequence[tuple[str, ...]],
    *,
    path: str,
    accepted: tuple[type, ...],
    format: str | None = None,
    columns: Columns | None = None,
    prompt_template: str | None = None,
    gold: bool = True,
) -> Converter:
    """Choose the format of a source from the column names of its first rows, ``keys``, and the recipe.

    ``accepted``: row types that the objective trains on. ``gold``: False = rows may lack it. Raises
    DataError, which lists the columns of the file, if no format fits."""
    pairs = candidates(keys, path, format, columns, prompt_template)
    for needs_gold in (True,) if gold else (True, False):  # gold is read if the rows have it
        converters = [Converter(form, mapped, prompt_template, needs_gold) for form, mapped in pairs]
        fitting = [(count, converter) for converter in converters if (count := converter.count(keys))]
        wanted = [(count, converter) for count, converter in fitting if converter.row_types & set(accepted)]
        if (
            wanted
        ):  # the first format of the table that fits half of the rows: alpaca rows fit input_output too
            most = (converter for count, converter in wanted if 2 * count >= len(keys))
            return replace(next(most, wanted[0][1]), gold=gold)
    # almost any file has a column of prompts, so that alone does not tell what the file was meant for
    others = [maker.form for _, maker in fitting if format or maker.form.row is not Prompt]
    if others:
        raise DataError(f"{path}: {column_advice.other_rows(others, TABLE, accepted, keys)}")
    raise DataError(f"{path}: {column_advice.no_format(format, TABLE, accepted, keys)}")


def _detectable(keys: Sequence[tuple[str, ...]]) -> list[Format]:
    """The formats that may be detected, in the order in which they are tried on rows with these columns."""
    folded = {fold(column) for column in column_advice.columns_of(keys)}
    forms = [form for form in FORMATS.values() if not form.by_name]
    return sorted(forms, key=lambda form: folded.isdisjoint(form.marks))  # stable: else in the table's order


def _with_prompt(
    forms: Sequence[Format], template: str, keys: Sequence[tuple[str, ...]], path: str
) -> list[Format]:
    """The formats whose prompt ``template`` can replace, with an answer that the template does not use."""
    used, there = PLACEHOLDER.findall(template), column_advice.columns_of(keys)
    if not used:
        raise DataError(
            f"{path}: prompt_template {template!r} names no column. Write one in braces, for example 'Summarise: {{text}}'."
        )
    for name in used:
        if there and name not in there:
            raise DataError(f"{path}: prompt_template: no column {name!r}. {did_you_mean(name, there)}")
    fitting = [form for form in forms if form.prompt]
    if not fitting:
        raise DataError(
            f"{path}: a prompt_template conflicts with the format {forms[0].name}, whose prompts are turns"
        )
    alone = len(fitting) == 1
    answering = [form for form in fitting if form.answer or form.row is Prompt or alone]
    rest = [tuple(key for key in row if key not in used) for row in keys]
    return [
        form for form in answering if any(Converter(form, {}, template).match(row)[1] is None for row in rest)
    ] or answering
