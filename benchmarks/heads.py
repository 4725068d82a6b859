#!/usr/bin/env python
"""Classification, tagging and question answering on real rows: figures, rows a second and peak memory, beside the peers'.

    python benchmarks/heads.py                          # everything; two hours on two cores
    python benchmarks/heads.py --only classify tag      # some of it; --seeds 1 for a first look
    python benchmarks/heads.py --write                  # and put the tables into docs/speed.md

Every run is a fresh process. Neither side looks at the test rows before its training has ended; both are scored by one function on
what they say of these rows. ``speed`` trains on the same rows in turn, ours and a plain padded loop, and gives the ratio of each
pair, the processor's class, the rate of one large product, and the share of it that tunesmith reached. Both sides compute in bf16, or in
fp32 on a processor without fast bf16. Rows a second are those of training alone; ``whole`` is everything that ``tunesmith.train`` did. The rows are ``data/`` of the
shared folder ($TUNESMITH_SHARED, by default the folder ``shared`` beside the checkout): rt_polarity as it is; wnut17 and xquad in
order, the last sentences and questions for the test. Results go to ``benchmarks/results/heads.json``, run by run.
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

import numpy as np
import rates

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TUNESMITH_SHARED", ROOT.parent / "shared"))
RESULTS = ROOT / "benchmarks" / "results" / "heads.json"
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- heads: begin -->\n", "<!-- heads: end -->"

SENTENCES, QUESTIONS = 2700, 1000
"""Of wnut17 and xquad: the rows to learn from, the others are the test."""

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": LAYERS}

RT: dict[str, Any] = {"task": "classify", "model": "minilm-l6", "batch_size": 32, "epochs": 2, "learning_rate": 5e-5}
MANY = {"adaptation": "features", "learning_rate": 1e-3, "epochs": 10}
MINI_TAG = {"task": "tag", "model": "minilm-l6", "batch_size": 16, "epochs": 3, "learning_rate": 2e-4, "warmup_ratio": 0.1}
MINI_QA = {"task": "qa", "model": "minilm-l6", "batch_size": 8, "epochs": 2, "learning_rate": 2e-4, "warmup_ratio": 0.1}
SMOL = {"model": "smollm2-135m", "adaptation": LORA, "learning_rate": 5e-4}

RUNS: dict[str, dict[str, Any]] = {
    "classify full": {**RT, "peer": True, "asked": 0.83},
    "classify lora": {**RT, "adaptation": "lora", "learning_rate": 1e-3, "asked": 0.81},
    "classify features mean": {**RT, **MANY, "objective": {"pooling": "mean"}, "asked": 0.755},
    "classify features": {**RT, **MANY, "asked": 0.72},
    "multilabel full": {**RT, "task": "multilabel", "epochs": 5, "learning_rate": 1e-4},
    "tag full": {**MINI_TAG, "peer": True, "seeds": 3},
    "tag lora": {**MINI_TAG, **SMOL, "epochs": 1, "peer": True, "seeds": 3},
    "qa full": {**MINI_QA, "peer": True, "seeds": 3},
    "qa lora": {**MINI_QA, **SMOL, "epochs": 1, "peer": True, "seeds": 3},
}
"""What is trained. ``peer``: also by the peer with the same settings; ``asked``: what the project asks of the first figure."""

SPEED_ROWS, ROUNDS = 3200, 5

FIGURES = {
    "classify": ("accuracy", "macro_f1"),
    "multilabel": ("micro_f1", "exact_match"),
    "tag": ("f1", "precision", "recall"),
    "qa": ("f1", "exact_match"),
}


# --------------------------------------------------------------------------------------------------------------- the rows


def place_rows(folder: Path) -> None:
    """TASK-train and TASK-test, cut from the shared files."""
    data = SHARED / "data"
    for part in ("train", "test"):
        (folder / f"classify-{part}.jsonl").write_bytes((data / f"rt_polarity_{part}.jsonl").read_bytes())
    blocks: list[list[str]] = [[]]
    for line in (data / "wnut17_train.conll").read_text("utf-8").split("\n"):
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    blocks = [block for block in blocks if block]
    for part, some in (("train", blocks[:SENTENCES]), ("test", blocks[SENTENCES:])):
        (folder / f"tag-{part}.conll").write_text("\n\n".join("\n".join(block) for block in some) + "\n", "utf-8")
        rows = []
        for block in some:
            cells = [line.split("\t") for line in block]
            kinds = sorted({tag.strip()[2:] for _, tag in cells if tag.strip() != "O"})
            rows.append(json.dumps({"text": " ".join(word for word, _ in cells), "labels": kinds}))
        (folder / f"multilabel-{part}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    flat = [
        (paragraph["context"], qa)
        for article in json.loads((data / "xquad.en.json").read_text("utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    for part, pairs in (("train", flat[:QUESTIONS]), ("test", flat[QUESTIONS:])):
        made = [{"title": "", "paragraphs": [{"context": context, "qas": [qa]} for context, qa in pairs]}]
        (folder / f"qa-{part}.json").write_text(json.dumps({"version": "1.1", "data": made}), "utf-8")


def file_of(folder: Path, task: str, part: str) -> Path:
    return next(folder.glob(f"{task}-{part}.*"))


def gold_of(path: Path, task: str) -> list[Any]:
    """What is right for each test row: a label, labels, tags, or answers."""
    if task == "tag":
        text = path.read_text("utf-8").strip("\n")
        return [[line.split("\t")[1].strip() for line in block.split("\n")] for block in text.split("\n\n")]
    if task == "qa":
        paragraphs = json.loads(path.read_text("utf-8"))["data"][0]["paragraphs"]
        return [[answer["text"] for answer in one["qas"][0]["answers"]] for one in paragraphs]
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [row["label" if task == "classify" else "labels"] for row in rows]


# --------------------------------------------------------------------------------------------------------------- one run


def ours(setting: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """One run of tunesmith and what its saved model says of the test rows, in this process."""
    import tunesmith

    task = setting["task"]
    train: dict[str, Any] = {"path": str(file_of(folder, task, "train"))}
    if setting.get("limit"):
        train["limit"] = setting["limit"]
    kind = {"multilabel": "classify"}.get(task, task)
    held_out = 0.1 if task == "multilabel" else 0.0  # its threshold is chosen on rows that it did not learn from
    recipe = {
        "model": setting["model"],
        "objective": {"type": kind, "overlong": "truncate", **setting.get("objective", {})} if kind == "classify" else kind,
        "adaptation": setting.get("adaptation", "full"),
        "data": {"train": [train], "eval": {"fraction": held_out}, "cache": False},
        "train": {
            **{name: setting[name] for name in ("batch_size", "epochs", "learning_rate")},
            "warmup_ratio": setting.get("warmup_ratio", 0.0),
            "save_steps": None,
            "eval_steps": None,
            "precision": setting["precision"],
        },
        "seed": setting["seed"],
    }
    started = time.perf_counter()
    found = tunesmith.train(recipe, out=out)
    whole = time.perf_counter() - started
    read = {"classify": "label", "multilabel": "labels", "tag": "tags", "qa": "answer"}[task]
    test = file_of(folder, task, "test")
    said = [one[read] for one in tunesmith.predict(found["model_dir"], test, limit=setting.get("limit"))]
    kept = {name: found[name] for name in ("train_seconds", "peak_memory_bytes", "tokens")}
    return {**kept, "whole_seconds": whole, "said": said}


def own_precision() -> str:
    """The one that a run gets on this machine."""
    import torch

    from tunesmith.train import precision

    return "bf16" if precision.choose("auto", torch.device("cpu")).compute is torch.bfloat16 else "fp32"


def score(task: str, gold: list[Any], said: list[Any]) -> dict[str, Any]:
    """The figures of what a model said; of answers also each question's."""
    from tunesmith.metrics import classes, entities, squad

    if task == "tag":
        overall = entities.score(gold, said)
        return {name: overall[name] for name in ("precision", "recall", "f1")}
    if task == "qa":
        each = [(squad.f1(answer, golds), squad.exact_match(answer, golds)) for answer, golds in zip(said, gold, strict=True)]
        return {
            "f1": float(np.mean([one[0] for one in each])),
            "exact_match": float(np.mean([one[1] for one in each])),
            "each": each,
        }
    if task == "multilabel":
        names = sorted({name for row in gold for name in row})
        truth, answer = (np.array([[name in row for name in names] for row in rows], float) for rows in (gold, said))
        found = classes.multi_label_metrics(truth, answer, names)
        usual = classes.most_frequent_labels(truth)
        return {"micro_f1": found["micro_f1"], "exact_match": found["exact_match"], "baseline": usual["micro_f1"]}
    names = sorted(set(gold))
    found = classes.single_label_metrics(
        [names.index(one) for one in gold], np.eye(len(names))[[names.index(one) for one in said]], names
    )
    return {name: found[name] for name in ("accuracy", "macro_f1")}


