"""Notes by which the processes of a launch watch each other.

A process that waits in a collective notices late, or never, that another has ended. So each process writes a
note of its state into a folder (``process-RANK.json``), and a thread, which no collective blocks, reads the
notes of the others. When a process has failed or is gone, the rest end within ``GRACE`` seconds; the launcher
finds the error to report in the notes. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from tunesmith import files

GRACE = 3.0
"""Seconds between the end of another process and the end of this one: enough to stop in order if possible."""

POLL_SECONDS = 0.2

GIVEN_UP = 70
"""Exit code of a process that the watch has ended; its last note still shows it as running."""


class Failure(TypedDict):
    """The error that ended a process."""

    type: str
    message: str
    exit_code: int
    time: float


@dataclass(frozen=True)
class Note:
    """The state of a process. ``done``: it has ended well."""

    pid: int
    done: bool = False
    failure: Failure | None = None


def write_note(
    folder: Path, rank: int, *, done: bool = False, error: BaseException | None = None, exit_code: int = 0
) -> None:
    """Replace the note of this process."""
    failure: Failure | None = None
    if error is not None:
        kind = type(error).__name__
        failure = {"type": kind, "message": str(error) or kind, "exit_code": exit_code, "time": time.time()}
    note = json.dumps(asdict(Note(os.getpid(), done, failure)))
    files.replace_file(folder / f"process-{rank}.json", note.encode())


def read(folder: Path) -> dict[int, Note]:
    """Return the notes by rank; a process that has not started has none."""
    return {
        int(path.stem.partition("-")[2]): Note(**json.loads(path.read_text(encoding="utf-8")))
        for path in folder.glob("process-*.json")
    }


def start(folder: Path, rank: int) -> None:
    """Write the first note and start the watch, which ends this process when another one is gone."""
    write_note(folder, rank)
    threading.Thread(target=_watch, args=(folder, rank, os.getppid()), daemon=True).start()


def _watch(folder: Path, rank: int, launcher: int) -> None:
    while os.getppid() == launcher and not _lost(folder, rank):
        time.sleep(POLL_SECONDS)
    time.sleep(GRACE if os.getppid() == launcher else 0)
    os._exit(GIVEN_UP)  # the main thread may wait in a collective that never ends


def _lost(folder: Path, rank: int) -> bool:
    others = (note for other, note in read(folder).items() if other != rank and not note.done)
    return any(note.failure or not _alive(note.pid) for note in others)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
