#!/usr/bin/env python
"""Supervised fine-tuning against the peers: tokens per second, peak memory, and the loss of what came out.

    python benchmarks/sft.py --rows 96                       # LoRA and full, each side in turn, every run a fresh process
    python benchmarks/sft.py --rows 96 --adaptation lora --rounds 3

Ours and the peers' runs see the same model, rows, length, rank, rate and schedule. Tokens are counted without padding. Peak memory is
the process's high-water mark less what it held before the model was loaded. One plain scorer (transformers in fp32, row by row)
gives the loss of every saved model on the rows after the training rows. Our run's process also measures the rate of one large
matrix product in the run's number format: ``share_of_matmul`` is the part of that rate that the products of training reached
(``rates.training_flops``), whatever else the run did. The peers are run by ``bench/peers.py`` of the shared
folder ($TUNESMITH_SHARED, by default the folder ``shared`` beside the checkout). Results go to ``benchmarks/results/`` as JSON.

A processor without AVX-512 is emulated with ``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2``. The
peers then compute in fp32, too, which is faster there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TUNESMITH_SHARED", ROOT.parent / "shared"))
PEERS = ["trainer:tuned-1", "trl:tuned-1", "trl:tuned-8"]


def ours(model: str, data: Path, rows: int, adaptation: str, save: Path) -> dict:
    """One run of tunesmith, in this process."""
    import tunesmith

    lora = adaptation == "lora"
    recipe = {
        "model": model,
        "objective": "sft",
        "adaptation": {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"} if lora else "full",
        "data": {"train": [{"path": str(data), "limit": rows}], "eval": {"fraction": 0.0}},
        "train": {"learning_rate": 2e-4 if lora else 2e-5, "batch_size": 8, "eval_steps": None, "save_steps": None},
        "samples": {"count": 0},
    }
    outcome = tunesmith.train(recipe, out=save)
    manifest = json.loads((save / "manifest.json").read_text(encoding="utf-8"))
    return {
        "peer": "tunesmith", "adaptation": adaptation, "setting": "default", "rows": rows, "tokens": outcome["tokens"],
        "seconds": outcome["train_seconds"], "tokens_per_second": outcome["tokens_per_second"],
        "peak_memory_bytes": outcome["peak_memory_bytes"], "model": outcome["model_dir"],
        "micro_batch_tokens": manifest["micro_batch_tokens"],
        **share_of_matmul(recipe, manifest, outcome["train_seconds"]),
    }  # fmt: skip


def share_of_matmul(recipe: dict, manifest: dict, seconds: float) -> dict:
    """The class of the processor, the rate of a large matrix product, and the share of it that training reached.

    The tokens that several rows of a micro-batch begin with count once, as the run of ``manifest`` computed them."""
    import rates
    import torch

    from tunesmith import recipe as recipes
    from tunesmith.data.batch.pack import Layout
    from tunesmith.models import lanes
    from tunesmith.train import setup

    ready = setup.read(recipes.parse(recipe), torch.device("cpu"), lambda line: None)
    rows = [ready.data.train[number] for number in range(len(ready.data.train))]
    route, least = manifest["route"], lanes.least_tokens(manifest["parameters"]["total"])
    layout = Layout(route["batches"] == "packed", route["shared"], route["lanes"], least)
    steps = ready.source.steps(1)
    tokens = sum(step.tokens(part, layout) for step in steps for part in step.split(manifest["micro_batch_tokens"], layout))
    targets = sum(int(row["supervised"][1:].sum()) for row in rows)
    measured = rates.measure({"float32": "fp32", "bfloat16": "bf16"}[manifest["precision"]["compute"]])
    flops = rates.training_flops(ready.model_folder.network, tokens, targets, recipe["adaptation"] == "full")
    return {**measured, "share_of_matmul": rates.share(measured, flops, seconds)}


def score(folder: Path, base: str, data: Path, start: int, rows: int) -> float:
    """Mean loss per completion token over ``rows`` rows from ``start``: plain transformers (and peft), fp32, one row at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in json.loads(data.read_text(encoding="utf-8"))[start : start + rows]:
            user = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]
            prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([tokenizer.apply_chat_template(turns, return_dict=False)])
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
            count += ids.shape[1] - len(prompt)
    return total / count


