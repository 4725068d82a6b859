#!/usr/bin/env python
"""Run every recipe of this folder unchanged but for a few steps, in a temporary folder; print a line for each.

    python recipes/run_all.py                      # all, 3 steps each
    python recipes/run_all.py sft-lora cpt-full    # these two
    python recipes/run_all.py --steps 20 --model FOLDER

Exits with code 1 and prints the output of each recipe that failed.
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
TEXT_OBJECTIVES = ("sft", "cpt")
ROW = "{:<18} {:>5} {:>17} {:>8}  {}"


def shortened(path: Path, steps: int, model: str | None) -> list[str]:
    """Overrides that make a recipe short: few steps, few evaluation rows, one short sample, and nothing else."""
    from tunesmith import recipe

    chosen = recipe.load(path)
    keys = [f"train.max_steps={steps}", "train.epochs=1"]
    keys += (
        ["samples={count: 1, max_new_tokens: 8}"]
        if chosen.resolved()["objective"]["type"] in TEXT_OBJECTIVES
        else []
    )
    keys += ["data.eval.limit=8"] if chosen.data.eval.fraction else []
    return [*keys, f"model={model}"] if model else keys


def run(path: Path, out: Path, keys: list[str]) -> tuple[dict[str, Any], str]:
    """Run one recipe in a new process. Returns (result, "") or ({}, its error output)."""
    command = [sys.executable, "-m", "tunesmith", "train", str(path), *keys, "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    return (json.loads(done.stdout), "") if done.returncode == 0 else ({}, done.stderr[-3000:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="recipes without .yaml; default: all")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--model", help="use this model instead of the recipe's")
    arguments = parser.parse_args()
    recipes = {path.stem: path for path in sorted(HERE.glob("*.yaml"))}
    unknown = [name for name in arguments.names if name not in recipes]
    if unknown:
        parser.error(f"no recipe {', '.join(unknown)}; recipes are {', '.join(recipes)}")
    print(ROW.format("recipe", "steps", "eval loss", "seconds", ""), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="tunesmith-recipes-") as folder:
        for name in arguments.names or recipes:
            started = time.monotonic()
            result, error_output = run(
                recipes[name], Path(folder) / name, shortened(recipes[name], arguments.steps, arguments.model)
            )
            seconds = f"{time.monotonic() - started:.1f}"
            if error_output:
                failed += 1
                print(ROW.format(name, "-", "-", seconds, "FAILED"), error_output, sep="\n", flush=True)
            else:
                loss = f"{result['eval_loss_before']:.3f} -> {result['eval_loss']:.3f}"
                print(ROW.format(name, result["steps"], loss, seconds, "ok"), flush=True)
    print(f"{failed} of {len(arguments.names or recipes)} recipes failed" if failed else "every recipe ran")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
