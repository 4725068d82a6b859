"""Asks the Hub. Each question runs in a separate process, and only that process may use the network.

The callers were asked to: ``models pull``, ``data pull``, and a source with ``streaming: true``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from tunesmith.errors import UserError
from tunesmith.files import disk_error
from tunesmith.hub import local_store
from tunesmith.hub.client import REFUSED, HubFile
from tunesmith.hub.local_store import DamagedFile
from tunesmith.json_types import JsonObject

CLIENT = "tunesmith.hub.client"
SPLITS = "tunesmith.hub.splits"
"""The programs that answer questions: about repositories, and about splits of data sets."""

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
"""A user who sets one of these forbids the Hub."""

_REMOVED = {*_OFFLINE, "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"}
"""Variables that this process may set for itself, and the process that asks the Hub must not inherit."""

_ADDED = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}

_users_offline: list[bool] = []


class HubError(UserError):
    """The Hub was not asked, did not answer, or refused. Files that arrived before are kept."""


class HubUnreachable(HubError):
    """No connection to the Hub. The message says what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}\n  Check the connection and type the same command again, or copy the folder from a machine that has it. "
            "Files that have arrived are kept, and files that were here before are unchanged."
        )


def offline_by_user() -> bool:
    """True if the user's environment forbids the Hub. ``models.load.load.quiet`` sets the same variables."""
    offline = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE)
    return _users_offline[0] if _users_offline else offline


def remember_user() -> None:
    """Store the user's choice before this process switches itself offline."""
    if not _users_offline:
        _users_offline.append(offline_by_user())


def environment() -> dict[str, str]:
    """The environment of a process that may ask the Hub. Raises HubError if the user forbids it."""
    if offline_by_user():
        raise HubError(f"the Hub was not asked: {', '.join(_OFFLINE[:-1])} or {_OFFLINE[-1]} is set")
    return {key: value for key, value in os.environ.items() if key not in _REMOVED} | _ADDED


def ask(
    *question: str,
    timeout: float | None,
    program: str = CLIENT,
    stdin: str = "",
    private: Mapping[str, str] | None = None,
) -> JsonObject:
    """The answer of ``program``, one JSON object or {}. ``private``: variables for it.

    Raises HubError, DiskFullError."""
    shows_progress = question[0] == "download"  # on stderr
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", program, *question],
            env=environment() | dict(private or {}),
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=None if shows_progress else subprocess.PIPE,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise HubUnreachable(f"the Hub did not answer within {timeout:g} s") from None
    if done.returncode not in (0, REFUSED):
        raise HubUnreachable(f"the Hub could not be used: {last_line(done.stderr)}")
    answer: JsonObject = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    if "disk" in answer and (full := disk_error(OSError(answer["disk"], ""), "the files of the Hub")):
        raise full
    if done.returncode == REFUSED:
        raise HubError(answer["error"])
    return answer


def last_line(stderr: str | None) -> str:
    """The last line that a program printed, as the reason why it ended."""
    return ((stderr or "see above").strip().splitlines() or ["no reason given"])[-1]


def download(
    kind: str, repo: str, revision: str, files: Mapping[str, HubFile], place: Path, say: Callable[[str], None]
) -> Path:
    """Download ``files`` of a "model" or "dataset" into a folder next to ``place``, and check their hashes.

    The caller installs the folder at ``place``. A download that was interrupted continues in it. Raises
    HubError (files that arrived are kept), DamagedFile, DiskFullError."""
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or {"\\", ":"} & set(name):
            raise HubError(
                f"{repo} on the Hub lists the file {name!r}, a name outside the folder of the download"
            )
    made = local_store.partial(place, revision, sum(file["size"] for file in files.values()))
    arrived = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    continued = f", continuing after {arrived / 1e6:,.1f} MB" if arrived else ""
    say(f"downloading {repo} at {revision} from the Hub{continued}")
    sizes = json.dumps({name: file["size"] for name, file in files.items()})
    try:
        ask("download", kind, repo, revision, str(made), timeout=None, stdin=sizes)
    except HubUnreachable:
        raise
    except HubError as error:
        raise HubError(f"{error}.\n  Files that have arrived are kept; pull again to continue") from None
    try:
        _verify(made, files, f"{repo} at {revision}")
    except DamagedFile:
        shutil.rmtree(made)
        raise
    return made


def _verify(made: Path, files: Mapping[str, HubFile], owner: str) -> None:
    """Compare the downloaded files with the hashes that the Hub lists."""
    for name, file in files.items():
        if file["sha256"]:
            local_store.check(made / name, file["sha256"], owner)
        elif file["sha1"] and local_store.git_sha1(made / name) != file["sha1"]:
            raise DamagedFile(
                f"{owner}: {name} does not have the sha1 that the Hub lists. It was damaged on the way; pull again."
            )
