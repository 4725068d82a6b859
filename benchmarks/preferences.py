#!/usr/bin/env python
"""DPO and reward models on real pairs, beside TRL: rows a second, peak memory, and what was learnt of held-out pairs.

    python benchmarks/preferences.py --only speed              # the rates, a quarter of an hour on two quiet cores
    python benchmarks/preferences.py --only quality --seeds 1  # 240 pairs to learn from, 60 held out; an hour a seed
    python benchmarks/preferences.py --only quality --cut 64   # the same of short pairs, where whole ones would take a day
    python benchmarks/preferences.py --more --write            # what the results lack yet; the tables go into docs/speed.md

Every run is a fresh process: SmolLM2-135M with LoRA, both sides with the same rows, rank, rate, schedule, length and batches of 8.
``speed`` trains on the same rows in turn and gives the ratio of each pair; TRL runs with one row in a micro-batch (its
setting of eight rows of like length cannot be had: transformers groups by `input_ids`, which its rows of pairs lack). It also prints the
processor's class, the rate of one large product, and the share of it that tunesmith reached. For DPO both
sides count their pass of the reference. Rows decide: a row is the same work to either side, however often it reads the prompt. None of
the 24 is longer than ``max_length``. Of the 240 of ``quality`` some are: TRL's reward trainer leaves them out, its DPO cuts answers from
the right; here the prompt is cut from the left.
``quality``: the saved adapters of both sides are read by one plain scorer (transformers and peft in fp32, row by row). The held-out
pairs are the last 60 of the file; two of these stand among the first 240 too, so they change places with pairs that do not.
Both sides compute in bf16, or in fp32 on a processor without fast bf16 (where the peer in bf16 would take a day); a seed begun in
one of them is finished in it, so that its two sides differ in nothing else. ``--cut N`` keeps the last turn of each prompt and of it and of
both answers the first N tokens, in the pairs to learn from and in those held out, for both sides. ``--beside 2`` lets two runs of
``quality`` go on at a time, with a thread each: a fifth less time in all, and rates that say nothing.
The peer is run by ``bench/peers.py`` of the shared folder ($TUNESMITH_SHARED, by default the folder ``shared`` beside the checkout).
Results go to ``benchmarks/results/preferences.json``, run by run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import rates

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TUNESMITH_SHARED", ROOT.parent / "shared"))
RESULTS = ROOT / "benchmarks" / "results" / "preferences.json"
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- preferences: begin -->\n", "<!-- preferences: end -->"

TASKS = {"dpo": 5e-5, "reward": 2e-4}
"""Task and its rate, the one of bench/peers.py."""

ASKED = {
    "AVX2": {"dpo": 3.5, "reward": 3.0},
    "AVX512-BF16": {"dpo": 3.8, "reward": 3.0},
    "AMX": {"dpo": 4.0, "reward": 3.5},
}
"""Times the peer's rows a second that the project asks for on a processor of each class."""

