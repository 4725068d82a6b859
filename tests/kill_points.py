"""Kill a real process at the n-th operation on its run folder, resume it, and compare what comes out with an undisturbed run.

``counted`` counts every operation of a process on the files of a run folder: a file is opened, made, synced, written to by
``write``, renamed, removed, a folder is made or removed. At the number it was told, the process ends itself by SIGKILL before the
operation; or, with ``bytes``, the kernel ends it by SIGXFSZ within the write that follows, with half of a file on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
HALF_FILES = (8, 300, 4_000, 60_000, 250_000)
"""Bytes after which a write ends the process, instead of a kill between two operations."""


@dataclass(frozen=True)
class Point:
    """The process ends at operation ``number``; with ``limit``, in the first write past ``limit`` bytes after it."""

    number: int
    limit: int | None = None


def counted(folder: Path, point: Point | None) -> list[str]:
    """Count the operations of this process on files under ``folder`` from now on; end it at ``point``. Returns a list that grows by
    the name of each."""
    done: list[str] = []
    prefix = str(folder)
    fsync = os.fsync

    def step(name: str) -> None:
        done.append(name.removeprefix("os."))
        if point is None or len(done) != point.number:
            return
        if point.limit is None:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it by default
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (point.limit, point.limit))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(prefix):
            step(event)

    def synced(handle: int) -> None:
        step("fsync")
        fsync(handle)

    sys.addaudithook(audit)
    os.fsync = synced  # no audit event
    return done


def in_fork(work: Callable[[], Any], seconds: int = 120) -> tuple[int, Any]:
    """Run ``work`` in a fork of this process. Returns its exit code, minus the signal that ended it, and what ``work`` returned.

    The answer of a fork that raises is the error, and its exit code is the one that the command line would have.
    """
    reading, writing = os.pipe()  # not a file: the fork may be forbidden to write any
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(seconds)
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                answer = work()
            code = 0
        except BaseException as error:  # noqa: BLE001 - the parent judges it
            code, answer = int(getattr(error, "exit_code", 1)), f"{type(error).__name__}: {error}"
        finally:
            with contextlib.suppress(BaseException), os.fdopen(writing, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        content = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(content) if content else None


def train(made: dict[str, Any], out: Path, point: Point | None = None, **how: bool) -> list[str]:
    """Train, counting operations. Returns their names."""
    import tunesmith

    done = counted(out.parent, point)
    tunesmith.train(made, out=out, **how)
    return done


def summary(run: Path) -> dict[str, Any]:
    """All that must be equal: tensors of the last checkpoint and of the model, records without timing, samples, names of files."""
    from tunesmith.runs import metrics_file
    from tunesmith.train import checkpoint

    last = checkpoint.steps(run / "checkpoints")[-1]
    files = [run / "checkpoints" / f"step-{last}" / "state.safetensors", *sorted((run / "model").glob("*.safetensors"))]
    ignored = metrics_file.TIMING_KEYS
    records = [{k: v for k, v in one.items() if k not in ignored} for one in metrics_file.read(run / "metrics.jsonl")]
    return {
        "tensors": {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "records": json.loads(json.dumps(records)),
        "samples": (run / "samples.jsonl").read_text(encoding="utf-8"),
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()),
    }


def points(operations: int, number: int, seed: int = 0) -> list[Point]:
    """Choose ``number`` points: operations at even distances, and in every fifth case a write that is cut."""
    drawn = random.Random(seed)
    chosen = []
    for index in range(number):
        at = 1 + index * operations // number
        chosen.append(Point(at, drawn.choice(HALF_FILES) if index % 5 == 4 else None))
    return chosen


def outcome(made: dict[str, Any], straight: dict[str, Any], out: Path, point: Point) -> str:
    """Kill a run at ``point`` and resume it. Returns "exact", "refused" (then the same command without --resume is exact), or what was
    lost. Where no later write is as long as ``point`` says, the run is killed between two operations."""
    code, answer = in_fork(lambda: train(made, out, point))
    if code == 0 and point.limit is not None:
        apart = out.parent.with_name(f"{out.parent.name} between operations") / out.name  # as new as the first folder
        return outcome(made, straight, apart, Point(point.number))
    if code >= 0:
        return f"not killed: ended with {code}: {answer}"
    code, answer = in_fork(lambda: train(made, out, resume=True))
    how = "exact"
    if code == 2 and ("no run to resume" in answer):
        how = "refused"
        code, answer = in_fork(lambda: train(made, out))
    if code:
        return f"lost: resuming ended with {code}: {answer}"
    now = summary(out)
    different = [key for key in straight if straight[key] != now[key]]
    return f"lost: {', '.join(different)} differ" if different else how


def recipe(folder: Path, steps: int = 3) -> dict[str, Any]:
    """A tiny run of ``steps`` steps with evaluations, samples, rotation and a best model, on a tiny random model."""
    from tests.runs import recipe as tiny

    made = tiny(folder, save_steps=1, eval_steps=2, max_steps=steps, save_total_limit=1, logging_steps=1, warmup_steps=1)
    made["data"]["eval"] = {"path": str(folder / "rows.jsonl"), "limit": 4}
    made["samples"] = {"count": 1, "max_new_tokens": 2}
    return made


def run(number: int, folder: Path, seed: int = 0, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Kill ``number`` runs in ``folder``, each at another operation. Returns the counts by outcome and by the operation before which
    the run was killed, and every point that lost something."""
    import tunesmith

    made = recipe(folder, 3 + number // 100)
    tunesmith.train(made, out=folder / "warm" / "run")  # what is imported late is imported before the forks
    code, operations = in_fork(lambda: train(made, folder / "straight" / "run"))
    assert code == 0, operations
    assert len(operations) >= number, f"the run has {len(operations)} operations: fewer than {number}"
    straight = summary(folder / "straight" / "run")
    counts: Counter[str] = Counter()
    before: Counter[str] = Counter()
    lost = []
    for index, point in enumerate(points(len(operations), number, seed)):
        found = outcome(made, straight, folder / f"{index}" / "run", point)
        kind = found.partition(":")[0].partition(" ")[0]
        counts[kind] += 1
        before["half of a write" if point.limit else operations[point.number - 1]] += 1
        if kind not in ("exact", "refused"):
            lost.append({"operation": point.number, "bytes": point.limit, "what": found})
            tell(f"{point}: {found}")
    facts = {"operations": len(operations), "points": number, "exact": counts["exact"], "refused": counts["refused"]}
    return {**facts, "lost": lost, "killed_before": dict(before.most_common())}
