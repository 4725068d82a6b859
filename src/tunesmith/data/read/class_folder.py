"""A folder of one folder per class: every .txt file is a row, and its label is the name of its folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tunesmith import files
from tunesmith.data.row_problems import Record, RowProblem


def is_class_folder(path: str) -> bool:
    """True if a folder in the folder ``path`` has a .txt file."""
    return Path(path).expanduser().is_dir() and any(_files(path))


def rows(path: str) -> Iterator[Record | RowProblem]:
    """``text`` and ``label`` of every file, sorted by class and name. Rows are counted over all files."""
    for row, file in enumerate(_files(path), 1):
        try:
            content = file.read_bytes()
        except OSError as error:
            fix = "Make it readable, or remove it."
            yield RowProblem(str(file), row, "file", "a file that can be read", str(error), fix)
            continue
        text = content.decode("utf-8-sig", "surrogateescape")  # formats report bytes that are not UTF-8
        yield Record(str(file), row, None, {"text": text.rstrip("\r\n"), "label": file.parent.name})


def path_in_folder(path: str, file: str) -> str | None:
    """The path of a file below the class folder ``path``, whichever copy of it was read; else None."""
    return str(Path(path, *Path(file).parts[-2:])) if is_class_folder(path) else None


def content_hash(path: str) -> str:
    """sha256 of the names and contents of all files, in reading order."""
    content = hashlib.sha256()
    for file in _files(path):
        content.update(f"{file.parent.name}/{file.name}".encode("utf-8", "surrogateescape") + b"\0")
        content.update(bytes.fromhex(files.sha256(file)))
    return content.hexdigest()


def _files(path: str) -> Iterator[Path]:
    for folder in sorted(Path(path).expanduser().iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            yield from sorted(
                file for file in folder.iterdir() if file.suffix.lower() == ".txt" and file.is_file()
            )
