"""The parts of a format, and checks of one value: text for a tokenizer, JSON for a template."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Row
from tunesmith.json_types import JsonObject

Columns = Mapping[str, str | Sequence[str]]
"""Field of the format -> column of the file, or several columns (the value is then {column: value})."""


class Values(JsonObject):
    """Field of the format -> value. Optional fields that the row lacks are absent.

    Further entries: the facts of ``scan``, "gold" (the row must have its gold) and "unanswered" (it is to be
    answered)."""

    def text(self, field: str) -> str:
        """The field as text that is not blank."""
        return require_text(self[field], field)

    def optional_text(self, field: str) -> str:
        """The field as text; the empty string if it is absent or None."""
        return optional_text(self.get(field), field)

    def answer(self, field: str) -> str:
        """The field as text that is not blank; the empty string if the row is to be answered."""
        return self.text(field) if self.needs_answer else ""

    @property
    def needs_answer(self) -> bool:
        """False if the row is to be answered."""
        return not self.get("unanswered", False)

    @property
    def needs_gold(self) -> bool:
        return bool(self.get("gold", True))


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a format. Its value is in the first of ``columns`` that the row has; case is ignored.

    ``several``: the recipe may map several columns of flags to it."""

    name: str
    columns: tuple[str, ...]
    required: bool = True
    several: bool = False


def required(name: str, *columns: str, several: bool = False) -> Field:
    """A required field. Its first column is ``name``, unless ``columns`` lists it elsewhere."""
    return Field(name, columns if name in columns else (name, *columns), several=several)


def optional(name: str, *columns: str) -> Field:
    """A field that a row may lack. Its first column is ``name``."""
    return Field(name, (name, *columns), required=False)


@dataclass(frozen=True, slots=True)
class Format:
    """The fields of a row as files write it, and the row type that they become.

    - ``build`` makes the row from the values. It raises FieldFault.
    - ``prompt``: the field that a ``prompt_template`` replaces. ``answer``: the fields kept next to it.
    - ``gold``: the field that rows to predict may lack.
    - ``scan`` returns facts about the whole file from the values of its first rows.
    - ``marks``: columns of this format alone. A file with one of them is tried as this format first.
    - ``better`` says which answers count as better, from {field: column}.
    - ``by_name``: the format is never detected; the recipe must name it.
    - ``exact``: fields whose line ends ``build`` unifies itself, because other values count their characters.
    """

    name: str
    row: type
    fields: tuple[Field, ...]
    build: Callable[[Values], Row]
    prompt: str | None = None
    answer: tuple[str, ...] = ()
    gold: str | None = None
    scan: Callable[[Sequence[Values]], JsonObject] | None = None
    marks: tuple[str, ...] = ()
    better: Callable[[Mapping[str, object]], str] | None = None
    by_name: bool = False
    exact: tuple[str, ...] = ()


TOOLS = optional("tools", "functions")
SYSTEM = optional("system", "system_prompt")


NO_COMMA = re.compile(r"""'\s+['"]|"\s+['"]""")
"""Two strings with nothing but white space between them."""


class FieldFault(Exception):
    """A field of a row is not what its format needs."""

    def __init__(self, field: str, expected: str, got: str, fix: str) -> None:
        super().__init__(f"{field}: expected {expected}, got {got}. {fix}")
        self.field, self.expected, self.got, self.fix = field, expected, got, fix


def require_text(value: object, field: str) -> str:
    """``value`` as text that is not blank."""
    fix = f"Fill {field!r} in or delete the row."
    if value is None:
        raise FieldFault(field, "text", "nothing (null)", fix)
    value = check_text(value, field)
    if not value.strip():
        raise FieldFault(field, "text", "only spaces" if value else "empty text", fix)
    return value


def optional_text(value: object, field: str) -> str:
    """``value`` as text; the empty string for None."""
    return "" if value is None else check_text(value, field)


