#!/usr/bin/env python
"""What a run does between the command and its first optimiser step, with seconds.

    python benchmarks/startup.py                                  # recipes/sft-lora.yaml, one step
    python benchmarks/startup.py recipes/demo.yaml train.precision=fp32

It runs ``tunesmith train`` in a new process, with a clock around the functions of the start. Run it twice: the first run fills the
caches (encoded rows, compiled kernels, the model file in the system's memory). ``python -X importtime -c "import
tunesmith.train.run"`` shows the imports one by one.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLOCKED = (
    ("tunesmith.train.setup", "open_base", "config, tokenizer, the adapted network without weights"),
    ("tunesmith.train.setup", "read_rows", "data"),
    ("tunesmith.train.setup", "_load_network", "load and adapt the weights"),
    ("tunesmith.train.fast_path", "choose", "parity check"),
    ("tunesmith.train.rehearsal", "rehearse", "try the heaviest micro-batch"),
    ("tunesmith.train.run", "_answer_prompts", "answer the sample prompts before training"),
    ("tunesmith.train.run", "_evaluate", "evaluate step 0, without the answers"),
)


class FirstStep(BaseException):
    """Ends the process at the first optimiser step: nothing in tunesmith catches it."""


def clocked(words: list[str], began: float) -> None:
    """Run the command line in this process until its first step. ``began``: when the process was started."""
    found: list[tuple[str, float]] = [("Python", time.time() - began)]
    mark = time.time()
    from tunesmith.cli import garbage_collection, main

    gc.set_threshold(garbage_collection.NEW_OBJECTS)  # as the program does
    with garbage_collection.imports():
        from tunesmith.train import loop, run  # noqa: F401

    found.append(("imports", time.time() - mark))
    inner = [0.0]

    def clock(module: str, name: str, label: str) -> None:
        function = getattr(sys.modules[module], name)

        def timed(*given: Any, **named: Any) -> Any:
            start, outer, inner[0] = time.time(), inner[0], 0.0
            result = function(*given, **named)
            seconds = time.time() - start
            found.append((label, seconds - inner[0]))
            inner[0] = outer + seconds
            return result

        setattr(sys.modules[module], name, timed)

    for one in CLOCKED:
        clock(*one)

    def first_step(*_: Any) -> None:
        raise FirstStep

    loop.train_step = first_step
    try:
        main.main(words)
    except FirstStep:
        total = time.time() - began
        found.append(("the rest", total - sum(seconds for _, seconds in found)))
        print("\n" + json.dumps({"seconds": total, "parts": found}))


def main(arguments: list[str]) -> dict[str, Any]:
    recipe, overrides = (arguments or [str(ROOT / "recipes" / "sft-lora.yaml")])[0], arguments[1:]
    with tempfile.TemporaryDirectory() as room:
        words = ["train", recipe, "train.max_steps=1", *overrides, "--out", f"{room}/run"]
        code = f"import startup; startup.clocked({words!r}, {time.time()!r})"
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    for label, seconds in found["parts"]:
        print(f"| {label} | {seconds:.2f} |")
    print(f"| from the command to the first step | {found['seconds']:.2f} |")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
