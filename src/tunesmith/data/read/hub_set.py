"""``hub:OWNER/NAME``: a split of a Hub data set, pulled into a local store or streamed, always at one known
commit.

``$TUNESMITH_HOME/datasets`` has a folder for each (data set, revision, configuration, split). The folder of a
pulled split holds its files and a manifest; that of a streamed split holds only the manifest, which records
the commit. The commit stays until the user types ``tunesmith data pull`` again, whatever changes on the Hub.
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

from tunesmith import files
from tunesmith.data.data_config import HUB, HUB_NAME, Source
from tunesmith.data.read.row_files import READERS, Rows, column_numbers, reader_of
from tunesmith.data.read.text_file import GZIP, ending
from tunesmith.data.row_problems import Record, RowProblem
from tunesmith.errors import DataError, MissingExtra
from tunesmith.hub import ask, local_store
from tunesmith.json_types import JsonObject

_PLAN_SECONDS = 180
"""Time limit of the question what a data set holds: the Hub lists ten thousand files page by page."""

_CACHES = ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE")

_READABLE = {
    "json": (".json", ".jsonl", ".ndjson"), "csv": (".csv", ".tsv"), "text": (".txt",), "parquet": (".parquet",),
}  # fmt: skip
"""Builder of ``datasets`` -> names of the files that READERS read in the same way."""


def store_folder(source: Source) -> Path:
    """The folder of a split in the store, whether it exists or not."""
    repo, _ = _repo_and_revision(source)
    key = hashlib.sha256(json.dumps([source.label, source.streaming]).encode()).hexdigest()[:12]
    split = re.sub("[^A-Za-z0-9]+", "_", source.split)
    return files.home() / "datasets" / f"{repo.replace('/', '--')}-{split}-{key}"


def pull_command(source: Source) -> str:
    """The command that pulls a source."""
    return " ".join([f"tunesmith data pull {source.path.removeprefix(HUB)}", *split_flags(source)])


def split_flags(source: Source) -> list[str]:
    """The command line options that select the split of a data set."""
    flags = [f"--name {source.name}"] if source.name else []
    flags += [f"--split {source.split}"] if source.split != "train" else []
    return flags + (["--streaming"] if source.streaming else [])


def pull(source: Source, say: Callable[[str], None], commit: str | None = None) -> Path:
    """Download the files of the split at the newest commit of the source's revision, if the store lacks them.

    ``commit``: use this one instead of the newest. The Hub is not asked if the store has undamaged files of
    it. For a stream only the commit is recorded. Raises DataError (no answer, no such data set, configuration
    or split, wrong hashes, files that can only be streamed), MissingExtra, DiskFullError."""
    repo, revision = _repo_and_revision(source)
    folder = store_folder(source)
    damage = local_store.problems(folder, deep=True) if folder.is_dir() else ["not there"]
    revision = commit or revision
    if not damage and revision == commit_of(folder):
        return folder
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra("datasets", "hub", source.path)
    try:
        ask.environment()
        say(f"asking the Hub for the split {source.split!r} of {repo}")
        with _temporary_caches() as private:
            question = ("plan", repo, revision or "", source.name or "", source.split)
            plan = ask.ask(*question, timeout=_PLAN_SECONDS, program=ask.SPLITS, private=private)
        if not damage and plan["revision"] == commit_of(folder):
            return folder
        if source.streaming:
            made = local_store.partial(folder, plan["revision"], 0)
        else:
            _check_readable(source, plan)
            made = ask.download("dataset", repo, plan["revision"], plan["files"], folder, say)
    except (ask.HubError, local_store.DamagedFile) as error:
        raise DataError(f"{source.path}: {error}") from None
    facts = {
        "kind": "hub", "repo": repo, "revision": plan["revision"], "name": source.name, "split": source.split,
        "streaming": source.streaming, "data_files": list(plan["files"]),
    }  # fmt: skip
    return local_store.install(made, folder, source.label, facts)


def _check_readable(source: Source, plan: JsonObject) -> None:
    """Refuse files that READERS would not read as the owner of the data set intends."""
    suffixes = _READABLE.get(plan["kind"], ())
    unreadable = [name for name in plan["files"] if not name.lower().removesuffix(GZIP).endswith(suffixes)]
    if unreadable:
        raise DataError(
            f"{source.path}: the split {source.split!r} has files such as {unreadable[0]}, which cannot be read from the "
            f"store. Expected {', '.join(READERS)}.\n  Set streaming: true, which reads all files that `datasets` reads."
        )
    if plan["settings"]:
        settings = ", ".join(f"{key}: {value}" for key, value in plan["settings"].items())
        raise DataError(
            f"{source.path}: its card sets how to read its files ({settings}), which the store does not support.\n"
            "  Set streaming: true."
        )


def rows(source: Source) -> Rows:
    """The rows of the split, counted over all files. Raises DataError if it is not pulled or breaks off."""
    return _streamed_rows(source) if source.streaming else _stored_rows(source)


def _stored_rows(source: Source) -> Rows:
    folder = _require_folder(source)
    before = number = 0
    for name in _manifest(folder)["source"]["data_files"]:
        file = folder / name
        reader = reader_of(ending(file), column_numbers(source.columns))
        assert reader is not None  # only such files are pulled
        for item in reader(file, source.label):
            number = before + item.row
            yield replace(item, row=number, line=None)  # a line number would need the name of the file
            if isinstance(item, RowProblem) and item.fatal:
                return
        before = number


def _streamed_rows(source: Source) -> Rows:
    """The rows that a separate process prints. The process is killed when the caller stops reading."""
    repo, _ = _repo_and_revision(source)
    commit = commit_of(_require_folder(source)) or ""
    number, complete, reason = 0, False, ""
    with (
        _temporary_caches() as private,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr,
    ):
        try:
            environment = ask.environment() | private | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        except ask.HubError as error:
            raise DataError(
                f"{source.label} is a stream, and its encoded rows are not in the cache; {error}"
            ) from None
        question = ["rows", repo, commit, source.name or "", source.split, str(source.limit or "")]
        command = [sys.executable, "-P", "-m", ask.SPLITS, *question]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as child:
            try:
                for line in child.stdout or ():
                    item = json.loads(line) if line.endswith("\n") else {}
                    if isinstance(item, dict):
                        complete, reason = "rows" in item, item.get("error", "")
                        break
                    number += 1
                    yield Record(source.label, number, None, item[0])
                else:
                    child.wait()
                    stderr.seek(0)
                    reason = ask.last_line(stderr.read())
            finally:
                child.kill()
    if not complete:
        pulled = source.model_copy(update={"streaming": False})
        raise DataError(
            f"{source.label}: the stream broke off after row {number}: {reason}\n"
            "  Start again: it begins at the first row, at the same commit.\n"
            "  Or leave out streaming and pull the files: an interrupted pull continues where it stopped. "
            f"Type: {pull_command(pulled)}"
        )


def content_hash(source: Source) -> str:
    """sha256 of the commit and of the files of a pulled split. Raises DataError if one is damaged."""
    folder = _require_folder(source)
    damage = local_store.problems(folder, deep=True)
    if damage:
        raise DataError(
            f"{source.label} in {folder} is damaged: {'; '.join(damage)}.\n  Type: {pull_command(source)}"
        )
    listed = _manifest(folder)
    content = json.dumps([listed["source"], listed["files"]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def commit_of(folder: Path) -> str | None:
    """The commit of a split in the store; None if it is not there."""
    return _manifest(folder).get("source", {}).get("revision")


def _manifest(folder: Path) -> JsonObject:
    return local_store.manifest(folder) or {}


def _require_folder(source: Source) -> Path:
    """The folder of a split that is pulled, or DataError. The first use of a stream records its commit."""
    folder = store_folder(source)
    if _manifest(folder):
        return folder
    if source.streaming:
        return pull(source, lambda line: print(line, file=sys.stderr))
    raise DataError(
        f"the data set {source.label} is not on this machine yet.\n  Type: {pull_command(source)}"
    )


def _repo_and_revision(source: Source) -> tuple[str, str | None]:
    """("OWNER/NAME", revision or None)."""
    match = HUB_NAME.fullmatch(source.path)
    assert match is not None, "Source checks its path"
    return match.group(1), match.group(2)


@contextmanager
def _temporary_caches() -> Iterator[dict[str, str]]:
    """Variables that put the caches of the Hub's libraries into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-hub-") as folder:
        yield {name: str(Path(folder) / name) for name in _CACHES}


def recall(source: Source, key: str) -> JsonObject | None:
    """The facts that ``remember`` stored under ``key`` at the present commit of the source, or None."""
    try:
        facts: JsonObject = json.loads(_facts_file(source, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts


def remember(source: Source, key: str, facts: JsonObject) -> None:
    """Store facts about the rows of a stream, so that the next start needs no network for them."""
    files.replace_file(_facts_file(source, key), json.dumps(facts).encode())


def _facts_file(source: Source, key: str) -> Path:
    return store_folder(source) / f"seen-{key}.json"
