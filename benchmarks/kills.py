#!/usr/bin/env python
"""Kill a run at random moments, resume it each time, and compare what comes out with an undisturbed run, bit for bit.

    python benchmarks/kills.py --kills 20 --rows 64 --model smollm2-135m

The kill is SIGKILL of the real process, anywhere: while it loads, trains, evaluates or writes a checkpoint. Weights, optimiser,
metrics (all but the timing keys) and samples must be those of a run that nobody touched.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARED = Path(os.environ.get("TUNESMITH_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tunesmith", "train", str(recipe), "--out", str(out), "--json"]
    if (out / "recipe.yaml").exists():
        command.append("--resume")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run failed with exit code {process.returncode}:\n{said[-3000:]}")


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two run folders."""
    import torch
    from safetensors.torch import load_file

    from tunesmith.runs import metrics_file
    from tunesmith.train import checkpoint

    def history(run: Path) -> list[dict]:
        return [
            {k: v for k, v in line.items() if k not in metrics_file.TIMING_KEYS}
            for line in metrics_file.read(run / "metrics.jsonl")
        ]

    found = [] if history(one) == history(other) else ["metrics"]
    found += [] if (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text() else ["samples"]
    last = max(checkpoint.steps(one / "checkpoints"))
    files = [
        f"checkpoints/step-{last}/state.safetensors",
        *(f"model/{file.name}" for file in (one / "model").glob("*.safetensors")),
    ]
    for name in files:
        ours, theirs = load_file(one / name), load_file(other / name)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            found.append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "alpaca_en_demo.json")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    drawn = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        settings = {
            "model": options.model,
            "objective": "sft",
            "adaptation": {"type": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
            "data": {"train": [{"path": str(options.data), "limit": options.rows}], "eval": {"fraction": 0.05}},
            "train": {"batch_size": 2, "save_steps": 1, "eval_steps": 5},
            "samples": {"count": 1, "max_new_tokens": 8},
        }
        recipe.write_text(json.dumps(settings))
        began = time.monotonic()
        finish(start(recipe, folder / "straight"))
        whole = time.monotonic() - began
        kills = 0
        while kills < options.kills:
            process = start(recipe, folder / "killed")
            time.sleep(drawn.uniform(0.05, 0.35) * whole)
            if process.poll() is None:
                process.kill()
                kills += 1
            process.communicate()
            if process.returncode == 0:
                break
        finish(start(recipe, folder / "killed"))
        found = differences(folder / "straight", folder / "killed")
    print(json.dumps({"kills": kills, "seconds_of_the_undisturbed_run": round(whole, 1), "differences": found}))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