def check_text(value: object, field: str) -> str:
    """Return ``value`` if it is a string of whole Unicode characters without NUL."""
    if not isinstance(value, str):
        fix = "Write it as a string, in quotes."
        if isinstance(value, list | tuple | Mapping):
            raise _collection_fault(value, field)
        if isinstance(value, int | float) and not isinstance(value, bool):
            fix = "Write it as a string, in quotes; or set numbers_as_text: true (data.train.0.numbers_as_text=true)."
        raise FieldFault(field, "text", shorten(value), fix)
    if "\0" in value:
        got = f"a NUL character after {value.index(chr(0))} characters"
        raise FieldFault(field, "text without NUL", got, "Remove it.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code, after = ord(value[error.start]), f"after {error.start} characters"
        if 0xDC80 <= code <= 0xDCFF:  # the reader keeps a byte that is not UTF-8 as this surrogate
            fix = "Save the file as UTF-8 (iconv -f CP949 -t UTF-8, say)."
            raise FieldFault(field, "UTF-8 text", f"the byte 0x{code - 0xDC00:02x} {after}", fix) from None
        got = f"half a surrogate pair (\\u{code:04x}) {after}"
        raise FieldFault(field, "Unicode text", got, "Write the whole character.") from None
    return value


def _collection_fault(value: object, field: str) -> FieldFault:
    """Return the error for a list or a mapping where text is expected."""
    got = f"a {'mapping' if isinstance(value, Mapping) else 'list'}: {shorten(value)}"
    name = re.split(r"[.\[]", field)[0]
    fix = (
        f"Write one text, or name the part that is text: columns: {{{name}: COLUMN.0}} for the first item of a list, "
        f"{{{name}: COLUMN.KEY}} for a key of a mapping."
    )
    return FieldFault(field, "text", got, fix)


def refuse_collection(value: object, field: str) -> None:
    """Raise FieldFault for the text of a list or a mapping."""
    found = parse_collection(value)
    if found is not None:
        raise _collection_fault(found, field)


def are_python_text(column: Sequence[object]) -> bool:
    """Return whether a column of texts holds lists or mappings as Python writes them, as pandas does in a csv.

    JSON alone does not show it: an answer may have to be JSON."""
    texts = [value for value in column if isinstance(value, str) and value.strip()]
    return (
        bool(texts)
        and all(parse_collection(value) is not None for value in texts)
        and any(_parse_json_text(value) is None for value in texts)
    )


def parse_collection(value: object) -> object:
    """Parse a list or mapping that came as text, of JSON, Python or a NumPy array; None for any other value."""
    if not isinstance(value, str) or (value.strip()[:1], value.strip()[-1:]) not in (("[", "]"), ("{", "}")):
        return None
    if (parsed := _parse_json_text(value)) is not None:
        return parsed
    return value.split() if NO_COMMA.search(value) else _parse_python(value)


def _parse_json_text(text: str) -> object:
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        return None


def check_nested_text(value: object, field: str) -> None:
    """Apply ``check_text`` to every string in nested lists and objects."""
    if isinstance(value, str):
        check_text(value, field)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, field)
            check_nested_text(item, f"{field}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_nested_text(item, f"{field}[{index}]")


def parse_json(value: object, field: str, expected: str) -> object:
    """Parse JSON text, as in csv columns and OpenAI's ``arguments``, or Python's text of a list or dict,
    which pandas writes into csv cells. Return other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (RecursionError, ValueError) as error:
        parsed = _parse_python(value)
        if parsed is not None:
            return parsed
        raise FieldFault(field, expected, f"{shorten(value)} ({error})", "Write valid JSON.") from None


def _parse_python(text: str) -> object:
    """Parse a list or dict that Python's ``repr`` wrote; return None for other text. NumPy's text of an
    array, ``['a' 'b']``, returns None, too: without the comma, Python would read one string."""
    if text.strip()[:1] not in ("[", "{") or NO_COMMA.search(text):
        return None
    try:
        return ast.literal_eval(text.strip())
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        return None


def check_list(value: object, field: str, expected: str, fix: str) -> Sequence[object]:
    """Return ``value`` if it is a list."""
    if not isinstance(value, list | tuple):
        raise FieldFault(field, expected, shorten(value), fix)
    return value


def parse_list(value: object, field: str, expected: str, fix: str) -> Sequence[object]:
    """``value`` as a list; it may have come as JSON text."""
    return check_list(parse_json(value, field, expected), field, expected, fix)


def without_nulls(value: object) -> object:
    """Return ``value`` without the null keys of nested objects.

    A column format such as parquet adds the keys of all rows to every object, with null where a row lacks
    them."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


FLAGS = {"0": False, "1": True, "false": False, "true": True}
"""True and False as files write them in text, in lower case."""


def flag(value: object) -> bool | None:
    """The meaning of a value that says yes or no; None for any other value."""
    return FLAGS.get(str(value).strip().lower())
