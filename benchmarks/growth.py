#!/usr/bin/env python
"""Does a run get slower or larger as the data, the rows or the run get longer?

    python benchmarks/growth.py rows                # 1,000, 10,000 and 100,000 rows: preparing them, and training on them
    python benchmarks/growth.py lengths             # rows of 128, 512 and 2,048 tokens, the same number of tokens in each step
    python benchmarks/growth.py steps --steps 300   # memory of a long run, in MB a step

Every run has its own process. The rows repeat the built-in questions about docstrings, with a number that makes each unique.
``--model``: a catalog name or a folder; by default a random llama of 135k parameters for rows and steps, smollm2-135m for lengths.
Results go to ``benchmarks/results/growth-WHAT.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
ROWS, LENGTHS = (1_000, 10_000, 100_000), (128, 512, 2048)
STEP_TOKENS = 4096
"""Tokens of a step of ``lengths``."""
SETTLED = 50
"""Steps after which the memory of a run is followed: before, caches fill."""


def write_rows(file: Path, count: int) -> None:
    from tunesmith.data.read import builtin

    found = [row for row, _ in builtin.rows("builtin:docstrings")]
    with file.open("w", encoding="utf-8") as out:
        for number, row in enumerate(islice(cycle(found), count)):
            out.write(json.dumps({**row, "instruction": f"{number}. {row['instruction']}"}) + "\n")


def write_long_rows(file: Path, length: int, count: int) -> None:
    """Rows that are cut at ``length`` tokens, and would be longer."""
    from tunesmith.data.read import builtin

    text = "\n".join(str(text) for row, _ in builtin.rows("builtin:docstrings") for text in row.values())
    size = length * 8  # characters: more than ``length`` tokens of English
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            start = number * 9973 % (len(text) - size)
            out.write(json.dumps({"prompt": f"{number}:", "completion": " " + text[start : start + size]}) + "\n")


def slope(steps: list[int], values: list[float]) -> float:
    """Least squares, after ``SETTLED`` steps or a third of them."""
    first = min(SETTLED, len(steps) // 3)
    return float(np.polyfit(steps[first:], values[first:], 1)[0])


def one_run(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare and train, in this process; run each in a new one."""
    import tunesmith
    from tunesmith import machine
    from tunesmith.runs import metrics_file
    from tunesmith.train import setup

    prepared: dict[str, Any] = {}
    read_rows, before = setup.read_rows, machine.memory_bytes()

    def noted(*given: Any) -> Any:
        start = machine.memory_bytes()
        machine.reset_peak_memory()
        data = read_rows(*given)
        grown = machine.peak_memory_bytes() - start
        prepared.update(seconds=data.report.seconds, cached=data.report.cached, peak_bytes=grown)
        return data

    setup.read_rows = noted
    recipe = {
        "model": options.model, "objective": {"type": "sft", "overlong": "truncate"}, "adaptation": "lora",
        "data": {"train": [{"path": options.data}], "eval": {"fraction": options.held_out}},
        "train": {
            "batch_size": options.batch, "max_steps": options.steps, "logging_steps": 1, "eval_steps": None, "save_steps": None,
            "max_length": options.length or None,
        },
        "samples": {"count": 0},
    }  # fmt: skip
    folder = Path(options.out)
    outcome = tunesmith.train(recipe, out=folder)
    logs = [one for one in metrics_file.read(folder / "metrics.jsonl") if one["kind"] == "train"]
    memory = [one["memory_bytes"] / 1e6 for one in logs]
    return {
        "prepare": prepared,
        "tokens_per_second": outcome["tokens_per_second"],
        "peak_memory_bytes": outcome["peak_memory_bytes"],
        "memory_mb": [round(value, 1) for value in (memory[0], memory[len(memory) // 3], memory[-1])],
        "memory_mb_per_step": round(slope([one["step"] for one in logs], memory), 4),
        "steps": outcome["steps"],
        "tokens": outcome["tokens"],
        "before_mb": round(before / 1e6, 1),
    }


def in_new_process(room: Path, name: str, model: str, data: Path, **settings: Any) -> dict[str, Any]:
    words = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    command = [sys.executable, __file__, "one", f"--model={model}", f"--data={data}", f"--out={room / name}", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = {"run": name, **json.loads(done.stdout.splitlines()[-1])}
    print(json.dumps(found), flush=True)
    return found


def tiny_model(room: Path) -> str:
    from tests.tiny import save_tiny

    return str(save_tiny("llama", room / "tiny", max_position_embeddings=4096))


def main(arguments: list[str]) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "lengths", "steps", "one"))
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--steps", type=int, default=0)
    for name in ("--data", "--out"):  # of one run
        parser.add_argument(name)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--held-out", type=float, default=0.0)
    options = parser.parse_args(arguments)
    if options.what == "one":
        print(json.dumps(one_run(options)))
        return []
    found = []
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        model = options.model or ("smollm2-135m" if options.what == "lengths" else tiny_model(room))
        data = room / "rows.jsonl"
        if options.what == "lengths":
            for length in options.lengths:
                steps, batch = options.steps or 3, max(1, STEP_TOKENS // length)
                write_long_rows(data, length, steps * batch)
                found.append(in_new_process(room, f"{length} tokens", model, data, batch=batch, length=length, steps=steps))
        else:
            for count in options.rows if options.what == "rows" else [2_000]:
                steps = options.steps or (30 if options.what == "rows" else 300)
                write_rows(data, count)
                found.append(in_new_process(room, f"{count} rows", model, data, steps=steps, held_out=0.01))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"growth-{options.what}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(sys.argv[1:])
