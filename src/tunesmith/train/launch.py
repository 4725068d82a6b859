"""Start several processes of a run with torchrun's agent, and report the error that ended them."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tunesmith import errors, machine
from tunesmith.errors import ProcessLost, TunesmithError, UserError
from tunesmith.train import distributed, process_watch

SAVING_SECONDS = 24 * 3600
"""Time that processes get to finish a step and save after a signal. A second signal ends them at once."""

LAST_LINES = 5
"""Lines of output that are reported of a process that ended without a note."""


def launch(processes: int, arguments: Sequence[str], quiet: bool = False) -> None:
    """Run ``tunesmith ARGUMENTS`` in ``processes`` processes.

    Only process 0 prints; with ``quiet`` it does not print its result. Raises the error of the first process
    that failed, ProcessLost for one that was killed, and KeyboardInterrupt when a signal ended them before
    there was anything to save.
    """
    gpus = torch.cuda.device_count()
    if gpus and processes > gpus:
        raise UserError(
            f"--processes {processes}: each process takes a GPU, and this machine has {gpus}. Start at most {gpus}."
        )
    with _environment(processes), tempfile.TemporaryDirectory(prefix="tunesmith-launch-") as name:
        folder = Path(name)
        job = json.dumps({"command": sys.argv, "arguments": list(arguments)})
        (folder / "job.json").write_text(job, encoding="utf-8")
        os.environ[distributed.MEETING] = str(folder / "processes")
        codes: Mapping[int, int] = {}
        stopped = False
        try:
            agent = elastic_launch(_launch_config(processes, folder, quiet), sys.executable)
            agent("-P", "-m", "tunesmith.cli.rank", name)
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        except SignalException:
            stopped = True
        notes = process_watch.read(folder)
        if all(rank in notes and notes[rank].done for rank in range(processes)):
            return
        error = find_cause(notes, codes, _stderr(folder))
        # without an error, the signal came before a process listened for it
        if error is None or (stopped and isinstance(error, ProcessLost)):
            raise KeyboardInterrupt("interrupted")
        raise error


def _launch_config(processes: int, folder: Path, quiet: bool) -> LaunchConfig:
    show = bool(os.environ.get("TUNESMITH_DEBUG"))
    output = dict.fromkeys(range(1, processes), Std.OUT if show else Std.ALL)
    return LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=folder.name, max_restarts=0,
        # torch's TCP store would listen on every interface without a password
        rdzv_backend="c10d", rdzv_endpoint=str(folder / "agents"), rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1", shutdown_timeout=SAVING_SECONDS,
        logs_specs=DefaultLogsSpecs(str(folder), {0: Std.OUT if quiet else Std.NONE} | output),
    )  # fmt: skip


@contextmanager
def _environment(processes: int) -> Iterator[None]:
    """Share the cores, keep traffic on this machine, silence the agent; variables that the user has set
    stay."""
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.platform == "linux":
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    agent = logging.getLogger("torch.distributed.elastic")
    agent.addHandler(logging.NullHandler())
    agent.propagate = False
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def find_cause(
    notes: Mapping[int, process_watch.Note], codes: Mapping[int, int], printed: Mapping[int, str]
) -> BaseException | None:
    """Return the error to report: the first that a process noted, except the loss of another process.

    A killed process leaves no note. ``codes``: exit codes by rank, negative = signal. ``printed``: stderr.
    """
    failures = sorted((note.failure for note in notes.values() if note.failure), key=lambda one: one["time"])
    for failure in failures:
        if failure["type"] != ProcessLost.__name__:
            return _rebuild(failure["type"], failure["message"])
    silent = [
        rank
        for rank in codes
        if (rank not in notes or not notes[rank].failure) and codes[rank] != process_watch.GIVEN_UP
    ]
    killed = [rank for rank in silent if codes[rank] < 0 and codes[rank] != -signal.SIGTERM]
    for rank in [*killed, *silent]:
        number = -codes[rank]
        ended = (
            f"was ended by {signal.Signals(number).name}"
            if number > 0
            else f"ended with code {-number} and no message"
        )
        lines = [] if number == signal.SIGKILL else printed.get(rank, "").strip().splitlines()[-LAST_LINES:]
        output = "".join(["\n  Its last output:", *(f"\n    {line}" for line in lines)]) if lines else ""
        return ProcessLost(
            f"process {rank} {ended}; the others were stopped. The last checkpoint is kept: continue with --resume.\n"
            "  A machine that runs out of memory kills processes: lower train.micro_batch_tokens or --processes."
            + output
        )
    return ProcessLost(failures[0]["message"]) if failures else None


def _rebuild(kind: str, message: str) -> BaseException:
    """Return the error of another process as if it had been raised here."""
    if kind == KeyboardInterrupt.__name__:
        return KeyboardInterrupt(message)
    named = vars(errors).get(kind)
    if isinstance(named, type) and issubclass(named, TunesmithError):
        return named.__new__(named, message)  # without __init__, which may make a message of other arguments
    return TunesmithError(message)


def _stderr(folder: Path) -> dict[int, str]:
    """Return the stderr of each rank, which torchrun writes to attempt_0/RANK/stderr.log."""
    return {
        int(path.parent.name): path.read_text(encoding="utf-8", errors="replace")
        for path in folder.glob("*/attempt_0/*/stderr.log")
    }
