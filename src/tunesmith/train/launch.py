"""Several processes of one run on this machine, started and watched by torchrun's agent, and what to tell of a failure."""

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

from tunesmith import errors
from tunesmith.errors import ProcessLost, TunesmithError, UserError
from tunesmith.train import distributed, machine, process_watch

UNTIL_SAVED = 24 * 3600
"""Seconds that processes get to finish a step and save after a signal. A second signal ends them at once."""

LAST_WORDS = 5  # lines that a process printed before it ended without a note


def launch(processes: int, arguments: Sequence[str], quiet: bool = False) -> None:
    """Run ``tunesmith ARGUMENTS`` in ``processes`` processes. Process 0 prints, its result only unless ``quiet``; of the others
    nothing is shown.

    Raises what the first one to fail raised, ProcessLost for one that was killed, KeyboardInterrupt when a signal ended them
    before there was anything to save.
    """
    gpus = torch.cuda.device_count()
    if gpus and processes > gpus:
        raise UserError(
            f"--processes {processes}: each process takes a GPU, and this machine has {gpus}. Start at most {gpus}."
        )
    with _environment(processes), tempfile.TemporaryDirectory(prefix="tunesmith-launch-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(
            json.dumps({"command": sys.argv, "arguments": list(arguments)}), encoding="utf-8"
        )
        os.environ[distributed.MEETING] = str(folder / "processes")
        show = bool(os.environ.get("TUNESMITH_DEBUG"))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=folder.name,
            rdzv_backend="c10d",
            rdzv_endpoint=str(folder / "agents"),
            rdzv_configs={
                "store_type": "file"
            },  # torch's TCP store listens on every interface, and is asked no password
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(
                name,
                {0: Std.OUT if quiet else Std.NONE}
                | {rank: Std.OUT if show else Std.ALL for rank in range(1, processes)},
            ),
            shutdown_timeout=UNTIL_SAVED,
        )
        codes: Mapping[int, int] = {}
        stopped = False
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "tunesmith.cli.rank", name)
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        except SignalException:
            stopped = True
        notes = process_watch.read(folder)
        if all(rank in notes and notes[rank].done for rank in range(processes)):
            return
        error = cause(notes, codes, _printed(folder))
        if error is None or (
            stopped and isinstance(error, ProcessLost)
        ):  # a signal before a process listened for it
            raise KeyboardInterrupt("interrupted")
        raise error


@contextmanager
def _environment(processes: int) -> Iterator[None]:
    """For the processes: threads shared out, no traffic outside this machine, no chatter. What the user set stays."""
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


def cause(
    notes: Mapping[int, process_watch.Note], codes: Mapping[int, int], printed: Mapping[int, str]
) -> BaseException | None:
    """The error to report: the first that a process noted, unless it is only the loss of another; a kill leaves no note.

    ``codes``: exit codes by rank, negative = the signal. ``printed``: what each rank wrote to stderr, where that was kept.
    """
    failures = sorted(
        (note.failure for note in notes.values() if note.failure), key=lambda failure: failure["time"]
    )
    first = next((failure for failure in failures if failure["type"] != ProcessLost.__name__), None)
    if first is not None:
        return _raised(str(first["type"]), str(first["message"]))
    silent = [
        rank
        for rank in codes
        if (rank not in notes or not notes[rank].failure) and codes[rank] != process_watch.GIVEN_UP
    ]
    killed = [rank for rank in silent if codes[rank] < 0 and codes[rank] != -signal.SIGTERM]
    for rank in [*killed, *silent]:
        number = -codes[rank]
        how = (
            f"was ended by {signal.Signals(number).name}"
            if number > 0
            else f"ended with code {-number} and no message"
        )
        lines = [] if number == signal.SIGKILL else printed.get(rank, "").strip().splitlines()[-LAST_WORDS:]
        return ProcessLost(
            f"process {rank} {how}; the others were stopped. The last checkpoint is kept: go on with --resume.\n"
            "  A machine that runs out of memory ends processes so: lower train.micro_batch_tokens or --processes."
            + "".join(["\n  Its last words:", *(f"\n    {line}" for line in lines)] if lines else [])
        )
    return _raised("ProcessLost", str(failures[0]["message"])) if failures else None


def _raised(kind: str, message: str) -> BaseException:
    """An error of another process, as if it had been raised here."""
    if kind == KeyboardInterrupt.__name__:
        return KeyboardInterrupt(message)
    named = getattr(errors, kind, None)
    if isinstance(named, type) and issubclass(named, TunesmithError):
        return named.__new__(named, message)  # not called: its message is made already
    return TunesmithError(message)


def _printed(folder: Path) -> dict[int, str]:
    """What each rank wrote to stderr; torchrun keeps it in attempt_0/RANK/stderr.log."""
    return {
        int(path.parent.name): path.read_text(encoding="utf-8", errors="replace")
        for path in folder.glob("*/attempt_0/*/stderr.log")
    }
