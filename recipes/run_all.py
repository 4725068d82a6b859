#!/usr/bin/env python
"""Run every recipe of this folder as it stands, for a few steps, into a temporary folder; a line for each.

    python recipes/run_all.py                      # all, 3 steps each
    python recipes/run_all.py sft-lora cpt-full    # these two
    python recipes/run_all.py --steps 20 --model FOLDER

Exit code 1 when one of them failed; what it said is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WRITES = ("sft", "cpt")
ROW = "{:<18} {:>5} {:>17} {:>8}  {}"


def shortened(path: Path, steps: int, model: str | None) -> list[str]:
    """Overrides that make a recipe short: few steps, few rows to evaluate on, one short sample. All else is as it stands."""
    from tunesmith import recipe

    whole = recipe.load(path)
    keys = [f"train.max_steps={steps}", "train.epochs=1"]
    keys += (
        ["samples={count: 1, max_new_tokens: 8}"] if whole.resolved()["objective"]["type"] in WRITES else []
    )
    keys += ["data.eval.limit=8"] if whole.data.eval.fraction else []
    return [*keys, f"model={model}"] if model else keys


def run(path: Path, out: Path, keys: list[str]) -> tuple[dict[str, Any], str]:
    """(the result, "") or ({}, what was said) of one run, in a process of its own."""
    command = [sys.executable, "-m", "tunesmith", "train", str(path), *keys, "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    return (json.loads(done.stdout), "") if done.returncode == 0 else ({}, done.stderr[-3000:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="recipes without .yaml; default: all")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--model", help="instead of each recipe's own")
    given = parser.parse_args()
    there = {path.stem: path for path in sorted(HERE.glob("*.yaml"))}
    unknown = [name for name in given.names if name not in there]
    if unknown:
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(there)}")
    print(ROW.format("recipe", "steps", "eval loss", "seconds", ""), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="tunesmith-recipes-") as folder:
        for name in given.names or there:
            started = time.monotonic()
            result, said = run(
                there[name], Path(folder) / name, shortened(there[name], given.steps, given.model)
            )
            seconds = f"{time.monotonic() - started:.1f}"
            if said:
                failed += 1
                print(ROW.format(name, "-", "-", seconds, "FAILED"), said, sep="\n", flush=True)
            else:
                loss = f"{result['eval_loss_before']:.3f} -> {result['eval_loss']:.3f}"
                print(ROW.format(name, result["steps"], loss, seconds, "ok"), flush=True)
    print(f"{failed} of {len(given.names or there)} recipes failed" if failed else "every recipe ran")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
