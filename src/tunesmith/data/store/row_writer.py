"""Rows into a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError


def lines(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Each row as a line of JSON, in UTF-8."""
    for row in rows:
        yield (json.dumps(row, ensure_ascii=False) + "\n").encode()


def check_free(path: Path, option: str = "--out") -> None:
    """Raises UserError when ``path`` cannot become a new .jsonl file: better before the work than after it."""
    if path.suffix != ".jsonl":
        raise UserError(
            f"{path} does not end in .jsonl, which is what is written. Say {option} {path.with_suffix('.jsonl')}"
        )
    if path.exists():
        raise UserError(f"{path} exists; nothing was written. Give another name with {option}.")
    if not path.parent.is_dir():
        raise UserError(
            f"there is no folder {path.parent} to write {path.name} into. Make it first, or name another with {option}."
        )


def write(rows: Iterable[dict[str, Any]], path: Path, option: str = "--out") -> str:
    """Write the rows into the new file ``path``, whole or not at all. Returns the sha256 of its bytes."""
    content = b"".join(lines(rows))
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        check_free(path, option)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return hashlib.sha256(content).hexdigest()


def shorten_row(row: dict[str, Any], longest: int = 400) -> str:
    """A row to look at: each column under its name, long texts cut."""
    shown = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in row.items()
    }
    cut = {key: text if len(text) <= longest else text[:longest] + " ..." for key, text in shown.items()}
    return "\n".join(f"{key}:\n{text}" if "\n" in text else f"{key}: {text}" for key, text in cut.items())
