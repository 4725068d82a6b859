"""The records of a run: ``metrics.jsonl``, and every other file with one JSON object per line.

A figure that is not finite is a fact about the run. JSON has no number for it, so it is written as the string ``"nan"``,
``"inf"`` or ``"-inf"`` and read back as that float; it is never left out and never replaced by another number.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith import files
from tunesmith.errors import DataError

TIMING_KEYS = frozenset(
    (
        "time",
        "seconds",
        "eta_seconds",
        "tokens_per_second",
        "rows_per_second",
        "memory_bytes",
        "peak_memory_bytes",
    )
)
"""Keys of a record that may differ between two runs of the same recipe. All others repeat exactly."""

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Metrics:
    """The append-only file of a run's records, one JSON object per line.

    Opening it drops a last line that a kill left torn. A line reaches the operating system before ``append`` returns, so it
    outlives a kill; ``sync`` makes the lines outlive a power cut too, and is for the moment before a checkpoint is
    published, so that no checkpoint is newer than the records it continues.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            whole = _whole(self.path.read_bytes())
            if len(whole) != self.path.stat().st_size:
                files.replace_file(self.path, whole)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record. Raises DiskFullError when there is no room for it."""
        line = json.dumps(_to_json(record), ensure_ascii=False, allow_nan=False) + "\n"
        with files.naming_full_disk(self.path), self.path.open("ab") as file:
            file.write(line.encode())

    def rewind(self, step: int) -> None:
        """Drop every line past ``step``; the file is replaced in one piece, or not at all.

        A line without a step belongs to the step of the line before it.
        """
        kept: list[bytes] = []
        at = 0
        for line, record in _lines(self.path):
            at = record.get("step", at)
            if at <= step:
                kept.append(line)
        files.replace_file(self.path, b"".join(kept))

    def sync(self) -> None:
        """Force what was appended onto the disk."""
        if self.path.exists():
            with files.naming_full_disk(self.path), self.path.open("rb+") as file:
                os.fsync(file.fileno())


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, oldest first; none when there is no file. A torn last line is left out.

    Raises DataError when a line before the last is not a JSON object: no kill does that.
    """
    return [record for _, record in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line with its newline, record) of every whole line."""
    if not path.exists():
        return
    # Not bytes.splitlines: only a newline ends a line here.
    for number, line in enumerate(_whole(path.read_bytes()).split(b"\n")[:-1], start=1):
        record = _parse(line)
        if record is None:
            raise DataError(
                f"{path}, line {number}: expected one JSON object, got {line[:60]!r}\n"
                f"  The file was changed by something else than tunesmith; restore it, or delete the line."
            )
        yield line + b"\n", record


def _whole(content: bytes) -> bytes:
    """``content`` without a torn last line. A last line that lost only its newline is whole, and gets it back.

    A proper prefix of a JSON object is never itself one, so what parses was written to its end.
    """
    end = content.rfind(b"\n") + 1
    last = content[end:]
    if not last:
        return content
    return content + b"\n" if _parse(last) is not None else content[:end]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except ValueError:  # JSONDecodeError and UnicodeDecodeError: a cut may fall inside a character
        return None
    return _from_json(value) if isinstance(value, dict) else None


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, dict):
        return {key: _to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(inner) for inner in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _from_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_from_json(inner) for inner in value]
    return value
