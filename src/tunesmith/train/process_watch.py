"""What the processes of one launch know of each other: a folder with a note of each, and a thread that reads them.

A process that waits for another in a collective hears of its end late or never. So each one leaves a note of what it is doing
(``process-RANK.json``), and looks at the others' notes from a thread that nothing blocks. Where one has failed or is gone, the
rest is over ``GRACE`` seconds later at the most; the launcher finds in the notes what to tell. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tunesmith import files

GRACE = 3.0
"""Seconds between another's end and ours: enough to end in order where that is possible."""

LOOK = 0.2
"""Seconds between two looks at the notes."""

GIVEN_UP = 70
"""Exit code of a process that was ended here; its note still says that it was running."""


@dataclass(frozen=True)
class Note:
    """What one process says of itself. ``failure``: {type, message, exit_code, time}; ``done``: it has ended well."""

    pid: int
    done: bool = False
    failure: dict[str, str | int | float] | None = None


def leave(
    folder: Path, rank: int, *, done: bool = False, error: BaseException | None = None, exit_code: int = 0
) -> None:
    """Put this process's note in place of its last one."""
    failure: dict[str, str | int | float] | None = None
    if error is not None:
        message = str(error) or type(error).__name__
        failure = {
            "type": type(error).__name__,
            "message": message,
            "exit_code": exit_code,
            "time": time.time(),
        }
    note = json.dumps(asdict(Note(os.getpid(), done, failure)))
    files.replace_file(folder / f"process-{rank}.json", note.encode())


def read(folder: Path) -> dict[int, Note]:
    """The notes by rank; a process that has not begun has none."""
    return {
        int(path.stem.partition("-")[2]): Note(**json.loads(path.read_text(encoding="utf-8")))
        for path in folder.glob("process-*.json")
    }


def begin(folder: Path, rank: int) -> None:
    """Leave the first note and start looking. When another process has failed or is gone, or the launcher is, this one ends."""
    leave(folder, rank)
    threading.Thread(target=_look, args=(folder, rank, os.getppid()), daemon=True).start()


def _look(folder: Path, rank: int, launcher: int) -> None:
    while os.getppid() == launcher and not _lost(folder, rank):
        time.sleep(LOOK)
    time.sleep(GRACE if os.getppid() == launcher else 0)
    os._exit(GIVEN_UP)  # whatever the main thread waits for will not come


def _lost(folder: Path, rank: int) -> bool:
    others = (note for other, note in read(folder).items() if other != rank and not note.done)
    return any(note.failure or not _alive(note.pid) for note in others)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
