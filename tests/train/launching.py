"""Runs of several processes for tests: launched by ``tunesmith launch``, or forked from a server that has imported torch."""

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

# Python imports a module of this name at its start, in every process of a launch.
FAULT = """
import os
if os.environ.get("RANK") == "1":
    import pathlib, signal, sys, time
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


def start(made: dict[str, Any], folder: Path, *options: str, processes: int = 2, fault: str | None = None) -> Any:
    """Start ``tunesmith launch`` of the recipe ``made`` into ``folder/run``, or into ``--out`` of ``options``.

    ``fault``: a statement that process 1 executes at the end of step 3.
    """
    share_kernels()
    path = [*os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if fault:
        (folder / "fault").mkdir()
        (folder / "fault" / "sitecustomize.py").write_text(FAULT.replace("FAULTY", fault))
        path.insert(0, str(folder / "fault"))
    (folder / "r.yaml").write_text(yaml.safe_dump(made))
    command = [sys.executable, "-m", "tunesmith", "launch", "--processes", str(processes), str(folder / "r.yaml")]
    command += map(str, options)
    if "--out" not in options:
        command += ["--out", str(folder / "run")]
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def launched(made: dict[str, Any], folder: Path, *options: str, **keys: Any) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of ``start``."""
    process = start(made, folder, *options, **keys)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


# ------------------------------------------------------------------------------------------------ forked processes

PRELOAD = ["pytest", "peft", "transformers.models.llama.modeling_llama", "tests.runs", "tunesmith.train.run", "tunesmith.objectives.sft", "tunesmith.adaptations.lora", "deepspeed"]  # fmt: skip


def forked(
    made: dict[str, Any], out: Path, *, processes: int = 2, before: Callable[[], None] | None = None, **keys: Any
) -> list[int | None]:
    """Train ``made`` into ``out`` in ``processes`` forked processes. Returns their exit codes, 1 for one that raised.

    They are forked from a server that imports torch and tunesmith once. ``before``: a function that each process calls
    first. ``keys``: of ``tunesmith.train``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    share_kernels()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    environment["TUNESMITH_MEETING"] = str(Path(tempfile.mkdtemp(dir=out.parent)) / "meeting")
    arguments = (environment, made, out, before, keys)
    started = [context.Process(target=_train, args=(rank, *arguments)) for rank in range(processes)]
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

    if before is not None:
        before()
    tunesmith.train(made, out=out, **keys)
    distributed.close()
