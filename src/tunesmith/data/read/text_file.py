"""Open the text of a data file: UTF-8 with or without a byte order mark, plain or packed by gzip."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from tunesmith.data.row_problems import Record, RowProblem

GZIP = ".gz"

LARGEST_RATIO = 100
"""Unpacked bytes per packed byte. Text has a ratio of 3 to 20; a much larger one may be an attack."""

SMALLEST_LIMIT = 1 << 26
"""Unpacked bytes that are allowed for a file of any size."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of the small file that Git LFS leaves in place of a large one."""

UNPACK_ERRORS = (gzip.BadGzipFile, zlib.error, EOFError)


class Oversized(gzip.BadGzipFile):
    """A file unpacks to more than LARGEST_RATIO times its size."""


class Unpacked(io.BufferedIOBase):
    """The content of a gzip file, at most LARGEST_RATIO times its size or SMALLEST_LIMIT bytes."""

    def __init__(self, file: Path) -> None:
        self.name = str(file)
        self._left = max(SMALLEST_LIMIT, LARGEST_RATIO * file.stat().st_size)
        self._packed = gzip.GzipFile(file, "rb")

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        return self.read1(-1 if size is None else size)

    def read1(self, size: int = -1) -> bytes:
        content = self._packed.read1(size if size >= 0 else io.DEFAULT_BUFFER_SIZE)
        self._left -= len(content)
        if self._left < 0:
            raise Oversized(f"text that unpacks to more than {LARGEST_RATIO} times the size of the file")
        return content

    def close(self) -> None:
        self._packed.close()
        super().close()


def is_packed(file: Path) -> bool:
    return file.suffix.lower() == GZIP


def ending(name: str | Path) -> str:
    """Return the file type in lower case: ``.jsonl`` for ``a.jsonl`` and for ``a.JSONL.gz``."""
    path = Path(name)
    return Path(path.stem if is_packed(path) else path).suffix.lower()


def open_text(file: Path, newline: str | None = None) -> TextIO:
    """Open UTF-8, with or without a byte order mark.

    Invalid bytes become surrogates, which ``formats`` reports.
    """
    if not is_packed(file):
        return file.open("r", encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    return io.TextIOWrapper(Unpacked(file), "utf-8-sig", "surrogateescape", newline)


def first_bytes(file: Path, count: int) -> bytes:
    """Return the first bytes of a file as stored on disk, packed or not."""
    with file.open("rb") as handle:
        return handle.read(count)


def is_lfs_pointer(file: Path) -> bool:
    content = first_bytes(file, 200)
    return content.startswith(LFS_POINTER) and b"\noid " in content


def text_reader(
    rows: Callable[[TextIO, str], Iterator[Record | RowProblem]], newline: str | None = None
) -> Callable[[Path, str], Iterator[Record | RowProblem]]:
    """Return a reader of files made of ``rows(handle, path)``, a reader of an open file."""

    def read_text(file: Path, path: str) -> Iterator[Record | RowProblem]:
        row = 0
        try:
            if not is_packed(file) and first_bytes(file, 2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                fix = f"Convert it: iconv -f UTF-16 -t UTF-8 {file.name} > fixed{file.suffix}"
                yield RowProblem(path, 1, "file", "UTF-8 text", "UTF-16 text", fix, 1, fatal=True)
                return
            with open_text(file, newline) as handle:
                for item in rows(handle, path):
                    row = item.row
                    yield item
        except UNPACK_ERRORS as error:
            fix = f"Pack it again, or unpack it: gunzip {file.name}"
            yield RowProblem(path, row + 1, "file", "a whole gzip file", str(error), fix, fatal=True)

    return read_text
