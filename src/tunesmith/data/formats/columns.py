"""Formats: which columns a row may have, and the row type that they mean. One table, one entry for each format."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tunesmith.data.formats import judgement_fields, label_fields, preference_fields, squad_file, word_fields
from tunesmith.data.formats.fields import (
    SYSTEM,
    TOOLS,
    Columns,
    Field,
    FieldFault,
    Format,
    Values,
    optional_text,
    text,
)
from tunesmith.data.formats.turns import chat, conversation, exchange, opening_of, tool_schemas
from tunesmith.data.row_problems import Record, RowFault, RowProblem, shorten
from tunesmith.data.rows import Chat, Judged, Labelled, PromptCompletion, Question, Row, Tagged, Text
from tunesmith.errors import DataError
from tunesmith.suggestions import did_you_mean


def _alpaca(values: Values) -> Row:
    return Chat((*opening_of(values), {"role": "assistant", "content": text(values["output"], "output")}))


def _pair(question: str, answer: str) -> Callable[[Values], Row]:
    return lambda values: Chat(exchange(text(values[question], question), text(values[answer], answer)))


def _turns(field: str) -> Callable[[Values], Row]:
    return lambda values: chat(
        values[field], field, values.get("tools"), optional_text(values.get("system"), "system")
    )


def _prompt_completion(values: Values) -> Row:
    prompt, completion = values["prompt"], values["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return PromptCompletion(text(prompt, "prompt"), text(completion, "completion"))
    turns = conversation(prompt, "prompt"), conversation(completion, "completion")
    if not any(message["role"] == "assistant" for message in turns[1]):
        raise FieldFault(
            "completion", "a turn of the assistant", "none", "Add the answer to learn, or delete the row."
        )
    return Chat((*turns[0], *turns[1]), tool_schemas(values.get("tools")))


TEXT = Field(
    "text",
    ("text", "sentence", "document", "review", "content", "comment", "sentence1", "premise", "question1"),
)
PAIR = Field("text_pair", ("text_pair", "sentence2", "hypothesis", "question2"), required=False)
TOKENS, TAGS = (
    Field("tokens", ("tokens", "words")),
    Field("tags", ("ner_tags", "tags", "pos_tags", "chunk_tags")),
)

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        *preference_fields.PAIRS,
        Format("messages", Chat, (Field("messages", ("messages",)), TOOLS, SYSTEM), _turns("messages")),
        Format(
            "sharegpt",
            Chat,
            (Field("conversations", ("conversations", "conversation")), TOOLS, SYSTEM),
            _turns("conversations"),
        ),
        Format(
            "alpaca",
            Chat,
            (
                Field("instruction", ("instruction",)),
                Field("input", ("input", "context"), required=False),
                Field("output", ("output", "response")),
                SYSTEM,
                Field("history", ("history",), required=False),
            ),
            _alpaca,
            prompt="instruction",
            answer=("output",),
        ),
        Format(
            "prompt_completion",
            PromptCompletion,
            (Field("prompt", ("prompt",)), Field("completion", ("completion",)), TOOLS),
            _prompt_completion,
            prompt="prompt",
            answer=("completion",),
        ),
        Format(
            "input_output",
            Chat,
            (Field("input", ("input",)), Field("output", ("output",))),
            _pair("input", "output"),
            prompt="input",
            answer=("output",),
        ),
        Format(
            "summary",
            Chat,
            (
                Field("text", ("text", "document", "article", "dialogue")),
                Field("summary", ("summary", "highlights")),
            ),
            _pair("text", "summary"),
            prompt="text",
            answer=("summary",),
        ),
        Format(
            "question_answer",
            Chat,
            (
                Field("question", ("question", "q", "query", "prompt")),
                Field("answer", ("answer", "a", "response")),
            ),
            _pair("question", "answer"),
            prompt="question",
            answer=("answer",),
        ),
        Format(
            "squad",
            Question,
            (
                Field("question", ("question",)),
                Field("context", ("context",)),
                Field("answers", ("answers",)),
                Field("is_impossible", ("is_impossible",), required=False),
                Field("id", ("id",), required=False),
            ),
            squad_file.question,
            gold="answers",
        ),
        *preference_fields.RANKINGS,
        Format("tokens", Tagged, (TOKENS, TAGS), word_fields.tokens, gold="tags", look=word_fields.spaces),
        Format("conll", Tagged, (TOKENS, TAGS), word_fields.tokens, gold="tags", look=word_fields.spaces),
        Format("words", Tagged, (TEXT, TAGS), word_fields.words, gold="tags"),
        Format(
            "labelled",
            Labelled,
            (
                TEXT,
                PAIR,
                Field(
                    "label", ("label", "class", "category", "sentiment", "target", "score", "rating", "stars")
                ),
            ),
            label_fields.labelled,
            prompt="text",
            answer=("label",),
            gold="label",
        ),
        Format(
            "multilabel",
            Labelled,
            (TEXT, PAIR, Field("labels", ("labels", "classes", "categories"), several=True)),
            label_fields.multilabel,
            prompt="text",
            answer=("labels",),
            gold="labels",
            look=label_fields.vectors,
        ),
        Format(
            "text",
            Text,
            (Field("text", ("text",)),),
            lambda values: Text(text(values["text"], "text")),
            prompt="text",
        ),
        *judgement_fields.FORMATS,
        *judgement_fields.UNPAIRED,
    )
}
"""In the order in which they are tried (those with ``marks`` in a file first)."""

EXAMPLES: dict[type, str] = {
    Chat: '{"prompt": "...", "completion": "..."}',
    Labelled: '{"text": "...", "label": "..."}',
    Tagged: '{"tokens": ["Kim", "left"], "ner_tags": ["B-PER", "O"]}',
    Judged: '{"prompt": "...", "completion": "...", "label": true}',
    Question: '{"question": "...", "context": "...", "answers": {"text": ["..."], "answer_start": [0]}}',
}
"""A row as a file may have it."""

Names = str | tuple[str, ...]
"""The column that stands for a field, or several."""

PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Converter:
    """Makes rows of a source's records: its format, the column of each field (a tuple of several), the prompt's template if
    there is one, whether a row must have its ``gold``, and what the first rows say of the file (``facts``)."""

    form: Format
    columns: Mapping[str, Names]
    prompt_template: str | None = None
    gold: bool = True
    facts: Mapping[str, Any] | None = None

    def __call__(self, record: Record) -> Row | RowProblem:
        """The row, or what is wrong with it."""
        names, missing = _resolve(self, tuple(record.value))
        try:
            if missing:
                got = "the columns " + ", ".join(shorten(str(name))[1:-1] for name in list(record.value)[:8])
                raise FieldFault(missing, f"the column {missing!r}", got, "Add it, or delete the row.")
            values = self._values(record.value, names)
            if self.prompt_template is not None and self.form.prompt:
                values[self.form.prompt] = self._filled(record.value)
            return self.form.build({**values, **(self.facts or {}), "gold": self.gold})
        except FieldFault as fault:
            return self.problem(record, fault)

    def problem(self, record: Record, fault: FieldFault | RowFault) -> RowProblem:
        """What is wrong with a row, under the file's own column name: messages[2].content -> chat[2].content; of a field of
        several columns, labels.toxic -> toxic."""
        names, _ = _resolve(self, tuple(record.value))
        head, mark, rest = fault.field.partition("[")
        several, dot, part = head.partition(".")
        if dot and not isinstance(names.get(several, ""), str):
            head = part
        column = names.get(head, self.columns.get(head, head))
        field = (column if isinstance(column, str) else head) + mark + rest
        return RowProblem(record.path, record.row, field, fault.expected, fault.got, fault.fix, record.line)

    def _values(self, value: Mapping[str, Any], names: Mapping[str, Names]) -> dict[str, Any]:
        """Field -> value. Where gold is not asked for it is not looked at, right or wrong."""
        return {
            field: value[column]
            if isinstance(column, str)
            else {name: value[of] for name, of in zip(self.columns[field], column)}
            for field, column in names.items()
            if self.gold or field != self.form.gold
        }

    def look(self, records: Iterable[Record]) -> dict[str, Any]:
        """What the first rows say of the whole file, for ``facts``."""
        if self.form.look is None:
            return {}
        found = [(record.value, *_resolve(self, tuple(record.value))) for record in records]
        return self.form.look([self._values(value, names) for value, names, missing in found if not missing])

    def _filled(self, value: Mapping[str, Any]) -> str:
        def fill(match: re.Match[str]) -> str:
            if match[1] not in value:
                raise FieldFault(
                    match[1], f"the column {match[1]!r} of the prompt_template", "no such column", "Add it."
                )
            return text(value[match[1]], match[1])

        return PLACEHOLDER.sub(fill, self.prompt_template or "")

    def describe(self, columns: Iterable[str]) -> str:
        """``alpaca (instruction, output); not used: id``."""
        columns = list(columns)
        names, _ = _resolve(self, tuple(columns))
        said = {
            field: column if isinstance(column, str) else " + ".join(column)
            for field, column in names.items()
        }
        shown = [column if column == field else f"{field} <- {column}" for field, column in said.items()]
        filled = PLACEHOLDER.findall(self.prompt_template or "")
        if self.prompt_template is not None:
            shown.append(f"{self.form.prompt} <- {self.prompt_template!r}")
        used = {
            *filled,
            *(
                name
                for column in names.values()
                for name in ([column] if isinstance(column, str) else column)
            ),
        }
        unused = [column for column in columns if column not in used]
        halved = (
            "; each pair becomes two rows: chosen is desirable, rejected is undesirable"
            if self.unpairs
            else ""
        )
        return (
            f"{self.form.name} ({', '.join(shown)})"
            + (f"; not used: {', '.join(unused)}" if unused else "")
            + halved
        )

    @property
    def unpairs(self) -> bool:
        """Whether each pair of the file becomes two rows."""
        return self.form in judgement_fields.UNPAIRED


def _resolve(converter: Converter, keys: tuple[str, ...]) -> tuple[dict[str, Names], str | None]:
    mapped = tuple(sorted(converter.columns.items()))
    return _lookup(converter.form.name, keys, mapped, converter.prompt_template is not None, converter.gold)


@lru_cache(maxsize=4096)
def _lookup(
    name: str, keys: tuple[str, ...], mapped: tuple[tuple[str, Names], ...], templated: bool, gold: bool
) -> tuple[dict[str, Names], str | None]:
    """(field -> column of a row with these keys, the first required column that is missing)."""
    form, columns = FORMATS[name], dict(mapped)
    folded = {str(key).strip().casefold(): key for key in reversed(keys)}
    names: dict[str, Names] = {}
    missing = None
    for field in form.fields:
        if templated and field.name not in form.answer and field.name not in columns:
            continue
        asked = columns.get(field.name)
        wanted = [asked] if isinstance(asked, str) else asked or field.columns
        found = [(name, folded.get(name.strip().casefold())) for name in wanted]
        there = [column for _, column in found if column is not None]
        lacking = [name for name, column in found if column is None]
        if isinstance(asked, tuple) and not lacking:
            names[field.name] = tuple(there)
        elif there and not isinstance(asked, tuple):
            names[field.name] = there[0]
        elif (field.required or field.name in columns) and (gold or field.name != form.gold):
            missing = missing or lacking[0]
    return names, missing


def converter(
    keys: Sequence[tuple[str, ...]],
    *,
    path: str,
    accepted: tuple[type, ...],
    format: str | None = None,
    columns: Columns | None = None,
    prompt_template: str | None = None,
    gold: bool = True,
) -> Converter:
    """The converter of a source, from its first rows' column names and what the recipe says of it.

    ``accepted``: the row types the objective learns from. ``gold``: False = rows may lack it. Raises DataError when nothing
    fits, saying which columns there are.
    """
    mapped = {
        name: asked if isinstance(asked, str) else tuple(asked) for name, asked in (columns or {}).items()
    }
    if format is not None and format not in FORMATS:
        raise DataError(f"{path}: unknown format {format!r}. {did_you_mean(format, FORMATS)}")
    forms = [FORMATS[format]] if format else _detected(keys)
    _check_mapping(forms, mapped, path)
    forms = [
        form for form in forms if all(any(field.name == name for field in form.fields) for name in mapped)
    ]
    if prompt_template is not None:
        forms = _templated(forms, prompt_template, keys, path)
    for asked in (True,) if gold else (True, False):  # a file with gold is read with it
        makers = [Converter(form, mapped, prompt_template, asked) for form in forms]
        fits = {id(maker): sum(_resolve(maker, row)[1] is None for row in keys) for maker in makers}
        fitting = [maker for maker in makers if fits[id(maker)]]
        wanted = [maker for maker in fitting if _row_types(maker) & set(accepted)]
        if wanted:  # the first of the table that fits half of the rows: alpaca rows fit input_output too
            chosen = next((maker for maker in wanted if 2 * fits[id(maker)] >= len(keys)), wanted[0])
            return replace(chosen, gold=gold)
    names = ", ".join(row.__name__ for row in accepted)
    if fitting:
        found = fitting[0].form
        advice = (
            f"Choose another objective, or say which column is what, for example {_mapping(accepted, keys)}"
        )
        if Judged in accepted and found in preference_fields.PAIRS:
            name = judgement_fields.unpaired_name(found)
            advice = "To make two rows of each pair, the chosen answer desirable and the rejected one undesirable, "
            advice += f"name the format: {name} (on the command line: --format {name}). Or choose another objective."
        raise DataError(
            f"{path}: the format {found.name} gives {found.row.__name__} rows, but the objective learns from {names} rows.\n"
            f"  {advice}"
        )
    there = ", ".join(dict.fromkeys(str(key) for row in keys[:5] for key in row))
    tried = (
        f"the format {format} needs {_needs(FORMATS[format])}"
        if format
        else "no known format has these columns"
    )
    raise DataError(
        f"{path}: {tried}. Columns of the file: {there or 'none'}.\n"
        f"  Say which column is what, for example {_mapping(accepted, keys)}. Formats:\n"
        + "\n".join(f"    {maker.form.name}: {_needs(maker.form)}" for maker in _giving(accepted))
    )


def _detected(keys: Sequence[tuple[str, ...]]) -> list[Format]:
    """The formats that may be detected, in the order in which they are tried on rows with these columns."""
    there = {str(key).strip().casefold() for row in keys for key in row}
    forms = [form for form in FORMATS.values() if not form.by_name]
    return sorted(forms, key=lambda form: there.isdisjoint(form.marks))  # stable: the table's order otherwise


def _row_types(maker: Converter) -> set[type]:
    return {maker.form.row, Chat} if maker.form.name == "prompt_completion" else {maker.form.row}


def _giving(accepted: tuple[type, ...]) -> list[Converter]:
    """The formats that give such rows."""
    makers = [Converter(form, {}) for form in FORMATS.values() if not form.by_name]
    return [maker for maker in makers if _row_types(maker) & set(accepted)]


def _mapping(accepted: tuple[type, ...], keys: Sequence[tuple[str, ...]]) -> str:
    """``columns: {label: sentiment}``: what the nearest format lacks, with columns of the file that it does not use."""
    there = list(dict.fromkeys(str(key) for row in keys[:5] for key in row))
    makers = [Converter(FORMATS["prompt_completion"], {})] if Chat in accepted else _giving(accepted)
    tries = []
    for maker in makers:
        names, _ = _resolve(maker, tuple(there))
        needed = [field.name for field in maker.form.fields if field.required]
        lacking = [name for name in needed if name not in names] or needed
        tries.append((lacking, [column for column in there if column not in names.values()]))
    lacking, free = min(tries, key=lambda one: len(one[0]))
    pairs = list(zip(lacking, free if len(free) >= len(lacking) else ["COLUMN"] * len(lacking)))
    mapped = ", ".join(f"{field}: {column}" for field, column in pairs)
    typed = " ".join(f"--column {shlex.quote(f'{field}={column}')}" for field, column in pairs)
    marks = (
        f"; columns of 0 and 1, one for each label: {{labels: [{', '.join(free)}]}}"
        if lacking == ["label"] and free[1:]
        else ""
    )
    return f"columns: {{{mapped}}} (evaluate and predict: {typed}){marks}"


def _needs(form: Format) -> str:
    return " + ".join("|".join(field.columns) for field in form.fields if field.required)


def _check_mapping(forms: Sequence[Format], columns: Columns, path: str) -> None:
    known = {field.name: field.several for form in forms for field in form.fields}
    for name, asked in columns.items():
        if name not in known:
            raise DataError(
                f"{path}: columns: {name!r} is not a field of a format. {did_you_mean(name, known)}"
            )
        if not isinstance(asked, str) and not known[name]:
            several = ", ".join(field for field, may in known.items() if may) or "no field of it"
            raise DataError(
                f"{path}: columns: {name!r} is one column, got a list ({', '.join(asked)}). Several may stand for: {several}."
            )
    if not any(all(any(field.name == name for field in form.fields) for name in columns) for form in forms):
        lists = "; ".join(f"{form.name}: {', '.join(field.name for field in form.fields)}" for form in forms)
        raise DataError(
            f"{path}: columns: no format has all of the fields {', '.join(columns)}. Fields by format: {lists}"
        )


def _templated(
    forms: Sequence[Format], template: str, keys: Sequence[tuple[str, ...]], path: str
) -> list[Format]:
    """The formats whose prompt ``template`` can replace. A column of the template is not the answer."""
    used = PLACEHOLDER.findall(template)
    there = list(dict.fromkeys(key for row in keys for key in row))
    if not used:
        raise DataError(
            f"{path}: prompt_template {template!r} names no column. Write one in braces, for example 'Summarise: {{text}}'."
        )
    for name in used:
        if there and name not in there:
            raise DataError(
                f"{path}: prompt_template: no column {name!r}. {did_you_mean(name, map(str, there))}"
            )
    fitting = [form for form in forms if form.prompt]
    if not fitting:
        raise DataError(
            f"{path}: a prompt_template cannot be used with the format {forms[0].name}, whose prompts are turns"
        )
    named = [form for form in fitting if form.answer] if len(fitting) > 1 else fitting
    rest = [tuple(key for key in row if key not in used) for row in keys]
    good = [
        form for form in named if any(_resolve(Converter(form, {}, template), row)[1] is None for row in rest)
    ]
    return good or named