def fresh(*command: str) -> dict[str, Any]:
    """Run a command and read the JSON of its last line."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def one_run(setting: dict[str, Any], side: str, folder: Path) -> dict[str, Any]:
    """A side's run of a setting in a fresh process: speed, memory, figures."""
    from tunesmith.models.load.load import locate

    task = setting["task"]
    files = {part: str(file_of(folder, task, part)) for part in ("train", "test")}
    with tempfile.TemporaryDirectory() as place:
        plan = Path(place) / "setting.json"
        if side == "tunesmith":
            plan.write_text(json.dumps(setting), "utf-8")
            found = fresh(__file__, "--run", str(plan), str(folder), str(Path(place) / "out"))
        else:
            kind = "lora" if isinstance(setting.get("adaptation"), dict) else "full"
            model = str(locate(setting["model"]).path)
            plan.write_text(json.dumps({"warmup_ratio": 0.0, **setting, **files, "model": model, "adaptation": kind}), "utf-8")
            found = fresh(str(ROOT / "benchmarks" / "heads_peer.py"), str(plan))
    rows = min(len(gold_of(Path(files["train"]), task)), setting.get("limit") or 10**9)
    found["rows_per_second"] = rows * (0.9 if task == "multilabel" else 1) * setting["epochs"] / found["train_seconds"]
    gold = gold_of(Path(files["test"]), task)[: setting.get("limit")]
    return {"side": side, "seed": setting["seed"], **score(task, gold, found.pop("said")), **found}


