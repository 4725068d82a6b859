#!/usr/bin/env python
"""Run every recipe of this folder unchanged but for a few steps, in a temporary folder; print a line for each.

    python recipes/run_all.py                      # all, 3 steps each
    python recipes/run_all.py sft-lora cpt-full    # these two
    python recipes/run_all.py rlhf/pipeline        # all stages of a pipeline
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.recipe import Recipe

HERE = Path(__file__).resolve().parent
TEXT_OBJECTIVES = ("sft", "cpt", "grpo")
ROW = "{:<18} {:>5} {:>17} {:>8}  {}"


PIPELINE = "pipeline.yaml"


def recipes() -> dict[str, Path]:
    """Name -> file: the recipes of this folder, and the pipelines of the folders in it."""
    found = [*sorted(HERE.glob("*.yaml")), *sorted(HERE.glob(f"*/{PIPELINE}"))]
    return {path.relative_to(HERE).with_suffix("").as_posix(): path for path in found}


def shortened(path: Path, steps: int, model: str | None) -> list[str]:
    """Overrides that make a recipe short: few steps, few evaluation rows, one short sample, and nothing else."""
    from tunesmith import recipe

    if path.name != PIPELINE:
        return _shortened(recipe.load(path), steps, model)
    from tunesmith.pipeline import pipeline_file

    stages = pipeline_file.read(path, Path("out").resolve()).stages
    return [
        f"{stage.name}.{key}"
        for stage in stages
        for key in _shortened(stage.recipe, steps, None if "model" in stage.inputs else model)
    ]


def _shortened(chosen: Recipe, steps: int, model: str | None) -> list[str]:
    keys = [f"train.max_steps={steps}", "train.epochs=1"]
    keys += (
        ["samples={count: 1, max_new_tokens: 8}"]
        if chosen.resolved()["objective"]["type"] in TEXT_OBJECTIVES
        else []
    )
    keys += ["data.eval.limit=8"] if chosen.data.eval.fraction else []
    return [*keys, f"model={model}"] if model else keys


def run(path: Path, out: Path, keys: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Run a recipe or a pipeline in a new process. Returns (results of its runs, "") or ([], its error output)."""
    verb = "pipeline" if path.name == PIPELINE else "train"
    command = [sys.executable, "-m", "tunesmith", verb, str(path), *keys, "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [], done.stderr[-3000:]
    facts = json.loads(done.stdout)
    if verb == "train":
        return [facts], ""
    losses = ([stage["steps"], *stage["figures"]["eval_loss"]] for stage in facts["stages"])
    return [{"steps": steps, "eval_loss_before": old, "eval_loss": new} for steps, old, new in losses], ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="recipes without .yaml; default: all")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--model", help="use this model instead of the recipe's")
    arguments = parser.parse_args()
    known = recipes()
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"no recipe {', '.join(unknown)}; recipes are {', '.join(known)}")
    print(ROW.format("recipe", "steps", "loss or reward", "seconds", ""), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="tunesmith-recipes-") as folder:
        for name in arguments.names or known:
            started = time.monotonic()
            keys = shortened(known[name], arguments.steps, arguments.model)
            results, error_output = run(known[name], Path(folder) / name, keys)
            seconds = f"{time.monotonic() - started:.1f}"
            if error_output:
                failed += 1
                print(ROW.format(name, "-", "-", seconds, "FAILED"), error_output, sep="\n", flush=True)
            else:
                for result in results:
                    figure = next(name for name in ("eval_loss", "eval_reward") if name in result)
                    change = f"{result[f'{figure}_before']:.3f} -> {result[figure]:.3f}"
                    print(ROW.format(name, result["steps"], change, seconds, "ok"), flush=True)
    print(f"{failed} of {len(arguments.names or known)} recipes failed" if failed else "every recipe ran")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
