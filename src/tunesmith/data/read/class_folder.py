"""A folder with a folder for each class: every .txt file in it is a row, and its folder's name the label."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tunesmith import files
from tunesmith.data.row_problems import Record, RowProblem


def is_one(path: str) -> bool:
    """Whether a path is such a folder."""
    return Path(path).expanduser().is_dir() and any(_files(path))


def rows(path: str) -> Iterator[Record | RowProblem]:
    """``text`` and ``label`` of every file, classes and files by name. Rows are counted over all files; each names its own."""
    for row, file in enumerate(_files(path), 1):
        try:
            text = file.read_bytes().decode(
                "utf-8-sig", "surrogateescape"
            )  # formats reports bytes that are not UTF-8
        except OSError as error:
            fix = "Make it readable, or take it away."
            yield RowProblem(str(file), row, "file", "a file that can be read", str(error), fix)
            continue
        yield Record(str(file), row, None, {"text": text.rstrip("\r\n"), "label": file.parent.name})


def place(path: str, file: str) -> str | None:
    """Where under the folder ``path`` a file of such a folder stands, whichever copy of it was read; None of other sources."""
    return str(Path(path, *Path(file).parts[-2:])) if is_one(path) else None


def content_hash(path: str) -> str:
    """sha256 of the names and contents of all files, in the order in which they are read."""
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
