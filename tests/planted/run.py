"""Plant each fault in a copy of the source and show which test catches it.

    python -m tests.planted.run                       # every fault, two at a time
    python -m tests.planted.run mean-for-sum dpo-sign # some of them
    python -m tests.planted.run --json > planted.json

Exit code 0 when every fault is caught, 1 when one is not. torch and transformers are imported once; each fault's tests run
in a fork of that process, which sees the changed copy as ``tunesmith``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
PRELOADED = ("torch", "transformers", "peft", "accelerate", "pytest", "scipy", "safetensors.torch", "pydantic", "typer")
LIMIT_SECONDS = 600


@dataclass(frozen=True)
class Caught:
    """What became of one fault. ``by``: the node id of the test that failed, None when all tests passed."""

    name: str
    claim: str
    by: str | None
    seconds: float
    output: str


def plant(fault: Any, folder: Path) -> None:
    """Copy the source into ``folder`` and put the fault there. Raises ValueError unless ``old`` occurs exactly once."""
    shutil.copytree(SOURCE, folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    path = folder / "src" / "tunesmith" / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.file} holds its `old` {text.count(fault.old)} times, expected once")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def arguments(fault: Any) -> list[str]:
    """Arguments of pytest: the fault's tests, without files that this checkout lacks."""
    return [word for word in shlex.split(fault.tests) if not word.endswith(".py") or (ROOT / word).is_file()]


class FirstFailure:
    """A plugin of pytest that notes the first test that fails."""

    def __init__(self) -> None:
        self.node: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.node is None:
            self.node = report.nodeid


def _child(fault: Any, folder: Path, answer: Path) -> None:
    """In the fork: run the tests on the changed copy and write {"by", "output"}."""
    import pytest

    os.environ["PYTHONPATH"] = str(folder / "src")
    os.environ["TUNESMITH_HOME"] = str(folder / "home")
    os.chdir(ROOT)
    sys.path.insert(0, str(folder / "src"))
    sys.path.insert(0, str(ROOT))
    watch, said = FirstFailure(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(
            [
                "-x",
                "-q",
                "--tb=line",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                f"--basetemp={folder / 'tmp'}",
                *arguments(fault),
            ],
            plugins=[watch],
        )
        used = importlib.import_module("tunesmith").__file__
    assert used and used.startswith(str(folder)), f"the tests ran on {used}"
    by = watch.node if code == 1 else None
    answer.write_text(json.dumps({"by": by, "output": "" if by else said.getvalue()[-2000:]}), encoding="utf-8")


def catch(fault: Any) -> Caught:
    """Run the tests of ``fault`` in a fork, on a copy of the source that has it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        folder = Path(name)
        plant(fault, folder)
        answer = folder / "answer.json"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _child(fault, folder, answer)
                code = 0
            finally:
                os._exit(code)
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() - started > LIMIT_SECONDS:
                os.kill(child, 9)
                os.waitpid(child, 0)
                break
            time.sleep(0.05)
        found = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {"by": None, "output": "no answer"}
    return Caught(fault.name, fault.claim, found["by"], time.monotonic() - started, found["output"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="faults; default: all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(argv)
    from tests.planted.faults import FAULTS

    unknown = set(options.names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"unknown fault {min(unknown)!r}; the names are in tests/planted/faults.py")
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
    for package in PRELOADED:
        importlib.import_module(package)
    chosen = [fault for fault in FAULTS if not options.names or fault.name in options.names]
    started = time.monotonic()
    results: list[Caught] = []
    with ThreadPoolExecutor(options.workers) as pool:
        for number, one in enumerate(pool.map(catch, chosen), start=1):
            results.append(one)
            verdict = f"caught by {one.by}" if one.by else "NOT CAUGHT"
            print(f"{number:3}/{len(chosen)}  {one.name}: {verdict} ({one.seconds:.0f} s)", file=sys.stderr, flush=True)
            if not one.by and one.output:
                print("        " + one.output.replace("\n", "\n        "), file=sys.stderr, flush=True)
    caught = sum(one.by is not None for one in results)
    print(f"{caught} of {len(results)} planted faults caught in {time.monotonic() - started:.0f} s", file=sys.stderr)
    if options.json:
        faults = [{"name": one.name, "claim": one.claim, "caught_by": one.by, "seconds": one.seconds} for one in results]
        print(json.dumps({"caught": caught, "planted": len(results), "faults": faults}))
    return 0 if caught == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
