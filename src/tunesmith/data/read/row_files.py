"""Reads data files row by row, in memory that does not grow with the file.

A row that cannot be read is a ``RowProblem``. Only a file that cannot be opened raises.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from tunesmith.data.formats.fields import FieldFault, check_text
from tunesmith.data.read import builtin, class_folder
from tunesmith.data.read.conll import read_conll
from tunesmith.data.read.json_rows import read_json, read_jsonl
from tunesmith.data.row_problems import Record, RowProblem, shorten
from tunesmith.errors import DataError, MissingExtra
from tunesmith.suggestions import typo_matches

Rows = Iterator[Record | RowProblem]

LARGEST_FIELD = 1 << 27
"""Characters of one csv field; the reader gives up on an unclosed quote after that many."""

LISTED = 8
"""Names of data files that a message lists."""


def read(path: str, format: str | None = None) -> Rows:
    """Every row of a data file, a class folder or a built-in set. With the ``format`` conll the name does not
    matter.

    Raises DataError if the file is missing (with the nearest names), another folder, or of an unknown type,
    and MissingExtra for parquet without pyarrow."""
    if path.startswith(builtin.PREFIX):
        return (Record(path, row, None, value) for row, value in enumerate(builtin.rows(path), 1))
    if class_folder.is_class_folder(path):
        return class_folder.rows(path)
    file = existing(path)
    reader = READERS.get(".conll" if format == "conll" else file.suffix.lower())
    if reader is None:
        kind = f"unknown file type {file.suffix!r}" if file.suffix else "its name has no file type"
        raise DataError(
            f"{path}: {kind}. Expected one of {', '.join(READERS)}. "
            f"Rename it (mv {file.name} {file.stem}.jsonl), or convert it."
        )
    return reader(file, path)


def existing(path: str) -> Path:
    """``path`` as a file that can be opened, or DataError."""
    file = Path(path).expanduser()
    try:
        with file.open("rb"):
            return file
    except FileNotFoundError:
        raise DataError(f"data file not found: {path}. {_hint(file)}") from None
    except IsADirectoryError:
        raise DataError(
            f"{path} is a folder, and has no folder of .txt files for each class. Name a file in it, one source for each file."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path!r} cannot be opened: {error}") from None


def _hint(missing: Path) -> str:
    """Suggest an existing file in place of one that does not exist."""
    folder = missing.parent
    if not folder.is_dir():
        return f"There is no folder {folder}. Check the path."
    names = sorted(
        entry.name for entry in folder.iterdir() if entry.suffix.lower() in READERS and entry.is_file()
    )
    if close := typo_matches(missing.name, names):
        return f"Did you mean {' or '.join(close)}?"
    more = ", ..." if len(names) > LISTED else ""
    listed = f"Data files in {folder.resolve()}: {', '.join(names[:LISTED])}{more}"
    none = f"No data file is in {folder.resolve()}"
    return f"{listed if names else none}. Check the name and the folder."


def open_text(file: Path, newline: str | None = None) -> TextIO:
    """Open UTF-8, with or without a byte order mark. Invalid bytes become surrogates, which ``formats``
    report."""
    return file.open("r", encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _is_utf16(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _text_reader(
    rows: Callable[[TextIO, str], Rows], newline: str | None = None
) -> Callable[[Path, str], Rows]:
    """A reader of UTF-8 files from a reader of ``rows(handle, path)``."""

    def read_text(file: Path, path: str) -> Rows:
        if _is_utf16(file):
            fix = f"Convert it: iconv -f UTF-16 -t UTF-8 {file.name} > fixed{file.suffix}"
            yield RowProblem(path, 1, "file", "UTF-8 text", "UTF-16 text", fix, 1, fatal=True)
            return
        with open_text(file, newline) as handle:
            yield from rows(handle, path)

    return read_text


def _documents(handle: TextIO, path: str) -> Rows:
    """One document per line that is not blank."""
    lines = ((number, line.rstrip("\n")) for number, line in enumerate(handle, 1) if line.strip())
    for row, (number, text) in enumerate(lines, 1):
        yield Record(path, row, number, {"text": text})


def _table(handle: TextIO, path: str, delimiter: str | None) -> Rows:
    """A header line, then one row per record; quoted fields may contain line breaks."""
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_FIELD))
    start, first = next(((number, line) for number, line in enumerate(handle, 1) if line.strip()), (0, ""))
    if not first:
        return
    delimiter = delimiter or max(",;\t", key=first.count)
    try:
        header = _header(first, delimiter)
    except FieldFault as fault:
        yield RowProblem(path, 1, "header", fault.expected, fault.got, fault.fix, start, fatal=True)
        return
    reader = csv.reader(handle, delimiter=delimiter, strict=True)
    row = 0
    while True:
        line = start + 1 + reader.line_num
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row += 1
            unclosed = "end of data" in str(error) or "field limit" in str(error)
            got = "a quote that is never closed" if unclosed else str(error)
            fix = 'Close the quote; a quote inside a quoted field is written twice ("").'
            yield RowProblem(path, row, "line", "a csv record", got, fix, line, fatal=unclosed)
            continue
        if not values:
            continue
        row += 1
        if len(values) == len(header):
            yield Record(path, row, line, dict(zip(header, values, strict=True)))
        else:
            expected = f"{len(header)} columns ({', '.join(header)})"
            fix = "Quote a field that contains the separator or a line break."
            yield RowProblem(path, row, "columns", expected, f"{len(values)}", fix, line)


def _header(line: str, delimiter: str) -> list[str]:
    """The column names of a csv file. Raises FieldFault."""
    check_text(line, "header")
    try:
        header = [name.strip() for name in next(csv.reader([line], delimiter=delimiter, strict=True))]
    except csv.Error as error:
        got = f"{shorten(line)} ({error})"
        raise FieldFault("header", "column names", got, "Correct the first line.") from None
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        got = f"{doubled[0]!r} twice"
        raise FieldFault("header", "different column names", got, "Rename one of them.")
    return header


def _read_parquet(file: Path, path: str) -> Rows:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra("pyarrow", "hub", f"reading {path}") from None
    row = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                row += 1
                yield Record(path, row, None, value)
    except (arrow.ArrowException, OSError, ValueError) as error:
        got = shorten(str(error).splitlines()[0] if str(error) else type(error).__name__, 100)
        yield RowProblem(path, row + 1, "file", "a parquet file", got, "Write the file again.", fatal=True)


_CONLL = _text_reader(read_conll)

READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".json": _text_reader(read_json),
    ".jsonl": _text_reader(read_jsonl),
    ".ndjson": _text_reader(read_jsonl),
    ".csv": _text_reader(lambda handle, path: _table(handle, path, None), newline=""),
    ".tsv": _text_reader(lambda handle, path: _table(handle, path, "\t"), newline=""),
    ".txt": _text_reader(_documents),
    ".parquet": _read_parquet,
    ".conll": _CONLL,
    ".bio": _CONLL,
    ".iob": _CONLL,
}
