"""Starts ``tunesmith launch`` for tests, with faults put into one of its processes."""

from __future__ import annotations

import os
import subprocess
import sys
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
        record = train_step(job, step)  # its collectives are behind both processes: no one is still getting ready
        if step.number == 3:
            pathlib.Path(__file__).with_name("when").write_text(str(time.time()))
            FAULTY
        return record

    loop.train_step = faulty
"""


def start(made: dict[str, Any], folder: Path, *options: str, processes: int = 2, fault: str | None = None) -> Any:
    """``tunesmith launch`` of the recipe ``made`` into ``folder/run``, unless ``options`` say otherwise. ``fault``: a statement
    that process 1 executes at the end of step 3.
    """
    path = [*os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if fault:
        (folder / "fault").mkdir()
        (folder / "fault" / "sitecustomize.py").write_text(FAULT.replace("FAULTY", fault))
        path.insert(0, str(folder / "fault"))
    (folder / "r.yaml").write_text(yaml.safe_dump(made))
    command = [
        sys.executable,
        "-m",
        "tunesmith",
        "launch",
        "--processes",
        str(processes),
        str(folder / "r.yaml"),
        *map(str, options),
    ]
    if "--out" not in options:
        command += ["--out", str(folder / "run")]
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def launched(made: dict[str, Any], folder: Path, *options: str, **keys: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``start``."""
    process = start(made, folder, *options, **keys)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err
