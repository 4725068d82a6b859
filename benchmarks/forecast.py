"""How near the forecast of `tunesmith check --measure` comes to the run: memory and time, on five settings.

    python benchmarks/forecast.py [--out FILE] [--only NAME]

Each setting is forecast and then run, in processes of their own, with cached data. Asked: memory within 15%, time within 20%.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tunesmith import machine

MODEL = "smollm2-135m"
SOURCE = {"path": "builtin:docstrings", "limit": 160}
SETTINGS = {
    "lora, short rows": {"adaptation": {"type": "lora", "r": 8}, "train": {"batch_size": 8}},
    "full, short rows": {"adaptation": "full", "train": {"batch_size": 8}, "data": {"train": [{**SOURCE, "limit": 96}]}},
    "lora, blocks of 512": {
        "objective": "cpt",
        "adaptation": {"type": "lora", "r": 16},
        "train": {"batch_size": 4, "max_length": 512},
        "data": {"train": [{"path": "LONG"}]},
    },
    "full, blocks of 256, half the memory": {
        "objective": "cpt",
        "adaptation": "full",
        "train": {"batch_size": 4, "max_length": 256, "micro_batch_tokens": 512},
        "data": {"train": [{"path": "LONG", "limit": 4}]},
    },
    "lora, large steps, checkpointing": {
        "adaptation": {"type": "lora", "r": 64},
        "train": {"batch_size": 32, "gradient_checkpointing": True},
        "data": {"train": [{**SOURCE, "limit": 192}]},
    },
}


def long_documents(folder: Path) -> str:
    """Docstrings joined to documents of a few thousand characters."""
    from tunesmith.data.read import builtin

    answers = [row["response"] for row, _ in zip(builtin.rows("builtin:docstrings"), range(800))]
    documents = [{"text": "\n".join(answers[start : start + 40])} for start in range(0, len(answers), 40)]
    path = folder / "long.jsonl"
    path.write_text("\n".join(map(json.dumps, documents[:8])), encoding="utf-8")
    return str(path)


def recipe(name: str, folder: Path) -> Path:
    wanted = SETTINGS[name]
    data = json.loads(json.dumps(wanted.get("data", {"train": [SOURCE]})).replace("LONG", long_documents(folder)))
    made = {"model": MODEL, "objective": "sft", **wanted, "data": {**data, "eval": {"fraction": 0.1}}}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


def command(*words: object) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-m", "tunesmith", *map(str, words), "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def compare(name: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = recipe(name, folder)
        command("check", path)  # data into the cache, so that both sides read it from there
        forecast = command("check", path, "--measure")["forecast"]
        started = time.perf_counter()
        ran = command("train", path, "--out", folder / "run")
        seconds = time.perf_counter() - started
    return {
        "setting": name,
        "peak_memory_bytes": {"forecast": forecast["peak_memory_bytes"], "run": ran["peak_memory_bytes"]},
        "train_seconds": {"forecast": forecast["train_seconds"], "run": ran["train_seconds"]},
        "total_seconds": {"forecast": forecast["total_seconds"], "run": seconds},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=SETTINGS)
    args = parser.parse_args()
    found = []
    print(f"{'setting':<40} {'memory GB':>18} {'training s':>20} {'whole run s':>20}")
    for name in [args.only] if args.only else SETTINGS:
        one = compare(name)
        found.append(one)
        cells = []
        for key, scale in (("peak_memory_bytes", 1e9), ("train_seconds", 1), ("total_seconds", 1)):
            said, was = (one[key][side] / scale for side in ("forecast", "run"))
            cells.append(f"{said:.2f} / {was:.2f} {said / was - 1:+.0%}")
        print(f"{name:<40} {cells[0]:>18} {cells[1]:>20} {cells[2]:>20}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"machine": machine.describe(), "settings": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
