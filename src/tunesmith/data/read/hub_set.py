"""``hub:OWNER/NAME``: a split of a data set of the Hub, pulled into a local store or streamed, always at one known commit.

``$TUNESMITH_HOME/datasets`` has a folder for each (data set, revision, configuration, split) that was pulled, with the files of
that split and a manifest; of a streamed one it has only the manifest, which says the commit. The commit stays until
``tunesmith data pull`` is typed again, whatever the owner of the data set does meanwhile.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith import files
from tunesmith.data.data_config import HUB_NAME, Source
from tunesmith.data.read.row_files import READERS, Rows
from tunesmith.data.row_problems import Record, RowProblem
from tunesmith.errors import DataError, MissingExtra
from tunesmith.hub import ask, local_store

_PLAN_SECONDS = 180
"""How long it may take to find out what is in a data set: with ten thousand files the Hub lists them page by page."""

_PROGRAM = "tunesmith.hub.splits"
_CACHES = ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE")

_READS_ALIKE = {
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "text": (".txt",),
    "parquet": (".parquet",),
}
"""Kinds of ``datasets`` whose files the readers here read, and the names that such files have."""


def place(source: Source) -> Path:
    """Where the store keeps a split, whether it is there or not."""
    repo, _ = _parts(source)
    key = hashlib.sha256(json.dumps([source.label, source.streaming]).encode()).hexdigest()[:12]
    return (
        files.home()
        / "datasets"
        / f"{repo.replace('/', '--')}-{re.sub('[^A-Za-z0-9]+', '_', source.split)}-{key}"
    )


def command(source: Source) -> str:
    """What to type to pull a source."""
    return " ".join([f"tunesmith data pull {source.path.removeprefix('hub:')}", *flags(source)])


def flags(source: Source) -> list[str]:
    """The command line's options that say which split of a data set is meant."""
    words = [f"--name {source.name}"] if source.name else []
    words += [f"--split {source.split}"] if source.split != "train" else []
    return words + (["--streaming"] if source.streaming else [])


def pull(source: Source, say: Callable[[str], None], commit: str | None = None) -> Path:
    """Ask the Hub for the newest commit of the source's revision, and download the files of the split that are not here.

    ``commit``: take this one instead of the newest (an earlier run had it). A folder whose files are whole, at the commit that
    is asked for, is left without asking the Hub. Of a source that is streamed only the commit is noted. Raises DataError (no
    answer, no such data set, configuration or split, files that are not what the Hub lists, or can only be streamed),
    MissingExtra, DiskFullError.
    """
    repo, revision = _parts(source)
    folder = place(source)
    damage = local_store.problems(folder, deep=True) if folder.is_dir() else ["not there"]
    revision = commit or revision
    if not damage and revision == commit_of(folder):
        return folder
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra("datasets", "hub", f"{source.path}")
    try:
        ask.environment()
        say(f"asking the Hub for the split {source.split!r} of {repo}")
        with _caches() as private:
            about = ask.ask(
                "plan", repo, revision or "", source.name or "", source.split,
                timeout=_PLAN_SECONDS, program=_PROGRAM, private=private,
            )  # fmt: skip
        if not damage and about["revision"] == commit_of(folder):
            return folder
        facts = {
            "kind": "hub", "repo": repo, "revision": about["revision"], "name": source.name, "split": source.split,
            "streaming": source.streaming, "data_files": list(about["files"]),
        }  # fmt: skip
        if source.streaming:
            made = local_store.partial(folder, about["revision"], 0)
        else:
            _require_readable(source, about)
            made = ask.download("dataset", repo, about["revision"], about["files"], folder, say)
    except (ask.NoAnswer, local_store.Damaged) as error:
        raise DataError(f"{source.path}: {error}") from None
    return local_store.install(made, folder, source.label, facts)


def _require_readable(source: Source, about: dict[str, Any]) -> None:
    """Refuse files that the readers here do not read as the data set's owner meant them to be."""
    strange = [
        name for name in about["files"] if not name.lower().endswith(_READS_ALIKE.get(about["kind"], ()))
    ]
    if strange:
        raise DataError(
            f"{source.path}: the split {source.split!r} is made of files such as {strange[0]}, which cannot be read from the "
            f"store. Expected {', '.join(READERS)}.\n  Set streaming: true, which reads whatever `datasets` reads."
        )
    if about["settings"]:
        said = ", ".join(f"{key}: {value}" for key, value in about["settings"].items())
        raise DataError(
            f"{source.path}: its card says how its files are to be read ({said}), which cannot be done from the store.\n"
            "  Set streaming: true."
        )


