#!/usr/bin/env python
"""PPO on a real model: seconds of each phase of an iteration and peak memory, next to separate models and TRL 0.24's PPOTrainer.

    python benchmarks/ppo.py --peer ~/trl024/bin/python --write      # all sides in turn; the table goes into docs/ppo.md
    python benchmarks/ppo.py --sides shared separate                 # without the peer

SmolLM2-135M with a LoRA of rank 8, a reward model that is a LoRA on the same base, 4 passes over the answers in 2 mini-batches. Sides:

``shared``    one network: policy, value head on its trunk, reference = the trained weights of step 0, reward model = a second adapter
``separate``  the same with the reward model as a network of its own (``share_base: false``)
``full``      full fine-tuning, which is what separate models mean for policy and reference: a copy of all weights, and a reward model
              of its own
``trl``       TRL's PPOTrainer (``ppo_peer.py``) by the Python of ``--peer``, an environment with trl 0.24: policy with the same LoRA,
              reference by switching it off, a value model and a reward model as networks of their own

Every run is a fresh process. A side's first iteration warms up; the others count. All sides answer the same prompts with at most
``--new-tokens`` tokens at temperature 0.7. Answers are sampled, so their lengths differ a little; the reward is the same model everywhere.
TRL decodes until the last answer of a chunk ends. Results go to ``benchmarks/results/ppo.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ppo.json"
PAGE = ROOT / "docs" / "ppo.md"
BEGIN, END = "<!-- benchmark: begin -->\n", "<!-- benchmark: end -->"
MODEL, RANK, EPOCHS, MINI_BATCHES = "smollm2-135m", 8, 4, 2
PHASES = ("rollout", "scoring", "logps", "update")
ASKED = {"iteration": 3.0, "peak_memory_bytes": 3.0}
"""Times that TRL's figure must be larger."""


def lora() -> dict[str, Any]:
    return {"type": "lora", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}


def prompts(count: int) -> list[str]:
    from itertools import islice

    from tunesmith.data.read import builtin

    return [row["instruction"] for row, _ in islice(builtin.rows("builtin:docstrings"), count)]


def make_reward(out: Path) -> Path:
    """A reward model of one training step: its answers do not matter here, its shape does."""
    import tunesmith

    recipe = {
        "model": MODEL, "objective": "reward", "adaptation": lora(), "seed": 0,
        "data": {"train": [{"path": "builtin:preference", "limit": 8}], "eval": {"fraction": 0.0}, "cache": False},
        "train": {"max_steps": 1, "batch_size": 2, "eval_steps": None, "save_steps": None},
    }  # fmt: skip
    tunesmith.train(recipe, out=out)
    return out


