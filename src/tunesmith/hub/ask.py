"""The one door to the Hub: each question is put by a process of its own, which alone may use the network.

Who calls this was asked for it: ``models pull``, ``data pull``, and a source with ``streaming: true``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.errors import UserError
from tunesmith.hub import local_store
from tunesmith.hub.client import REFUSED
from tunesmith.hub.local_store import Damaged

CLIENT = "tunesmith.hub.client"

_CLOSED = {
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "TQDM_DISABLE",
}
"""What this process may have been told, and a process that asks the Hub must not hear."""

_TOLD = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}

_WISHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
"""Any of them, set by the user, forbids the Hub."""

_users_offline: list[bool] = []


class NoAnswer(UserError):
    """The Hub could not be asked, did not answer, or said no. What it may have sent so far is kept."""


class Unreached(NoAnswer):
    """The Hub could not be reached. The message says what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}\n  Check the connection and type the same command again, or copy the folder from a machine that has it. "
            "What has arrived is kept, and what was here before stays as it is."
        )


def offline_by_user() -> bool:
    """Whether the user's own environment forbids the Hub (``models.load.load.quiet`` sets it for another reason)."""
    said = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _WISHES)
    return _users_offline[0] if _users_offline else said


def remember_user() -> None:
    """Note what the user wants, before this process closes itself to the network."""
    if not _users_offline:
        _users_offline.append(offline_by_user())


def environment() -> dict[str, str]:
    """The environment of a process that may ask the Hub. Raises NoAnswer when the user forbids it."""
    if offline_by_user():
        raise NoAnswer(f"the Hub was not asked: {', '.join(_WISHES[:-1])} or {_WISHES[-1]} is set")
    return {key: value for key, value in os.environ.items() if key not in _CLOSED} | _TOLD


def ask(
    *arguments: str,
    timeout: float | None,
    program: str = CLIENT,
    stdin: str = "",
    private: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The answer of ``program`` (one JSON object; {} for none). ``private``: variables for it alone. Raises NoAnswer."""
    told = environment() | (private or {})
    shows_progress = arguments[0] == "download"  # the client's progress bars are on stderr
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", program, *arguments],
            env=told,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=None if shows_progress else subprocess.PIPE,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise Unreached(f"the Hub did not answer within {timeout:g} s") from None
    if done.returncode == REFUSED:
        raise NoAnswer(json.loads(done.stdout.splitlines()[-1])["error"])
    if done.returncode:
        raise Unreached(f"the Hub could not be used: {last_line(done.stderr)}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    return answer


def last_line(stderr: str | None) -> str:
    """The reason that a program gave as it ended."""
    return ((stderr or "see above").strip().splitlines() or ["no reason given"])[-1]


def download(
    kind: str, repo: str, revision: str, files: dict[str, Any], place: Path, say: Callable[[str], None]
) -> Path:
    """The folder with all ``files`` (as ``client.info`` has them) of a "model" or "dataset", each of the hash that the Hub lists.

    The folder lies beside ``place``, where the caller is to install it; an interrupted download goes on in it. Raises NoAnswer
    (what has arrived is kept), Damaged, DiskFullError.
    """
    for name in files:
        if (
            PurePosixPath(name).is_absolute()
            or ".." in PurePosixPath(name).parts
            or "\\" in name
            or ":" in name
        ):
            raise NoAnswer(
                f"{repo} on the Hub lists the file {name!r}, a name that leaves the folder it is downloaded into"
            )
    made = local_store.partial(place, revision, sum(file["size"] for file in files.values()))
    begun = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    going_on = f", going on after {begun / 1e6:,.1f} MB" if begun else ""
    say(f"downloading {repo} at {revision} from the Hub{going_on}")
    sizes = json.dumps({file: facts["size"] for file, facts in files.items()})
    try:
        ask("download", kind, repo, revision, str(made), timeout=None, stdin=sizes)
    except Unreached:
        raise  # its message says the same
    except NoAnswer as error:
        raise NoAnswer(f"{error}.\n  What has arrived is kept; pull again to go on") from None
    try:
        _verify(made, files, f"{repo} at {revision}")
    except Damaged:
        shutil.rmtree(made)
        raise
    return made


def _verify(made: Path, files: dict[str, Any], what: str) -> None:
    """Compare what was downloaded with the hashes that the Hub lists."""
    for file, facts in files.items():
        if facts["sha256"]:
            local_store.check(made / file, facts["sha256"], what)
        elif facts["sha1"] and local_store.git_sha1(made / file) != facts["sha1"]:
            raise Damaged(f"{what}: {file} is not what the Hub lists. It was damaged on the way; pull again.")
