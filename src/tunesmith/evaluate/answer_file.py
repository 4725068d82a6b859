"""The file of answers of ``generate --out``: written while the answers come, and continued after a kill.

Answers are added to ``FILE.partial`` as they end. When all are there, they are written to FILE in the order
of the prompts, and ``FILE.manifest.json`` records what they were made with. The same command continues a
partial file, and does nothing for a complete one. Other settings, another model or other data are refused.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO

from tunesmith import files
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject
from tunesmith.runs import metrics_file
from tunesmith.runs.run_folder import flatten

HEADER = b'{"made_with": '
"""The beginning of a partial file."""
SHOWN_CHARACTERS = 80
"""Characters of a value that the difference of two manifests shows."""


def check_target(out: Path) -> None:
    """Raise UserError if ``out`` exists and ``generate`` did not write it, or cannot be written."""
    if out.exists() and not manifest_path(out).is_file():
        raise UserError(f"{out} exists already; name a new file with --out, or remove it")
    files.make_folder(out.parent)


def partial_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def manifest_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.manifest.json")


class AnswerFile:
    """The answers to ``count`` requests, in blocks of ``block``, that are kept in ``out``.

    ``made_with``: what the answers depend on, as plain JSON. ``exact``: an answer depends on its request alone,
    so a partial file keeps each of its answers; otherwise it keeps those of its complete blocks, because an
    answer may also depend on the rounding of a batch. ``restart``: begin again, whatever is there.
    """

    def __init__(
        self, out: Path, made_with: JsonObject, count: int, block: int, exact: bool, restart: bool = False
    ) -> None:
        self.out, self.made_with, self.count, self.block, self.exact = out, made_with, count, block, exact
        self._offsets = array("q", [-1]) * count
        self.done = 0
        """Answers that are in the file."""
        self.complete = False
        """``out`` has all answers already."""
        self._file: IO[bytes] | None = None
        self._restart = restart
        check_target(out)
        before = self._header()
        if restart:
            return
        if before is not None:
            self._require_same(before, partial_path(out))
        elif out.exists():
            self._require_same(_manifest(out), out)
            self.done, self.complete = count, True

    def __enter__(self) -> AnswerFile:
        if self.complete:
            return self
        with files.naming_full_disk(self.out):
            self._file = partial_path(self.out).open("a+b")
            self._lock(self._file)
            if self._restart:
                self._file.truncate(0)
            self._read_answers(self._file)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with files.naming_full_disk(partial_path(self.out)):  # the last write may have failed
                file.close()

    def has(self, index: int) -> bool:
        return self._offsets[index] >= 0

    def add(self, index: int, line: JsonObject) -> None:
        """Keep the answer to request ``index``; it survives a kill of this process."""
        assert self._file is not None
        with files.naming_full_disk(partial_path(self.out)):
            self._offsets[index] = self._file.seek(0, 2)
            self._file.write(_line({"index": index, "line": line}))
            self._file.flush()
        self.done += 1

    def finish(self) -> None:
        """Write all answers in order to ``out``, and what they were made with next to it."""
        assert self._file is not None and self.done == self.count
        files.replace_file(
            manifest_path(self.out), json.dumps(self.made_with, indent=1, ensure_ascii=False).encode()
        )
        with files.publish_file(self.out) as temporary, temporary.open("wb") as file:
            for offset in self._offsets:
                self._file.seek(offset)
                file.write(_line(json.loads(self._file.readline())["line"]))
        partial_path(self.out).unlink()

    def _header(self) -> JsonObject | None:
        """Return what the partial file was made with; None if there is none, or a kill cut its first line.

        Raises UserError for a file that ``generate`` did not write."""
        try:
            with partial_path(self.out).open("rb") as file:
                first = file.readline()
        except FileNotFoundError:
            return None
        if not first.endswith(b"\n") and first[: len(HEADER)] == HEADER[: len(first)]:
            return None
        try:
            header: JsonObject = json.loads(first)["made_with"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{partial_path(self.out)} exists already, and generate did not write it. Remove it, or name another --out."
            ) from None
        return header

    def _require_same(self, before: JsonObject, file: Path) -> None:
        old, new = flatten(before), flatten(json.loads(json.dumps(self.made_with)))
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if changed:
            lines = "".join(f"\n  {key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in changed)
            raise UserError(
                f"{file} exists already and was made with other settings:{lines}\n"
                "  To continue it, type the command that began it. To begin again, add --restart. To keep both, name another "
                "--out."
            )

    def _lock(self, file: IO[bytes]) -> None:
        with suppress(ImportError):  # Windows has no flock; the file is not locked there
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{partial_path(self.out)} is being written by another process. Wait for it, or name another --out."
                ) from None

    def _read_answers(self, file: IO[bytes]) -> None:
        """Find the answers in the partial file, and cut off what cannot be kept."""
        if self._header() is None:
            file.truncate(0)
            file.write(_line({"made_with": self.made_with}))
            file.flush()
            return
        file.seek(0)
        end = kept_end = len(file.readline())  # the header
        new: list[tuple[int, int]] = []  # index and place of the answers of a block that is not complete
        while (raw := file.readline()).endswith(b"\n"):
            try:
                index = int(json.loads(raw)["index"])
            except (ValueError, KeyError, TypeError):  # a power cut may leave anything after the last sync
                break
            new.append((index, end))
            end += len(raw)
            if self.exact or len(new) == min(self.block, self.count - self.done):
                for index, place in new:
                    self._offsets[index] = place
                self.done, kept_end, new = self.done + len(new), end, []
        file.truncate(kept_end)


def _manifest(out: Path) -> JsonObject:
    """Return what a complete file was made with. Raises UserError."""
    try:
        made_with: JsonObject = json.loads(manifest_path(out).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{manifest_path(out)} cannot be read ({error}): it was changed. Name another --out, or add --restart."
        ) from None
    return made_with


def read_lines(out: Path) -> Iterator[JsonObject]:
    """Yield the lines of a file of answers."""
    with out.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read_first(out: Path, count: int) -> list[JsonObject]:
    """Return the first lines of a file of answers."""
    return list(islice(read_lines(out), count))


def _line(value: JsonObject) -> bytes:
    """Return a line of JSON, with null for non-finite numbers."""
    plain = metrics_file.to_json(value, lambda number: None)
    return (json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
