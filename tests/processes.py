"""Python processes for tests, which start in milliseconds: forks of one server that has imported torch and transformers.

``run`` takes what ``subprocess.run`` takes of a command that begins with ``sys.executable``, and gives the same result; ``start``
gives a ``Process`` that can be killed. tunesmith itself is imported anew in every process, with that process's environment.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "torch",
    "torch.distributed",
    "transformers",
    "peft",
    "accelerate",
    "safetensors.torch",
    "scipy.optimize",
    "pydantic",
)


@dataclass
class Process:
    """A process that the server forked. ``stdout`` and ``stderr`` are files."""

    args: list[str]
    pid: int
    folder: tempfile.TemporaryDirectory[str]
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """The exit code, or minus the number of the signal that ended it. Raises TimeoutExpired, and kills it."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def output(self) -> tuple[str, str]:
        """What it has written to stdout and to stderr."""
        return tuple((Path(self.folder.name) / name).read_text("utf-8", "replace") for name in ("stdout", "stderr"))  # type: ignore[return-value]


def start(args: Sequence[str | os.PathLike[str]], env: Mapping[str, str] | None = None, cwd: str | Path | None = None) -> Process:
    """Begin a process: [sys.executable, "-c" | "-m" | a file, ...]."""
    words = [os.fspath(word) for word in args]
    assert words[0] == sys.executable, f"only for Python: {words}"
    folder = tempfile.TemporaryDirectory(prefix="process-")
    job = {
        "args": words[1:],
        "env": dict(os.environ if env is None else env),
        "cwd": str(cwd or Path.cwd()),
        "folder": folder.name,
    }
    return Process(words, _ask({"start": job}), folder)


def run(
    args: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 300,
    check: bool = False,
    capture_output: bool = True,
    text: bool = True,
) -> subprocess.CompletedProcess[str]:
    """The same to its end, with its output."""
    assert capture_output and text
    process = start(args, env, cwd)
    done = subprocess.CompletedProcess(process.args, process.wait(timeout), *process.output())
    if check:
        done.check_returncode()
    return done


def run_together(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], timeout: float = 300) -> None:
    """Run (args, env) side by side to their ends. Raises AssertionError with the output of one that fails; the others are ended."""
    running = [start(args, env) for args, env in commands]
    end = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in running):
            assert time.monotonic() < end, f"still running after {timeout} s: {running[0].output()[1][-3000:]}"
            failed = [process for process in running if process.poll()]
            assert not failed, failed[0].output()[1][-3000:]
            time.sleep(0.01)
        failed = [process for process in running if process.poll()]
        assert not failed, failed[0].output()[1][-3000:]
    finally:
        for process in running:
            process.kill()


class Fork:
    """A fork of this process that runs ``python ARGS``. It has what torchrun's agent uses of ``subprocess.Popen``."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str], stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        assert args[0] == sys.executable, f"only for Python: {args}"
        from accelerate import PartialState

        sys.stdout.flush()
        sys.stderr.flush()
        self.args = args
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # the parent removes its temporary folders itself
            PartialState._reset_state()  # the parent may have found that it is one process
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, file in ((1, stdout), (2, stderr)):
                if file is not None:
                    os.dup2(file.fileno(), number)
            _execute(args[1:], env, list(sys.path))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode


def fork_ranks() -> None:
    """Let torchrun's agent in this process fork it, instead of starting interpreters that import torch for seconds."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler as module

    def popen(handler: Any, args: Sequence[str], env: Mapping[str, str]) -> Fork:
        return Fork(args, env, handler._stdout, handler._stderr)

    module.SubprocessHandler._popen = popen  # type: ignore[method-assign,assignment]


# ------------------------------------------------------------------------------------------------------------- the server


@cache
def _server() -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.processes"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
    )
    atexit.register(server.kill)
    return server


def _ask(question: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin and server.stdout
    print(json.dumps(question), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints while it is imported is no answer
    path = list(sys.path)
    for package in PRELOADED:
        importlib.import_module(package)
    ended: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            child = os.fork()
            if child == 0:
                answers.close()
                _become(question["start"], path)
            reply: Any = child
        else:
            number = question["poll"]
            if number not in ended:
                with contextlib.suppress(ChildProcessError):
                    pid, status = os.waitpid(number, os.WNOHANG)
                    if pid:
                        ended[number] = os.waitstatus_to_exitcode(status)
            reply = ended.get(number)
        print(json.dumps(reply), file=answers, flush=True)


def _become(job: dict[str, Any], path: list[str]) -> None:
    """In the fork: run the command as a fresh interpreter would, and leave."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(job["folder"]) / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    _execute(job["args"], job["env"], path)


def _execute(args: Sequence[str], env: Mapping[str, str], path: Sequence[str]) -> None:
    """Run ``python ARGS`` in this process, and leave it."""
    os.environ.clear()
    os.environ.update(env)
    words = [word for word in args if word != "-P"]
    own = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    inherited = [folder for folder in path if folder not in (str(ROOT), "")]
    sys.path[:] = [*([] if "-P" in args else [os.getcwd()]), *own, *inherited]
    sys.modules.pop("sitecustomize", None)
    code = 0
    try:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")  # as every interpreter does first
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - whatever ends a program is printed, as the interpreter does
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
