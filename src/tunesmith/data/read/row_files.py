"""Reads data files row by row, in memory that does not grow with the file.

A row that cannot be read is a ``RowProblem``. Only a file that cannot be opened raises.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from tunesmith.data.formats.fields import Columns
from tunesmith.data.read import builtin, class_folder
from tunesmith.data.read.conll import read_conll
from tunesmith.data.read.csv_table import read_table, txt_layout
from tunesmith.data.read.json_rows import read_json, read_jsonl
from tunesmith.data.read.text_file import GZIP, UNPACK_ERRORS, ending, is_lfs_pointer, open_text, text_reader
from tunesmith.data.row_problems import Record, RowProblem, shorten
from tunesmith.errors import DataError, MissingExtra
from tunesmith.suggestions import typo_matches

Rows = Iterator[Record | RowProblem]
Reader = Callable[[Path, str], Rows]

LISTED = 8
"""Names of data files that a message lists."""

UNPACKERS = {
    ".zip": "unzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".tar": "tar xf", ".tgz": "tar xf", ".7z": "7z x",
}  # fmt: skip
"""Type of a packed file that is not read -> the command that unpacks it."""


def read(path: str, format: str | None = None, columns: Columns | None = None) -> Rows:
    """Every row of a data file, a class folder or a built-in set. With the ``format`` conll the name does not
    matter. ``columns``: of the recipe; where it maps column numbers, a csv file has no header.

    Raises DataError if the file is missing (with the nearest names), another folder, or of an unknown type,
    and MissingExtra for parquet without pyarrow."""
    if path.startswith(builtin.PREFIX):
        numbered = enumerate(builtin.rows(path), 1)
        return (Record(path, row, None, value, group) for row, (value, group) in numbered)
    if class_folder.is_class_folder(path):
        return class_folder.rows(path)
    file = existing(path)
    numbers = column_numbers(columns)
    kind = ".conll" if format == "conll" else ending(file)
    if kind == ".txt" and (numbers or (layout_of(file) == "header" and (columns or format != "text"))):
        kind = ".tsv"
    reader = reader_of(kind, numbers)
    if reader is None:
        raise DataError(f"{path}: {_unknown_type(file)}")
    return reader(file, path)


def reader_of(kind: str, numbers: frozenset[str] = frozenset()) -> Reader | None:
    """Return the reader of a file type, such as ``.csv``; None for an unknown type.

    ``numbers``: column numbers that the recipe maps, in a table without a header."""
    if numbers and kind in DELIMITERS:
        return _table_reader(DELIMITERS[kind], numbers)
    return READERS.get(kind)


def column_numbers(columns: Columns | None) -> frozenset[str]:
    """Return the columns of a mapping that are numbers: "1", "2", ..."""
    mapped = [[to] if isinstance(to, str) else to for to in (columns or {}).values()]
    return frozenset(column for names in mapped for column in names if column.isascii() and column.isdigit())


def layout_of(file: Path) -> str | None:
    """Return ``csv_table.txt_layout`` of a .txt file; None if it cannot be unpacked."""
    try:
        with open_text(file) as handle:
            return txt_layout(handle)
    except UNPACK_ERRORS:
        return None


def _unknown_type(file: Path) -> str:
    """Return the message for a file of unknown type: what it looks like, and how to rename or convert it."""
    suffix = file.suffix.lower()
    kind = f"unknown file type {file.suffix!r}" if suffix else "its name has no file type"
    expected = f"{kind}. Expected one of {', '.join(READERS)} (packed: {GZIP} of the text files)."
    if suffix in UNPACKERS:
        return f"{expected} Unpack it: {UNPACKERS[suffix]} {file.name}"
    match looks_like(file):
        case ".conll":
            return (
                f"{expected}\n  Its lines look like CoNLL: set format: conll (data.train.0.format=conll; on the command line "
                "--format conll)."
            )
        case ".jsonl":
            return f"{expected}\n  Its lines look like JSON. Rename it: mv {file.name} {file.stem}.jsonl"
    return f"{expected} Convert it, or give it the ending of what it holds."


def looks_like(file: Path) -> str | None:
    """Return ``.jsonl`` or ``.conll`` if the first lines of a file look like it, else None."""
    with file.open("rb") as handle:
        content = handle.read(1 << 14)
    text = content.decode("utf-8-sig", "replace").rpartition("\n")[0]
    if text.startswith("{"):
        try:
            return ".jsonl" if isinstance(json.loads(text.partition("\n")[0]), dict) else None
        except (RecursionError, ValueError):
            return None
    items = list(read_conll(io.StringIO(text), file.name))
    tagged = [item for item in items if isinstance(item, Record) and "tags" in item.value]
    return ".conll" if len(items) > 1 and 2 * len(tagged) > len(items) else None


def existing(path: str) -> Path:
    """``path`` as a file that can be opened, or DataError."""
    file = Path(path).expanduser()
    try:
        pointer = is_lfs_pointer(file)
    except FileNotFoundError:
        raise DataError(f"data file not found: {path}. {_hint(file)}") from None
    except IsADirectoryError:
        raise DataError(
            f"{path} is a folder, and has no folder of .txt files for each class. Name a file in it, one source for each file."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path!r} cannot be opened: {error}") from None
    if pointer:
        raise DataError(
            f"{path} is a Git LFS pointer ({file.stat().st_size} bytes), not the data. Type: git lfs pull --include {file.name}"
        )
    return file


def _hint(missing: Path) -> str:
    """Suggest an existing file in place of one that does not exist."""
    folder = missing.parent
    if not folder.is_dir():
        return f"There is no folder {folder}. Check the path."
    names = sorted(entry.name for entry in folder.iterdir() if ending(entry) in READERS and entry.is_file())
    if close := typo_matches(missing.name, names):
        return f"Did you mean {' or '.join(close)}?"
    more = ", ..." if len(names) > LISTED else ""
    listed = f"Data files in {folder.resolve()}: {', '.join(names[:LISTED])}{more}"
    none = f"No data file is in {folder.resolve()}"
    return f"{listed if names else none}. Check the name and the folder."


def _documents(handle: TextIO, path: str) -> Rows:
    """One document per line that is not blank."""
    lines = ((number, line.rstrip("\n")) for number, line in enumerate(handle, 1) if line.strip())
    for row, (number, text) in enumerate(lines, 1):
        yield Record(path, row, number, {"text": text})


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


def _table_reader(delimiter: str | None, numbers: frozenset[str] = frozenset()) -> Reader:
    return text_reader(lambda handle, path: read_table(handle, path, delimiter, numbers), newline="")


DELIMITERS = {".csv": None, ".tsv": "\t"}
_CONLL = text_reader(read_conll)

READERS: dict[str, Reader] = {
    ".json": text_reader(read_json),
    ".jsonl": text_reader(read_jsonl),
    ".ndjson": text_reader(read_jsonl),
    **{kind: _table_reader(delimiter) for kind, delimiter in DELIMITERS.items()},
    ".txt": text_reader(_documents),
    ".parquet": _read_parquet,
    ".conll": _CONLL,
    ".bio": _CONLL,
    ".iob": _CONLL,
}
