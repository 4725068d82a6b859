#!/usr/bin/env python
"""Every way of adapting the weights on the same rows: what it trains, saves, needs, and what comes out.

    python benchmarks/adaptations.py                        # all of them, each run a fresh process; half an hour on two cores
    python benchmarks/adaptations.py --only lora ia3        # some of them
    python benchmarks/adaptations.py --write                # and put the table into docs/adaptations.md

Each learns from the same 300 alpaca rows for one epoch, at its own default rate (but for ``RATES``), and is measured on the 60 rows after them. Tokens
are counted without padding; peak memory is the process's high-water mark less what it held before the model was loaded; loading is
``tunesmith.load`` in a fresh process whose imports are done; switching is from one adapter to another on a base that is loaded.
The rows are those of ``data/alpaca_en_demo.json`` in the shared folder ($TUNESMITH_SHARED, by default the folder ``shared`` beside
the checkout). Results go to ``benchmarks/results/adaptations.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TUNESMITH_SHARED", ROOT.parent / "shared"))
RESULTS = ROOT / "benchmarks" / "results" / "adaptations.json"
PAGE = ROOT / "docs" / "adaptations.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"

ADAPTATIONS: dict[str, Any] = {
    "full": "full",
    "features": "features",
    "lora": "lora",
    "lora pissa": {"type": "lora", "init_lora_weights": "pissa_niter_4"},
    "qlora": {"type": "qlora"},
    "qlora int8": {"type": "qlora", "quant_type": "int8"},
    "bottleneck": "bottleneck",
    "bottleneck houlsby": {"type": "bottleneck", "variant": "houlsby"},
    "prefix": "prefix",
    "prompt": "prompt",
    "ia3": "ia3",
}

RATES = {"qlora": 2e-3}
"""Where the default is made for larger models: in 4 bits this small one loses more than a rate of 2e-4 mends in 38 steps."""

SWITCHED = ("lora", "lora pissa", "bottleneck", "bottleneck houlsby", "ia3")
"""Adapters of which several stand on one base in memory."""


def run(name: str, model: str, train: Path, held_out: Path, out: Path) -> dict[str, Any]:
    """One run, in this process."""
    import tunesmith

    recipe = {
        "model": model,
        "objective": "sft",
        "adaptation": ADAPTATIONS[name],
        "data": {"train": [{"path": str(train)}], "eval": {"path": str(held_out)}, "cache": False},
        "train": {"batch_size": 8, "save_steps": None, "eval_steps": None, "learning_rate": RATES.get(name)},
        "samples": {"count": 0},
    }
    found = tunesmith.train(recipe, out=out)
    kept = ("tokens_per_second", "peak_memory_bytes", "trainable_parameters", "total_parameters", "eval_loss_before", "eval_loss")
    weights = sum(file.stat().st_size for file in Path(found["model_dir"]).glob("*.safetensors"))
    return {"name": name, **{key: found[key] for key in kept}, "saved_bytes": weights, "model_dir": found["model_dir"]}


def opened(name: str, folder: Path) -> dict[str, Any]:
    """Seconds to load what a run saved and, of an adapter, to change to it from another one on the same base."""
    import tunesmith
    import tunesmith.models.load  # imports are not what is measured

    started = time.perf_counter()
    tunesmith.load(folder)
    loaded = time.perf_counter() - started
    switching = None
    if name in SWITCHED:
        both = tunesmith.load_adapters(folder, {"one": folder, "other": folder})
        took = sorted(both.switch(active) for active in ("other", "one") * 5)
        switching = took[len(took) // 2]
    return {"load_seconds": loaded, "switch_seconds": switching}


def fresh(*command: str) -> dict[str, Any]:
    """Run this file with other arguments and read the JSON of its last line."""
    done = subprocess.run([sys.executable, __file__, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def render(results: list[dict[str, Any]]) -> str:
    """The table of the page."""
    rows = [
        ["adaptation", "trained", "saved", "peak memory", "tokens/s", "held-out loss before", "after", "load", "switch"],
        ["---"] * 9,
    ]
    for one in results:
        share = 100 * one["trainable_parameters"] / one["total_parameters"]
        switch = one.get("switch_seconds")
        rows.append(
            [
                f"`{one['name']}`",
                f"{one['trainable_parameters']:,} ({share:.3g}%)",
                f"{one['saved_bytes'] / 1e6:,.2f} MB",
                f"{one['peak_memory_bytes'] / 1e9:.2f} GB",
                f"{one['tokens_per_second']:.0f}",
                f"{one['eval_loss_before']:.4f}",
                f"{one['eval_loss']:.4f}",
                f"{one['load_seconds']:.1f} s",
                "" if switch is None else f"{1000 * switch:.0f} ms",
            ]
        )
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "alpaca_en_demo.json")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--eval-rows", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=ADAPTATIONS, default=list(ADAPTATIONS))
    parser.add_argument("--write", action="store_true", help="put the table into docs/adaptations.md")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # NAME FOLDER_OF_ROWS OUT: one run
    parser.add_argument("--open", nargs=2, help=argparse.SUPPRESS)  # NAME MODEL: loading and switching
    options = parser.parse_args()
    if options.run:
        name, rows, out = options.run
        print(json.dumps(run(name, options.model, Path(rows) / "train.json", Path(rows) / "held_out.json", Path(out))))
        return
    if options.open:
        print(json.dumps(opened(options.open[0], Path(options.open[1]))))
        return
    if not options.data.exists():
        raise SystemExit(f"no data at {options.data}: set TUNESMITH_SHARED to the folder that holds data/")

    from tunesmith import machine

    known = json.loads(RESULTS.read_text(encoding="utf-8"))["results"] if RESULTS.exists() else []
    results = {one["name"]: one for one in known}
    with tempfile.TemporaryDirectory() as place:
        every = json.loads(options.data.read_text(encoding="utf-8"))
        for file, rows in (("train", every[: options.rows]), ("held_out", every[options.rows :][: options.eval_rows])):
            (Path(place) / f"{file}.json").write_text(json.dumps(rows), encoding="utf-8")
        for name in options.only:
            found = fresh("--model", options.model, "--run", name, place, str(Path(place) / name.replace(" ", "-")))
            found |= fresh("--open", name, found.pop("model_dir"))
            results[name] = found
            print(json.dumps(found), file=sys.stderr)
            ordered = [results[one] for one in ADAPTATIONS if one in results]
            about = {"machine": machine.describe(), "model": options.model, "rows": options.rows, "eval_rows": options.eval_rows}
            RESULTS.write_text(json.dumps({**about, "results": ordered}, indent=1) + "\n", encoding="utf-8")
    table = render(ordered)
    print(table)
    if options.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
