"""Reads data files row by row, in memory that does not grow with the file.

What cannot be read is a ``RowProblem``, never an exception: only a file that cannot be opened at all raises.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tunesmith.data.formats.fields import FieldFault, clean
from tunesmith.data.read import builtin, class_folder
from tunesmith.data.read.conll import read_conll
from tunesmith.data.read.json_rows import read_json, read_jsonl
from tunesmith.data.row_problems import Record, RowProblem, shorten
from tunesmith.errors import DataError, MissingExtra
from tunesmith.suggestions import typo_matches

Rows = Iterator[Record | RowProblem]

LARGEST_FIELD = 1 << 27
"""Characters in one csv field; a quote that is never closed ends here."""


def read(path: str, format: str | None = None) -> Rows:
    """Every row of a json, jsonl, csv, tsv, txt, conll or parquet file, of a folder with one of texts for each class, or of a
    built-in data set (``builtin:docstrings``). With the ``format`` conll a file of any name is read as one.

    Raises DataError when the file is missing (naming the nearest files), is another folder, or is of an unknown kind, and
    MissingExtra for parquet without pyarrow.
    """
    if path.startswith(builtin.PREFIX):
        return (Record(path, row, None, value) for row, value in enumerate(builtin.rows(path), 1))
    if class_folder.is_one(path):
        return class_folder.rows(path)
    file = existing(path)
    reader = READERS.get(".conll" if format == "conll" else file.suffix.lower())
    if reader is None:
        kind = (
            f"unknown kind of file {file.suffix!r}"
            if file.suffix
            else "its name has no ending that says what it holds"
        )
        raise DataError(
            f"{path}: {kind}. Expected one of {', '.join(READERS)}. Rename it (mv {file.name} {file.stem}.jsonl), or convert it."
        )
    return reader(file, path)


def existing(path: str) -> Path:
    """``path`` as a file that is there and can be opened, or DataError."""
    file = Path(path).expanduser()
    try:
        with file.open("rb"):
            return file
    except FileNotFoundError:
        folder = file.parent
        if not folder.is_dir():
            raise DataError(
                f"data file not found: {path}. There is no folder {folder}. Check the path."
            ) from None
        names = sorted(
            entry.name for entry in folder.iterdir() if entry.suffix.lower() in READERS and entry.is_file()
        )
        close = typo_matches(file.name, names)
        more = ", ..." if len(names) > 8 else ""
        there = (
            f"Data files in {folder.resolve()}: {', '.join(names[:8])}{more}"
            if names
            else f"No data file is in {folder.resolve()}"
        )
        hint = f"Did you mean {' or '.join(close)}?" if close else f"{there}. Check the name and the folder."
        raise DataError(f"data file not found: {path}. {hint}") from None
    except IsADirectoryError:
        raise DataError(
            f"{path} is a folder without a folder of .txt files for each class; name a file in it, one source for each file"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path!r} cannot be opened: {error}") from None


def open_text(file: Path, newline: str | None = None) -> TextIO:
    """UTF-8 with or without a byte order mark. Bytes that are not UTF-8 become lone surrogates, which ``formats`` reports."""
    return file.open("r", encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _utf16(file: Path, path: str) -> RowProblem | None:
    with file.open("rb") as handle:
        start = handle.read(2)
    if start not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return None
    fix = f"Convert it: iconv -f UTF-16 -t UTF-8 {file.name} > fixed{file.suffix}"
    return RowProblem(path, 1, "file", "UTF-8 text", "UTF-16 text", fix, 1, fatal=True)


def _text_reader(
    rows: Callable[[TextIO, str], Rows], newline: str | None = None
) -> Callable[[Path, str], Rows]:
    """A reader of text files out of ``rows(handle, path)``."""

    def read_text(file: Path, path: str) -> Rows:
        problem = _utf16(file, path)
        if problem:
            yield problem
            return
        with open_text(file, newline) as handle:
            yield from rows(handle, path)

    return read_text


def _documents(handle: TextIO, path: str) -> Rows:
    """One document per line that is not blank."""
    row = 0
    for number, line in enumerate(handle, 1):
        text = line.rstrip("\n")
        if text.strip():
            row += 1
            yield Record(path, row, number, {"text": text})


def _table(handle: TextIO, path: str, delimiter: str | None) -> Rows:
    """A header line, then one row per record; quoted fields may hold line breaks."""
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_FIELD))
    start, first = next(((number, line) for number, line in enumerate(handle, 1) if line.strip()), (0, ""))
    if not first:
        return
    try:
        clean(first, "header")
    except FieldFault as fault:
        yield RowProblem(path, 1, "header", fault.expected, fault.got, fault.fix, start, fatal=True)
        return
    delimiter = delimiter or max(",;\t", key=first.count)
    try:
        header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter, strict=True))]
    except csv.Error as error:
        yield RowProblem(
            path,
            1,
            "header",
            "column names",
            f"{shorten(first)} ({error})",
            "Mend the first line.",
            start,
            fatal=True,
        )
        return
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        yield RowProblem(
            path,
            1,
            "header",
            "different column names",
            f"{doubled[0]!r} twice",
            "Rename one of them.",
            start,
            fatal=True,
        )
        return
    yield from _table_rows(csv.reader(handle, delimiter=delimiter, strict=True), header, path, start + 1)


def _table_rows(reader: Any, header: list[str], path: str, start: int) -> Rows:
    row = 0
    while True:
        line = start + reader.line_num
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row += 1
            open_quote = "end of data" in str(error) or "field limit" in str(error)
            got = "a quote that is never closed" if open_quote else str(error)
            fix = 'Close the quote; a quote inside a quoted field is written twice ("").'
            yield RowProblem(path, row, "line", "a csv record", got, fix, line, fatal=open_quote)
            continue
        if not values:
            continue
        row += 1
        if len(values) != len(header):
            fix = "Quote a field that holds the separator or a line break."
            yield RowProblem(
                path,
                row,
                "columns",
                f"{len(header)} columns ({', '.join(header)})",
                f"{len(values)}",
                fix,
                line,
            )
            continue
        yield Record(path, row, line, dict(zip(header, values, strict=True)))


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
