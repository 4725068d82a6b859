"""Rows into a new JSON-lines file."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tunesmith import files
from tunesmith.errors import DiskError, UserError
from tunesmith.json_types import JsonObject


def lines(rows: Iterable[JsonObject]) -> Iterator[bytes]:
    """Each row as a line of JSON, in UTF-8."""
    for row in rows:
        yield (json.dumps(row, ensure_ascii=False) + "\n").encode()


def check_free(path: Path, option: str = "--out") -> None:
    """Raise UserError if ``path`` cannot become a new .jsonl file: call it before making the rows."""
    if path.suffix != ".jsonl":
        raise UserError(
            f"{path} must end in .jsonl, the format of the file. Type {option} {path.with_suffix('.jsonl')}"
        )
    if path.exists():
        raise UserError(f"{path} exists; nothing was written. Choose another name with {option}.")
    if not path.parent.is_dir():
        raise UserError(
            f"the folder {path.parent} of {path.name} does not exist. Make it, or choose another with {option}."
        )


def write(rows: Iterable[JsonObject], path: Path, option: str = "--out") -> str:
    """Write the rows into the new file ``path``, whole or not at all. Returns the sha256 of its bytes.

    Raises UserError, and DiskFullError when the disk fills up.
    """
    content = b"".join(lines(rows))
    try:
        with files.naming_full_disk(path), path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        check_free(path, option)
    except (OSError, DiskError) as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if isinstance(error, DiskError):
            raise
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return hashlib.sha256(content).hexdigest()


def shorten_row(row: JsonObject, longest: int = 400) -> str:
    """A row for people: each column under its name, long texts cut."""
    out = []
    for key, value in row.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = text if len(text) <= longest else text[:longest] + " ..."
        out.append(f"{key}:\n{text}" if "\n" in text else f"{key}: {text}")
    return "\n".join(out)