def rows(source: Source) -> Rows:
    """Every row of the split, counted from 1 over all its files. Raises DataError for one that is not here, or breaks off."""
    return _streamed(source) if source.streaming else _stored(source)


def _stored(source: Source) -> Rows:
    folder = _here(source)
    before = number = 0
    for name in _facts(folder)["data_files"]:
        file = folder / name
        for item in READERS[file.suffix.lower()](file, source.label):
            number = before + item.row
            yield replace(item, row=number, line=None)  # the line of which file?
            if isinstance(item, RowProblem) and item.fatal:
                return
        before = number


def _streamed(source: Source) -> Rows:
    """The rows as a process of their own hands them over; it is ended when no more are wanted."""
    repo, _ = _parts(source)
    commit = commit_of(_here(source)) or ""
    number, ended, why = 0, False, ""
    with _caches() as private, tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        try:
            told = ask.environment() | private | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        except ask.NoAnswer as error:
            raise DataError(
                f"{source.label} is to be streamed, and its encoded rows are not in the cache; {error}"
            ) from None
        arguments = ["rows", repo, commit, source.name or "", source.split, str(source.limit or "")]
        command_line = [sys.executable, "-P", "-m", _PROGRAM, *arguments]
        with subprocess.Popen(
            command_line, env=told, stdout=subprocess.PIPE, stderr=said, text=True
        ) as child:
            try:
                for line in child.stdout or ():
                    item = json.loads(line) if line.endswith("\n") else {}
                    if isinstance(item, dict):
                        ended, why = "rows" in item, item.get("error", "")
                        break
                    number += 1
                    yield Record(source.label, number, None, item[0])
                else:
                    child.wait()
                    said.seek(0)
                    why = ask.last_line(said.read())
            finally:
                child.kill()
    if not ended:
        raise DataError(
            f"{source.label}: the stream broke off after row {number}: {why}\n"
            "  Start again: it begins at the first row, at the same commit.\n"
            "  Or leave out streaming and pull the files, which goes on where it stopped. Type: "
            f"{command(source.model_copy(update={'streaming': False}))}"
        )


def content_hash(source: Source) -> str:
    """sha256 of what the rows are made from: the commit, and of pulled files each one's sha256. Raises DataError when damaged."""
    folder = _here(source)
    found = local_store.problems(folder, deep=True)
    if found:
        raise DataError(
            f"{source.label} in {folder} is damaged: {'; '.join(found)}.\n  Type: {command(source)}"
        )
    listed = local_store.manifest(folder) or {}
    return hashlib.sha256(
        json.dumps([listed["source"], listed["files"]], sort_keys=True).encode()
    ).hexdigest()


def commit_of(folder: Path) -> str | None:
    """The commit of a split in the store; None for one that is not there."""
    return (local_store.manifest(folder) or {}).get("source", {}).get("revision")


def _here(source: Source) -> Path:
    """The folder of a split. One that is streamed is noted at first use; one that is not pulled is a DataError."""
    folder = place(source)
    if local_store.manifest(folder) is None and source.streaming:
        return pull(source, lambda line: print(line, file=sys.stderr))
    if local_store.manifest(folder) is None:
        raise DataError(f"the data set {source.label} is not on this machine yet.\n  Type: {command(source)}")
    return folder


def _facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = (local_store.manifest(folder) or {})["source"]
    return facts


def _parts(source: Source) -> tuple[str, str | None]:
    """("OWNER/NAME", revision or None)."""
    match = HUB_NAME.fullmatch(source.path)
    assert match is not None, "Source checks its path"
    return match.group(1), match.group(2)


@contextmanager
def _caches() -> Iterator[dict[str, str]]:
    """The Hub's libraries keep what they keep in a folder that is thrown away; the store here is the only one to be trusted."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-hub-") as folder:
        yield {name: str(Path(folder) / name) for name in _CACHES}


def recall(source: Source, key: str) -> dict[str, Any] | None:
    """What ``remember`` wrote under ``key`` for the source at its present commit, or None."""
    try:
        facts: dict[str, Any] = json.loads((place(source) / f"seen-{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts


def remember(source: Source, key: str, facts: dict[str, Any]) -> None:
    """Keep what was found out about the rows of a streamed source, so that the next start needs no network for it."""
    files.replace_file(place(source) / f"seen-{key}.json", json.dumps(facts).encode())