LORA = {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
MODEL, LENGTH = "smollm2-135m", 2048
TRAIN, SEEDS, SPEED_ROWS, ROUNDS = 240, 3, 24, 3
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


# --------------------------------------------------------------------------------------------------------------- the rows


def pairs() -> tuple[list[Any], list[Any]]:
    """240 to learn from and 60 held out, of which none is learnt from."""
    rows = json.loads((SHARED / "data" / "dpo_en_demo.json").read_text("utf-8"))
    said = [json.dumps(row, sort_keys=True) for row in rows]
    train, held_out = list(range(TRAIN)), list(range(TRAIN, len(rows)))
    leaks = [place for place in held_out if said[place] in said[:TRAIN]]
    alone = [place for place in reversed(train) if said.count(said[place]) == 1][: len(leaks)]
    for leak, other in zip(leaks, alone, strict=True):
        train[train.index(other)], held_out[held_out.index(leak)] = leak, other
    return [rows[place] for place in train], [rows[place] for place in held_out]


def cut_rows(rows: list[Any], most: int) -> list[Any]:
    """The rows with the last turn of each prompt alone, and of it and of both answers the first ``most`` tokens."""
    from transformers import AutoTokenizer

    from tunesmith.models.load.load import locate

    tokenizer = AutoTokenizer.from_pretrained(locate(MODEL).path)

    def cut(turn: dict[str, str]) -> dict[str, str]:
        ends = tokenizer(turn["value"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return {**turn, "value": turn["value"][: ends[most - 1][1]]} if len(ends) > most else turn

    short = [
        {"conversations": [cut(row["conversations"][-1])], "chosen": cut(row["chosen"]), "rejected": cut(row["rejected"])}
        for row in rows
    ]
    assert all(row["chosen"] != row["rejected"] for row in short), f"cut to {most} tokens, both answers of a pair are the same"
    return short


def place_rows(folder: Path, seed: int, cut: int) -> Path:
    """A file of the pairs to learn from in the order of the seed, the held-out ones behind them."""
    path = folder / f"pairs-{seed}.json"
    if not path.exists():
        train, held_out = pairs()
        random.Random(seed).shuffle(train)
        rows = train + held_out
        path.write_text(json.dumps(cut_rows(rows, cut) if cut else rows), "utf-8")
    return path


# --------------------------------------------------------------------------------------------------------------- one run


def own_precision() -> str:
    """The one that a run gets on this machine."""
    import torch

    from tunesmith.train import precision

    return "bf16" if precision.choose("auto", torch.device("cpu")).compute is torch.bfloat16 else "fp32"


def ours(task: str, data: Path, rows: int, seed: int, out: Path, precision: str) -> dict[str, Any]:
    """One run of tunesmith, in this process."""
    import tunesmith
    from tunesmith.models.load.load import locate

    recipe = {
        "model": MODEL,
        "objective": task,
        "adaptation": LORA,
        "data": {"train": [{"path": str(data), "limit": rows}], "eval": {"fraction": 0.0}, "cache": False},
        "train": {
            "learning_rate": TASKS[task],
            "batch_size": 8,
            "max_length": LENGTH,
            "eval_steps": None,
            "save_steps": None,
            "precision": precision,
        },
        **({"samples": {"count": 0}} if task == "dpo" else {}),
        "seed": seed,
    }
    started = time.perf_counter()
    found = tunesmith.train(recipe, out=out)
    seconds = found["train_seconds"] + found.get("reference_seconds", 0.0)
    dpo = task == "dpo"
    flops = rates.training_flops(locate(MODEL).network, found["tokens"], answer_tokens(data, rows) if dpo else 0, False, dpo)
    return {
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "whole_seconds": time.perf_counter() - started,
        "peak_memory_bytes": found["peak_memory_bytes"],
        "flops": flops,
        "model": found["model_dir"],
    }


def answer_tokens(data: Path, rows: int) -> int:
    """Tokens of both answers of the first rows, which go through the vocabulary projection; none of them is cut."""
    from transformers import AutoTokenizer

    from tunesmith.models.load.load import locate

    tokenizer = AutoTokenizer.from_pretrained(locate(MODEL).path)
    total = 0
    for row in json.loads(data.read_text("utf-8"))[:rows]:
        turns = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        prompt = len(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
        for name in ("chosen", "rejected"):
            answer = [*turns, {"role": "assistant", "content": row[name]["value"]}]
            total += len(tokenizer.apply_chat_template(answer, return_dict=False)) - prompt
    return total


def fresh(*command: str) -> dict[str, Any]:
    """Run a command and read the JSON of its last line."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def one_run(task: str, side: str, data: Path, rows: int, seed: int, out: Path, precision: str) -> dict[str, Any]:
    """A side's run in a fresh process: seconds (of DPO with the reference), rows a second, memory, where the model is."""
    about = {"side": side, "seed": seed, "precision": precision}
    if side == "tunesmith":
        return {**about, **fresh(__file__, "--run", task, str(data), str(rows), str(seed), str(out), precision)}
    from tunesmith.models.load.load import locate

    found = fresh(
        str(SHARED / "bench" / "peers.py"), task, "--setting", "tuned-1", "--precision", precision,
        "--model", str(locate(MODEL).path), "--data", str(data), "--rows", str(rows), "--max-length", str(LENGTH), "--save", str(out),
    )  # fmt: skip
    seconds = found["seconds"] + (found["construct_seconds"] if task == "dpo" else 0.0)
    return {
        **about,
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "peak_memory_bytes": found["peak_memory_bytes"],
        "model": str(out),
    }


# ---------------------------------------------------------------------------------------------------------- held-out pairs


def score(task: str, data: Path, adapter: str | None) -> dict[str, Any]:
    """(better, worse) of each held-out pair, read by plain transformers: log p(answer | prompt) or a reward, and the tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from tunesmith.models.load.load import locate

    folder = locate(MODEL).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if task == "dpo":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
    body = model.model  # without the layer that reads the vocabulary; adapters go into its modules
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    read, tokens = [], []
    for row in json.loads(data.read_text("utf-8"))[TRAIN:]:
        turns = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        both = []
        with torch.no_grad():
            # All but the prompt's last token is read once: fp32 is slow, and what both answers are read after is the same.
            cache = body(input_ids=torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
            for name in ("chosen", "rejected"):
                answer = [*turns, {"role": "assistant", "content": row[name]["value"]}]
                whole = tokenizer.apply_chat_template(answer, return_dict=False)
                assert whole[: len(prompt)] == prompt
                ids = torch.tensor([whole[len(prompt) - 1 :]])
                logits = model(input_ids=ids, past_key_values=copy.deepcopy(cache)).logits
                if task == "dpo":
                    both.append(-torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item())
                else:
                    both.append(logits.item())
                tokens.append(ids.shape[1] - 1)
        read.append(both)
    return {"read": read, "tokens": [tokens[place : place + 2] for place in range(0, len(tokens), 2)]}


def quality(task: str, side: str, seed: int, data: Path, reference: list[list[float]] | None, precision: str) -> dict[str, Any]:
    """A run on the 240 pairs, and the lead of the better answer of each held-out one: of rewards, in DPO beta times log ratios."""
    from tunesmith import machine

    run = one_run(task, side, data, TRAIN, seed, data.parent / f"{task}-{side}-{seed}", precision)
    found = fresh(__file__, "--score", task, str(data), run.pop("model"))
    read = np.array(found["read"])
    leads = read[:, 0] - read[:, 1] if reference is None else 0.1 * np.subtract(*(read - np.array(reference)).T)
    return {**run, "isa": machine.describe()["isa"], "leads": leads.tolist(), "tokens": found["tokens"]}


def all_of_quality(options: argparse.Namespace, known: dict[str, Any], keep: Any) -> None:
    """The runs that the results lack, a seed after the other, as many at a time as asked for."""
    of_all = known.setdefault("quality", {})
    for task in options.task:
        kept = [run for run in of_all.get(task, ()) if options.more or run["cut"] != options.cut]
        of_all[task] = kept
    if options.beside > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as place:
        reference: list[list[float]] = []

        def one(task: str, side: str, seed: int, precision: str) -> None:
            data = place_rows(Path(place), seed, options.cut)
            done = {
                "cut": options.cut,
                "beside": options.beside,
                **quality(task, side, seed, data, reference if task == "dpo" else None, precision),
            }
            with lock:
                of_all[task].append(done)
                keep()
            accuracy, margin = float(np.mean(right(done["leads"]))), float(np.mean(done["leads"]))
            rate = f"{done['rows_per_second']:.3f} rows/s"
            print(f"{task} {side} seed {seed}: accuracy {accuracy:.3f}, margin {margin:.3f}, {rate}", file=sys.stderr)

        jobs = []
        for seed in range(options.seeds):
            for task in options.task:
                begun = {
                    run["side"]: run["precision"] for run in of_all[task] if (run["seed"], run["cut"]) == (seed, options.cut)
                }
                precision = next(iter(begun.values()), own_precision())
                left = [side for side in ("trl", "tunesmith") if side not in begun]
                if left and precision == "bf16" != own_precision():
                    print(f"{task} seed {seed}: {left} left out, its other side is in bf16", file=sys.stderr)
                else:
                    jobs += [(task, side, seed, precision) for side in left]
            place_rows(Path(place), seed, options.cut)
        if any(task == "dpo" for task, *_ in jobs):
            reference += fresh(__file__, "--score", "dpo", str(place_rows(Path(place), 0, options.cut)))["read"]
        with ThreadPoolExecutor(options.beside) as pool:
            list(pool.map(lambda job: one(*job), jobs))


def right(leads: Any) -> Any:
    """1 where the better answer leads, a half in a tie."""
    leads = np.asarray(leads, float)
    return np.where(leads == 0, 0.5, leads > 0)


def interval(values: Any, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean over (seeds, pairs) and its 95% interval, pairs drawn with return; means over seeds first."""
    each = np.mean(values, axis=0)
    drawn = np.random.default_rng(0).integers(0, len(each), (draws, len(each)))
    low, high = np.percentile(each[drawn].mean(axis=1), [2.5, 97.5])
    return float(each.mean()), float(low), float(high)


# ------------------------------------------------------------------------------------------------------------ in numbers


def speed(task: str, rows: int, rounds: int, measured: dict[str, Any], known: dict[str, Any], keep: Any) -> None:
    """Rows a second in turn on the first rows of the file; ``measured``: see ``rates.measure``."""
    data, precision = SHARED / "data" / "dpo_en_demo.json", measured["precision"]

    def run(side: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            found = one_run(task, side, data, rows, 0, Path(place) / "out", precision)
        del found["model"]
        words = f"{task} {side}: {found['rows_per_second']:.3f} rows/s, {found['seconds']:.1f} s"
        if side == "tunesmith":
            found["share_of_matmul"] = rates.share(measured, found["flops"], found["seconds"])
            words += f", {found['share_of_matmul']:.0%} of the rate of a large product"
        print(words, file=sys.stderr)
        return found

    pairs: list[Any] = []
    for _ in range(rounds):
        pairs.append([run("tunesmith"), run("trl")])
        known[task] = {"rows": rows, "pairs": pairs}
        keep()


def rows_per_second(one: dict[str, Any]) -> list[tuple[float, float]]:
    """Ours and TRL's of each round."""
    return [(mine["rows_per_second"], theirs["rows_per_second"]) for mine, theirs in one["pairs"]]


def render(found: dict[str, Any]) -> str:
    """The tables of the page."""
    head = [
        "processor",
        "task",
        "rows",
        "rows/s",
        "TRL's rows/s",
        "times",
        "asked",
        "of the matmul rate",
        "peak memory",
        "TRL's peak memory",
    ]
    rows = [head, ["---"] * len(head)]
    for name, task, one in (
        (name, task, runs[task]) for name, runs in found.get("speed", {}).items() for task in TASKS if task in runs
    ):
        mine, theirs = (float(np.median(side)) for side in zip(*rows_per_second(one), strict=True))
        ratios = [a / b for a, b in rows_per_second(one)]
        peak = [max(pair[side]["peak_memory_bytes"] for pair in one["pairs"]) / 1e6 for side in (0, 1)]
        times = f"**{np.median(ratios):.2f}** ({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
        shares = [pair[0]["share_of_matmul"] for pair in one["pairs"] if "share_of_matmul" in pair[0]]
        cells = [
            name,
            task,
            f"{one['rows']}",
            f"{mine:.3f}",
            f"{theirs:.3f}",
            times,
            f"{ASKED.get(name.split()[0], {}).get(task, '')}",
        ]
        rows.append([*cells, f"{np.median(shares):.0%}" if shares else "", *(f"{bytes:,.0f} MB" for bytes in peak)])
    lines = ["| " + " | ".join(row) + " |" for row in rows] + [""]
    rows = [["held-out pairs", "seeds", "accuracy", "margin"], ["---"] * 4]
    cuts = sorted({run["cut"] for runs in found.get("quality", {}).values() for run in runs})
    for cut in cuts:
        words = f", {cut} tokens of each turn" if cut else ""
        tokens: Any = None
        for task, runs in found["quality"].items():
            of_cut = [run for run in runs if run["cut"] == cut]
            leads = {side: {run["seed"]: run["leads"] for run in of_cut if run["side"] == side} for side in ("tunesmith", "trl")}
            for side, values in leads.items():
                if values:
                    each = list(values.values())
                    rows.append(
                        [f"{task}, {side}{words}", str(len(each)), _spread(interval(right(each))), _spread(interval(each))]
                    )
            both = sorted(leads["tunesmith"].keys() & leads["trl"].keys())
            if both:
                mine, theirs = (np.array([leads[side][seed] for seed in both]) for side in ("tunesmith", "trl"))
                cells = [_spread(interval(right(mine) - right(theirs))), _spread(interval(mine - theirs))]
                rows.append([f"{task}, difference{words}", str(len(both)), *cells])
            tokens = np.array(of_cut[0]["tokens"]) if of_cut else tokens
        for name, lead in (("longer", tokens[:, 0] - tokens[:, 1]), ("shorter", tokens[:, 1] - tokens[:, 0])):
            rows.append([f"always the {name} one{words}", "", _spread(interval(right(lead)[None])), ""])
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _spread(found: tuple[float, float, float]) -> str:
    mean, low, high = found
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["speed", "quality"], default=["speed", "quality"])
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--cut", type=int, default=0, help="of quality: this many tokens of each turn (0: all)")
    parser.add_argument(
        "--beside", type=int, default=1, help="of quality: runs at a time, each with one thread where more than one"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of speed")
    parser.add_argument("--rows", type=int, default=SPEED_ROWS, help="of speed: the first of the file")
    parser.add_argument("--more", action="store_true", help="keep the runs in the results, add what they lack")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/speed.md")
    parser.add_argument("--run", nargs=6, help=argparse.SUPPRESS)  # TASK DATA ROWS SEED OUT PRECISION: one run of ours
    parser.add_argument("--score", nargs="+", help=argparse.SUPPRESS)  # TASK DATA [ADAPTER]: of the held-out pairs
    options = parser.parse_args()
    if options.run:
        task, data, rows, seed, out, precision = options.run
        print(json.dumps(ours(task, Path(data), int(rows), int(seed), Path(out), precision)))
        return
    if options.score:
        task, data, *adapter = options.score
        print(json.dumps(score(task, Path(data), adapter[0] if adapter else None)))
        return
    if not (SHARED / "bench").exists():
        raise SystemExit(f"nothing in {SHARED}: set TUNESMITH_SHARED to the folder that holds data/ and bench/")

    from tunesmith import machine

    known: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}

    def keep() -> None:
        RESULTS.write_text(json.dumps(known) + "\n", "utf-8")

    if "speed" in options.only:
        measured = rates.measure(own_precision())
        print(rates.describe(measured))
        of_speed = known.setdefault("speed", {}).setdefault(measured["class"], {})
        for task in options.task:
            if not (options.more and len(of_speed.get(task, {}).get("pairs", ())) >= options.rounds):
                of_speed |= {"machine": machine.describe(), **measured}  # a run of quality has its own line
                speed(task, options.rows, options.rounds, measured, of_speed, keep)
    if "quality" in options.only:
        all_of_quality(options, known, keep)
    table = render(known)
    print(table)
    if options.write:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
