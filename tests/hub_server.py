"""Answers the questions of ``hub.ask`` without loading ``datasets`` for each: one process that has loaded it forks.

Every question runs in a new working folder. The caches of the Hub's libraries are relative paths, so no question finds
files that another one left.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tunesmith.hub import ask

SERVER = """
import json, os, sys
import charset_normalizer, datasets, scipy.io
from tunesmith.hub import client, splits
for line in sys.stdin:
    question = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(question["folder"])
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.stdin = open(0)
        try:
            code = (splits if question["program"] == splits.__spec__.name else client).main(*question["arguments"])
        except Exception as error:
            client.print_reason(type(error), error, None)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE")


class HubServer:
    """``subprocess`` for modules that start the Hub's programs: ``run`` and ``Popen`` let the server answer."""

    def __init__(self, endpoint: str) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in ask._REMOVED}
        environment = kept | {name: name.lower() for name in CACHES} | {"HF_ENDPOINT": endpoint, "USE_TORCH": "0"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, stdin=pipe, stdout=pipe, text=True)
        self.subprocess = SimpleNamespace(run=self.run, Popen=self.popen, PIPE=pipe, TimeoutExpired=subprocess.TimeoutExpired)

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()

    def run(self, command: list[str], input: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        program, *arguments = command[3:]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "stdin").write_text(input)
            assert self.process.stdin and self.process.stdout
            print(json.dumps({"folder": folder, "program": program, "arguments": arguments}), file=self.process.stdin, flush=True)
            code = int(self.process.stdout.readline())
            out, err = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command, code, out, err)

    def popen(self, command: list[str], stderr: Any, **options: Any) -> Any:
        """A process that has ended, with its output."""
        done = self.run(command)
        stderr.write(done.stderr)
        return _Ended(io.StringIO(done.stdout))


class _Ended:
    def __init__(self, stdout: io.StringIO) -> None:
        self.stdout = stdout

    def __enter__(self) -> _Ended:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    wait = kill = lambda self: None