def fresh(*command: str) -> dict:
    """Run a command and read the JSON of its last line."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def one_round(model: str, data: Path, rows: int, eval_rows: int, adaptation: str, peers: list[str], folder: Path) -> list[dict]:
    """Every side once: tunesmith first, then the peers, each trained and scored in fresh processes."""
    runs = []
    me = [__file__, "--model", model, "--data", str(data), "--rows", str(rows), "--eval-rows", str(eval_rows)]
    runs.append(fresh(*me, "--run", str(folder / "ours"), "--adaptation", adaptation))
    for peer, setting in (name.split(":") for name in peers):
        save = folder / f"{peer}-{setting}"
        run = fresh(
            str(SHARED / "bench" / "peers.py"), "sft", "--peer", peer, "--setting", setting, "--model", model, "--data", str(data),
            "--rows", str(rows), "--adaptation", adaptation, "--save", str(save), "--precision", peers_precision(),
        )  # fmt: skip
        runs.append({**run, "model": str(save)})
    for run in runs:
        run["eval_loss"] = fresh(*me, "--score", run.pop("model"))["eval_loss"]
        print(json.dumps(run), file=sys.stderr)
    return runs


def peers_precision() -> str:
    """The peers choose by /proc/cpuinfo, which still lists what an emulation turned off."""
    from tunesmith import machine

    return "fp32" if machine.emulates_avx2() else "auto"


def compare(runs: list[dict]) -> dict:
    """Ours against the best peer of each figure, by the best of the rounds (timings are noisy, and noise only slows)."""
    mine = [run for run in runs if run["peer"] == "tunesmith"]
    theirs = [run for run in runs if run["peer"] != "tunesmith"]
    fastest = max(theirs, key=lambda run: run["tokens_per_second"])
    leanest = min(theirs, key=lambda run: run["peak_memory_bytes"])
    best = max(mine, key=lambda run: run["tokens_per_second"])
    return {
        "adaptation": best["adaptation"],
        "class": best["class"],
        "precision": best["precision"],
        "matmul_flops": best["matmul_flops"],
        "share_of_matmul": best["share_of_matmul"],
        "tokens_per_second": best["tokens_per_second"],
        "best_peer": f"{fastest['peer']} {fastest['setting']}",
        "best_peer_tokens_per_second": fastest["tokens_per_second"],
        "ratio": best["tokens_per_second"] / fastest["tokens_per_second"],
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in mine),
        "least_peer_peak_memory_bytes": leanest["peak_memory_bytes"],
        "eval_loss": best["eval_loss"],
        "best_peer_eval_loss": fastest["eval_loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "alpaca_en_demo.json")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--adaptation", choices=["lora", "full"], help="default: both")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="default: all, and the best of them counts")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # one run of ours, into this folder
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)  # the loss of one saved model
    options = parser.parse_args()
    if not options.data.exists():
        raise SystemExit(f"no data at {options.data}: set TUNESMITH_SHARED to the folder that holds data/ and bench/")
    if options.run:
        print(json.dumps(ours(options.model, options.data, options.rows, options.adaptation, options.run)))
        return
    if options.score:
        print(json.dumps({"eval_loss": score(options.score, options.model, options.data, options.rows, options.eval_rows)}))
        return

    import rates
    from rich.console import Console
    from rich.table import Table

    from tunesmith import machine
    from tunesmith.models.load.load import locate

    model = str(locate(options.model).path)
    results = []
    for adaptation in [options.adaptation] if options.adaptation else ["lora", "full"]:
        runs = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                runs += one_round(model, options.data, options.rows, options.eval_rows, adaptation, options.peers, Path(folder))
        results.append({"comparison": compare(runs), "runs": runs})
        table = Table("", "tokens/s", "peak MB", "eval loss", title=f"{adaptation}, {options.rows} rows")
        for run in runs:
            table.add_row(
                f"{run['peer']} {run['setting']}", f"{run['tokens_per_second']:.0f}", f"{run['peak_memory_bytes'] / 1e6:.0f}",
                f"{run['eval_loss']:.4f}",
            )  # fmt: skip
        Console(width=100).print(table)
        found = results[-1]["comparison"]
        print(f"{adaptation}: {found['ratio']:.2f} times the best peer ({found['best_peer']})")
        print(f"{adaptation}: {rates.describe(found)}, of which training reached {found['share_of_matmul']:.0%}")
    target = ROOT / "benchmarks" / "results"
    target.mkdir(exist_ok=True)
    processor = machine.processor_class().split()[0].lower()  # of an emulated one, too: the file says so
    name = f"sft-{options.adaptation or 'all'}-{options.rows}-{processor}.json"
    (target / name).write_text(json.dumps({"machine": machine.describe(), "model": options.model, "results": results}, indent=1))
    print(f"written to {target / name}")


if __name__ == "__main__":
    main()