def ours(setting: dict[str, Any], out: Path) -> dict[str, Any]:
    """One run of tunesmith, in this process."""
    import tunesmith

    side, answers = setting["side"], setting["answers"]
    file = out.parent / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in setting["prompts"]), "utf-8")
    recipe = {
        "model": MODEL,
        "objective": {
            "type": "ppo", "rewards": [{"type": "model", "path": setting["adapter"], "share_base": side == "shared"}],
            "rollout_batch_size": answers, "update_epochs": EPOCHS, "max_new_tokens": setting["max_new_tokens"],
        },
        "adaptation": "full" if side == "full" else lora(),
        "data": {"train": [{"path": str(file)}], "eval": {"fraction": 0.0}, "cache": False},
        "train": {
            "learning_rate": setting["learning_rate"], "batch_size": answers // MINI_BATCHES, "eval_steps": None,
            "save_steps": None, "max_steps": setting["iterations"] * EPOCHS * MINI_BATCHES, "precision": setting["precision"],
        },
        "samples": {"count": 0},
        "seed": 0,
    }  # fmt: skip
    found = tunesmith.train(recipe, out=out)
    phases: list[dict[str, float]] = []
    for line in (out / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "rollout":
            phases.append({name: record[f"{name}_seconds"] for name in PHASES if f"{name}_seconds" in record} | {"update": 0.0})
        elif record["kind"] == "train":
            phases[-1]["update"] += record["update_seconds"]
    for one in phases:
        one["iteration"] = sum(one[name] for name in PHASES)
    return {"phases": phases, "peak_memory_bytes": found["peak_memory_bytes"]}


def fresh(python: str, *command: str) -> dict[str, Any]:
    """Run a command and read the JSON of its last line."""
    done = subprocess.run([python, *command], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def why_no_peer(python: str | None) -> str | None:
    """Why the peer cannot run, or None."""
    if python is None:
        return "no --peer: the Python of an environment with trl 0.24"
    asked = subprocess.run([python, "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True)
    version = asked.stdout.strip()
    if asked.returncode or not version.startswith("0.24."):
        return f"{python} has {f'trl {version}' if version else 'no trl'}; expected trl 0.24, the last with a PPOTrainer"
    return None


def one_run(setting: dict[str, Any], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    side = setting["side"]
    path = folder / "setting.json"
    path.write_text(json.dumps(setting), "utf-8")
    if side == "trl":
        found = fresh(options.peer, str(Path(__file__).with_name("ppo_peer.py")), str(path))
    else:
        out = Path(tempfile.mkdtemp(dir=folder)) / "run"
        found = fresh(sys.executable, __file__, "--run", str(path), str(out))
    later = found["phases"][1:] or found["phases"]
    seconds = {name: median(one[name] for one in later) for name in (*PHASES, "iteration")}
    kept = {name: setting[name] for name in ("side", "answers", "max_new_tokens", "precision", "micro_batch") if name in setting}
    return {**kept, **seconds, **found}


def table(runs: list[dict[str, Any]]) -> str:
    """The medians over runs of each side, as Markdown."""
    lines = [
        "| side | rollout, s | scoring, s | log-probabilities, s | update, s | iteration, s | peak memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for side in ("shared", "separate", "full", "trl"):
        own = [run for run in runs if run["side"] == side]
        if own:
            seconds = [f"{median(run[name] for run in own):.1f}" for name in (*PHASES, "iteration")]
            memory = median(run["peak_memory_bytes"] for run in own) / 1e9
            lines.append(f"| {side} | {' | '.join(seconds)} | {memory:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sides", nargs="+", choices=["shared", "separate", "full", "trl"], default=["shared", "separate", "full", "trl"]
    )
    parser.add_argument("--peer", help="the Python of an environment with trl 0.24")
    parser.add_argument("--answers", type=int, default=32, help="of an iteration")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each side, in turn")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--micro-batch", type=int, default=4, help="TRL's per_device_train_batch_size")
    parser.add_argument("--more", action="store_true", help="keep the runs in the results")
    parser.add_argument("--write", action="store_true", help="put the table into docs/ppo.md")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # SETTING OUT: one run of ours
    parser.add_argument("--reward", type=Path, help=argparse.SUPPRESS)  # OUT: make the reward model
    options = parser.parse_args()
    if options.reward:
        print(json.dumps({"path": str(make_reward(options.reward))}))
        return
    if options.run:
        print(json.dumps(ours(json.loads(Path(options.run[0]).read_text("utf-8")), Path(options.run[1]))))
        return

    from tunesmith import machine
    from tunesmith.models.find.locate import locate

    sides = list(options.sides)
    if "trl" in sides and (why := why_no_peer(options.peer)):
        print(f"trl is left out: {why}", file=sys.stderr)
        sides.remove("trl")
    known: dict[str, Any] = {"runs": []}
    if options.more and RESULTS.exists():
        known = json.loads(RESULTS.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        reward = fresh(sys.executable, __file__, "--reward", str(folder / "judge"))["path"]
        merged = folder / "judge" / "merged"
        common = {
            "model": str(locate(MODEL).path), "adapter": reward, "reward": str(merged if merged.is_dir() else locate(MODEL).path),
            "prompts": prompts(options.answers * options.iterations), "answers": options.answers, "max_new_tokens": options.new_tokens,
            "iterations": options.iterations, "precision": options.precision, "learning_rate": 1e-4, "rank": RANK, "epochs": EPOCHS,
            "mini_batches": MINI_BATCHES, "micro_batch": options.micro_batch, "rollout_batch": options.answers,
        }  # fmt: skip
        for _ in range(options.rounds):
            for side in sides:
                known["runs"].append(one_run({**common, "side": side}, options, folder))
                print(json.dumps({name: value for name, value in known["runs"][-1].items() if name != "phases"}), file=sys.stderr)
                known["machine"] = machine.describe()
                RESULTS.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    print(text := table(known["runs"]))
    if options.write:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
