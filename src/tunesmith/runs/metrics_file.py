"""The records of a run: ``metrics.jsonl``, and every other file with one JSON object per line.

JSON has no number for a figure that is not finite. Such a figure is written as the string ``"nan"``,
``"inf"`` or ``"-inf"`` and read back as that float; it is never left out or replaced.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith import files
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject

TIMING_KEYS = frozenset((
    "time", "seconds", "eta_seconds", "tokens_per_second", "rows_per_second", "memory_bytes", "peak_memory_bytes",
    "rollout_seconds", "scoring_seconds", "logps_seconds", "update_seconds",
    "rollout_tokens_per_second", "scoring_tokens_per_second", "logps_tokens_per_second", "update_tokens_per_second",
))  # fmt: skip
"""Keys of a record that may differ between two runs of the same recipe. All others repeat exactly."""

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Metrics:
    """The append-only file of a run's records, one JSON object per line.

    Opening it drops an incomplete last line, which a kill leaves. ``append`` hands the line to the operating
    system before it returns, so the line survives a kill. ``sync`` makes the lines survive a power cut; call
    it before a checkpoint is published, so that no checkpoint is newer than its records.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            complete = _complete_lines(self.path.read_bytes())
            if len(complete) != self.path.stat().st_size:
                files.replace_file(self.path, complete)

    def append(self, record: JsonObject) -> None:
        """Write one record. Raises DiskFullError."""
        line = json.dumps(to_json(record), ensure_ascii=False, allow_nan=False) + "\n"
        with files.naming_full_disk(self.path), self.path.open("ab") as file:
            file.write(line.encode())

    def rewind(self, step: int) -> None:
        """Drop every line past ``step``, atomically. A line without a step has that of the line before."""
        kept: list[bytes] = []
        at = 0
        for line, record in _lines(self.path):
            at = record.get("step", at)
            if at <= step:
                kept.append(line)
        files.replace_file(self.path, b"".join(kept))

    def sync(self) -> None:
        """Force the appended lines onto the disk."""
        if self.path.exists():
            with files.naming_full_disk(self.path), self.path.open("rb+") as file:
                os.fsync(file.fileno())


def read(path: str | Path) -> list[JsonObject]:
    """Return the records of a file, oldest first, without an incomplete last line; [] if there is no file.

    Raises DataError if a line before the last is not a JSON object, which no kill causes.
    """
    return [record for _, record in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[bytes, JsonObject]]:
    """Yield (line with its newline, record) for every complete line."""
    if not path.exists():
        return
    # Not bytes.splitlines, which also splits at \r.
    for number, line in enumerate(_complete_lines(path.read_bytes()).split(b"\n")[:-1], start=1):
        record = _parse(line)
        if record is None:
            raise DataError(
                f"{path}, line {number}: expected one JSON object, got {line[:60]!r}\n"
                f"  Another program changed the file; restore it, or delete the line."
            )
        yield line + b"\n", record


def _complete_lines(content: bytes) -> bytes:
    """Return ``content`` without an incomplete last line; add the newline to one that lacks only that.

    A proper prefix of a JSON object is never a JSON object, so a line that parses is complete.
    """
    end = content.rfind(b"\n") + 1
    if end == len(content):
        return content
    return content[:end] if _parse(content[end:]) is None else content + b"\n"


def _parse(line: bytes) -> JsonObject | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except (
        ValueError,
        RecursionError,
    ):  # JSONDecodeError, or UnicodeDecodeError where the line ends inside a character
        return None
    return _from_json(value) if isinstance(value, dict) else None


def to_json(value: object, not_finite: Callable[[float], object] = lambda value: str(float(value))) -> object:
    """Convert paths to strings, tuples to lists and non-finite numbers by ``not_finite``."""
    if isinstance(value, float) and not math.isfinite(value):
        return not_finite(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(inner, not_finite) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner, not_finite) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _from_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_from_json(inner) for inner in value]
    return value