# -------------------------------------------------------------------------------------------------------------- comparing


def bootstrap(ours: list[list[float]], theirs: list[list[float]], draws: int = 10_000) -> tuple[float, float, float]:
    """Difference of the means and its 95% interval, questions drawn with return; (seeds, questions), means over seeds first."""
    apart = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    drawn = np.random.default_rng(0).integers(0, len(apart), (draws, len(apart)))
    low, high = np.percentile(apart[drawn].mean(axis=1), [2.5, 97.5])
    return float(apart.mean()), float(low), float(high)


def compared(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of each side, and what tells them apart."""
    task = RUNS[name]["task"]
    sides = {side: [run for run in runs if run["side"] == side] for side in ("tunesmith", "peer")}
    out: dict[str, Any] = {
        side: {
            figure: float(np.mean([run[figure] for run in some]))
            for figure in (*FIGURES[task], "rows_per_second", "peak_memory_bytes", "train_seconds")
        }
        for side, some in sides.items()
        if some
    }
    if "baseline" in runs[0]:
        out["baseline"] = runs[0]["baseline"]
    if task == "qa" and sides["peer"]:
        for place, figure in enumerate(("f1", "exact_match")):
            each = ([[one[place] for one in run["each"]] for run in sides[side]] for side in ("tunesmith", "peer"))
            out[f"{figure}_difference"] = bootstrap(*each)
    return out


def speed(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """A full step of classification, ours and the plain loop's in turn: rows a second, memory, the median of the pairs' ratios."""
    from tunesmith.models.load.load import locate

    measured, model = rates.measure(own_precision()), locate(RT["model"]).network
    print(rates.describe(measured))
    setting = {**RT, "epochs": 1, "limit": rows, "seed": 0, "precision": measured["precision"]}
    pairs, names = [], ("rows_per_second", "peak_memory_bytes", "share_of_matmul")
    for _ in range(rounds):
        pair = [one_run(setting, side, folder) for side in ("tunesmith", "peer")]
        pair[0]["share_of_matmul"] = rates.share(
            measured, rates.training_flops(model, pair[0]["tokens"], 0, full=True), pair[0]["train_seconds"]
        )
        mine, theirs = (run["rows_per_second"] for run in pair)
        share = f"{pair[0]['share_of_matmul']:.0%} of the rate of a large product"
        print(f"speed: {mine:.1f} and {theirs:.1f} rows/s: {mine / theirs:.2f} times; {share}", file=sys.stderr)
        pairs.append([{name: run[name] for name in names if name in run} for run in pair])
    ratio = float(np.median([mine["rows_per_second"] / theirs["rows_per_second"] for mine, theirs in pairs]))
    return {**measured, "rows": rows, "pairs": pairs, "ratio": ratio}


def render(found: dict[str, Any]) -> str:
    """The tables of the page."""
    lines = []
    for name, one in found.get("speed", {}).items():
        mine, theirs = (float(np.median([pair[side]["rows_per_second"] for pair in one["pairs"]])) for side in (0, 1))
        peaks = [
            [pair[side]["peak_memory_bytes"] for pair in one["pairs"] if "peak_memory_bytes" in pair[side]] for side in (0, 1)
        ]
        memory = f"; {max(peaks[0]) / 1e6:,.0f} and {max(peaks[1]) / 1e6:,.0f} MB" if all(peaks) else ""
        shares = [pair[0]["share_of_matmul"] for pair in one["pairs"] if "share_of_matmul" in pair[0]]
        reached = f"; {np.median(shares):.0%} of the rate of a large product" if shares else ""
        often = "once" if len(one["pairs"]) == 1 else f"{len(one['pairs'])} times"
        lines += [
            f"A full step of classification on {name}, {one['rows']:,} rows in turn with the plain loop, {often}: "
            f"{mine:.0f} and {theirs:.0f} rows/s, **{one['ratio']:.2f} times**{memory}{reached}.\n",
        ]
    head = ["run", "figures", "rows/s", "peak memory", "peer's figures", "rows/s", "peak memory", "apart"]
    rows = [head, ["---"] * len(head)]
    for name, runs in found["runs"].items():
        task, both = RUNS[name]["task"], compared(name, runs)
        cells = [f"{name} ({RUNS[name]['model']}, {sum(run['side'] == 'tunesmith' for run in runs)} seed(s))"]
        for side in ("tunesmith", "peer"):
            if side not in both:
                cells += [f"most frequent: micro_f1 {both['baseline']:.4f}" if "baseline" in both else "", "", ""]
                continue
            one = both[side]
            cells.append(", ".join(f"{figure} {one[figure]:.4f}" for figure in FIGURES[task]))
            cells += [f"{one['rows_per_second']:.1f}", f"{one['peak_memory_bytes'] / 1e6:,.0f} MB"]
        first = FIGURES[task][0]
        apart = f"{both['tunesmith'][first] - both['peer'][first]:+.4f}" if "peer" in both else ""
        for figure in ("f1", "exact_match"):
            if f"{figure}_difference" in both:
                mean, low, high = both[f"{figure}_difference"]
                text = f"{figure} {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
                apart = text if figure == "f1" else f"{apart}; {text}"
        rows.append([*cells, apart])
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["speed", *RUNS], help="speed, a task, or a run such as 'qa lora'")
    parser.add_argument("--seeds", type=int, help="at most so many of each")
    parser.add_argument("--more", action="store_true", help="keep the runs in the results, add the seeds that they lack")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of speed")
    parser.add_argument("--rows", type=int, default=SPEED_ROWS, help="of speed")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/speed.md")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # SETTING FOLDER OUT: one run of ours
    options = parser.parse_args()
    if options.run:
        setting, folder, out = (Path(one) for one in options.run)
        print(json.dumps(ours(json.loads(setting.read_text("utf-8")), folder, out)))
        return
    if not (SHARED / "data").exists():
        raise SystemExit(f"no data in {SHARED}: set TUNESMITH_SHARED to the folder that holds data/")

    from tunesmith import machine

    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"runs": {}}
    precision = own_precision()

    def keep() -> None:
        order = {name: known["runs"][name] for name in RUNS if name in known["runs"]}
        known.update(machine=machine.describe(), runs=order)
        RESULTS.write_text(json.dumps(known) + "\n", "utf-8")

    with tempfile.TemporaryDirectory() as place:
        place_rows(Path(place))
        if "speed" in options.only:
            of_class = speed(Path(place), options.rows, options.rounds)
            known.setdefault("speed", {})[of_class["class"]] = of_class
            keep()
        for name, setting in RUNS.items():
            if not {name, setting["task"]} & set(options.only):
                continue
            runs: list[dict[str, Any]] = list(known["runs"].get(name, [])) if options.more else []
            done = {(run["seed"], run["side"]) for run in runs}
            for seed in range(min(setting.get("seeds", 1), options.seeds or 99)):
                for side in ("tunesmith", "peer") if setting.get("peer") else ("tunesmith",):
                    if (seed, side) in done:
                        continue
                    runs.append(one_run({**setting, "seed": seed, "precision": precision}, side, Path(place)))
                    shown = {key: value for key, value in runs[-1].items() if key != "each"}
                    print(f"{name}: {json.dumps(shown)}", file=sys.stderr)
                    known["runs"][name] = runs
                    keep()
            asked, first = setting.get("asked"), FIGURES[setting["task"]][0]
            if asked:
                print(f"{name}: {first} {runs[0][first]:.4f}, asked {asked}", file=sys.stderr)
    table = render(known)
    print(table)
    if options.write:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
