"""Runs of several processes for tests: by ``tunesmith launch``, or forked from the process of the tests."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from tests import processes

# Python imports a module of this name at its start, in every process of a launch.
FAULT = """
import os, pathlib
if "RANK" in os.environ:
    pathlib.Path(__file__).with_name(f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
if os.environ.get("RANK") == "1":
    import signal, sys, time
    from tunesmith import errors
    from tunesmith.train import loop
    train_step = loop.train_step

    def faulty(job, step):
        record = train_step(job, step)  # after its collectives both processes have started
        if step.number == 3:
            pathlib.Path(__file__).with_name("when").write_text(str(time.time()))
            FAULTY
        return record

    loop.train_step = faulty
"""


@functools.cache
def _kernels() -> str:
    return tempfile.mkdtemp(prefix="tunesmith-kernels-")


def share_kernels() -> None:
    """Let the home of this test hold the compiled kernels of earlier ones: compiling takes seconds in each process."""
    folder = Path(os.environ["TUNESMITH_HOME"]) / "kernels"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(_kernels())


LAUNCH = "from tests.processes import fork_ranks; fork_ranks(); from tunesmith.cli.main import program; program()"
"""``tunesmith launch`` in a fork that forks its processes: no interpreter starts, none imports torch."""


def launched(
    made: dict[str, Any], folder: Path, *options: Any, number: int = 2, fault: str | None = None, fresh: bool = False
) -> tuple[int, str, str]:
    """Run ``tunesmith launch`` of the recipe ``made`` into ``folder/run``. Returns exit code, stdout and stderr.

    ``fault``: a statement that process 1 executes at the end of step 3. ``fresh``: by new interpreters, as a user does.
    """
    share_kernels()
    path = [*os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if fault:
        (folder / "fault").mkdir()
        (folder / "fault" / "sitecustomize.py").write_text(FAULT.replace("FAULTY", fault))
        path.insert(0, str(folder / "fault"))
    (folder / "r.yaml").write_text(yaml.safe_dump(made))
    words = ["launch", "--processes", str(number), str(folder / "r.yaml"), *map(str, options), "--out", str(folder / "run")]
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    if fresh:
        command = [sys.executable, "-m", "tunesmith", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    else:
        done = processes.run([sys.executable, "-c", LAUNCH, *words], env=environment, cwd=processes.ROOT, timeout=240)
    return done.returncode, done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------ forked processes


def forked(
    made: dict[str, Any], out: Path, *, number: int = 2, before: Callable[[], None] | None = None, **keys: Any
) -> list[int | None]:
    """Train ``made`` into ``out`` in ``number`` forks of this process. Returns their exit codes, 1 for one that raised.

    ``before``: a function that each process calls first. ``keys``: of ``tunesmith.train``.
    """
    context = multiprocessing.get_context("fork")
    share_kernels()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    environment["TUNESMITH_MEETING"] = str(Path(tempfile.mkdtemp(dir=out.parent)) / "meeting")
    arguments = (environment, made, out, before, keys)
    started = [context.Process(target=_train, args=(rank, *arguments)) for rank in range(number)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=240)
    return [process.exitcode for process in started]


def _train(rank: int, environment: dict[str, str], made: Any, out: Path, before: Any, keys: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    import tunesmith
    from tunesmith.train import distributed

    PartialState._reset_state()  # the parent's: one process
    if before is not None:
        before()
    tunesmith.train(made, out=out, **keys)
    distributed.close()
