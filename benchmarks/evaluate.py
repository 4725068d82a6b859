#!/usr/bin/env python
"""Rows per second of ``evaluate --generate`` next to a plain loop over transformers' ``generate``, alternating in one process.

    OMP_NUM_THREADS=1 python benchmarks/evaluate.py --rows 500 --out evaluate.json

SmolLM2-135M answers prompts of ``$TUNESMITH_SHARED/data/alpaca_en_demo.json`` greedily. tunesmith's time is that of the whole
evaluation: reading, answering, all figures with their intervals. The loop's time is that of ``generate`` alone, on batches in the order
of the file, padded on the left; each size of ``--batches`` is tried on the first rows with an eighth of the tokens, and the best one
counts. The loop ends after the batch in which ``--loop-minutes`` are over. Each figure is the best of ``--repeats``. Both sides print their
progress. All figures are computed again from the saved answers, with sacrebleu, rouge-score and a few lines of Python; ``recomputed`` has both
values of each, and the script fails if they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM

import tunesmith
from tunesmith import machine
from tunesmith.data.read.prompts import ChosenPrompts
from tunesmith.evaluate import generated_figures
from tunesmith.evaluate.prompt_answers import chosen_prompts
from tunesmith.evaluate.trained_reading import make_source
from tunesmith.metrics import answer_metrics
from tunesmith.models.find.locate import locate
from tunesmith.models.generate import decode
from tunesmith.models.load.compute_dtype import cast_and_move

SHARED = Path(os.environ.get("TUNESMITH_SHARED", Path(__file__).resolve().parents[2] / "shared"))
SAME = 1e-9
"""Largest relative difference of a figure that is computed again."""
EVERY_SECONDS = 15.0
"""Seconds between two lines of progress."""


class Progress:
    """Prints the number of answers of one side, and its rows per second."""

    def __init__(self, name: str, rows: int) -> None:
        self.name, self.rows, self.done = name, rows, 0
        self.began = self.printed = time.perf_counter()

    def add(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if now - self.printed >= EVERY_SECONDS or self.done == self.rows:
            self.printed = now
            rate = self.done / (now - self.began)
            print(f"{self.name}: {self.done}/{self.rows} rows, {rate:.2f} rows/s", file=sys.stderr, flush=True)


def evaluated(loaded: Any, data: str, rows: int, tokens: int, folder: Path) -> tuple[float, dict[str, Any]]:
    """Return the seconds of an evaluation that keeps its answers in ``folder``, and its figures."""
    began = time.perf_counter()
    found = generated_figures.generated_figures(
        loaded, loaded, {}, make_source(data), rows, answer_metrics.table(),
        max_new_tokens=tokens, folder=folder, with_base=False, advance=Progress("tunesmith", rows).add,
    )  # fmt: skip
    return time.perf_counter() - began, found["figures"]


def loop(
    stock: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], batch: int, tokens: int, most_seconds: float = 3600.0
) -> tuple[float, int]:
    """Return the seconds of ``generate`` on batches of prompts padded on the left, and how many prompts it answered."""
    seconds, progress = 0.0, Progress(f"generate, batches of {batch}", len(prompts))
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in part])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in part])
        began = time.perf_counter()
        stock.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        seconds += time.perf_counter() - began
        progress.add(len(part))
        if seconds > most_seconds:
            break
    return seconds, progress.done


class Letters:
    """Runs of letters and digits of any script: rouge-score's own tokenizer drops all letters but ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def squad_words(text: str) -> list[str]:
    """The words that official SQuAD compares."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def recomputed(folder: Path) -> dict[str, float]:
    """Return all figures of the saved answers, computed by the libraries and by hand."""
    (path,) = folder.glob("answers-*.jsonl")
    everything = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [one for one in everything if str(one.get("reference") or "").strip()]
    texts, references = [one["answer"] for one in lines], [one["reference"] for one in lines]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Letters())
    scores = [scorer.score(known, text) for known, text in zip(references, texts, strict=True)]
    words = [(squad_words(known), squad_words(text)) for known, text in zip(references, texts, strict=True)]
    return {
        "exact_match": statistics.fmean(known == answered for known, answered in words),
        "token_f1": statistics.fmean(f1(*one) for one in words),
        "bleu": sacrebleu.corpus_bleu(texts, [references]).score,
        "chrf": sacrebleu.corpus_chrf(texts, [references]).score,
        **{name: statistics.fmean(one[name].fmeasure for one in scores) for name in ("rouge1", "rouge2", "rougeL")},
        "length": statistics.fmean(one["tokens"] for one in everything),
        "stopped": statistics.fmean(one["reason"] == "stop" for one in everything),
        "repetition": statistics.fmean(repetition(one["answer"]) for one in everything),
        **{f"distinct_{length}": distinct([one["answer"] for one in everything], length) for length in (1, 2)},
    }


def f1(known: Sequence[str], answered: Sequence[str]) -> float:
    """F1 of words as in official SQuAD, where two empty answers are equal."""
    shared = sum((Counter(known) & Counter(answered)).values())
    if not known or not answered:
        return float(known == answered)
    return 2 * shared / (len(known) + len(answered))


def grams(text: str, length: int) -> list[tuple[str, ...]]:
    return list(zip(*(text.split()[start:] for start in range(length))))


def repetition(text: str) -> float:
    found = grams(text, 4)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct(texts: Sequence[str], length: int) -> float:
    found = [gram for text in texts for gram in grams(text, length)]
    return len(set(found)) / len(found)


def asked_prompts(data: str, rows: int) -> ChosenPrompts:
    return chosen_prompts(make_source(data), {}, rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default=str(SHARED / "data" / "alpaca_en_demo.json"))
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--tried", type=int, default=64, help="rows on which the sizes of batches are tried")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--loop-minutes", type=float, default=3.0, help="the loop answers no further batch after this time")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    loaded = tunesmith.load(options.model, dtype=dtype)
    cast_and_move(loaded[0], options.precision, torch.device("cpu"))
    stock = AutoModelForCausalLM.from_pretrained(locate(options.model).network, dtype=dtype).eval()
    asked = asked_prompts(options.data, options.rows)
    prompts = [decode.prompt_ids(one.prompt, loaded[1], None, False) for one in asked]
    few, first = max(1, options.max_new_tokens // 8), prompts[: options.tried]
    tried = {size: loop(stock, loaded[1], first, size, few)[0] for size in options.batches}
    best = min(tried, key=lambda size: tried[size])
    ours, theirs = [], []
    done = 0
    figures: dict[str, Any] = {}
    again: dict[str, float] = {}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            seconds, figures = evaluated(loaded, options.data, options.rows, options.max_new_tokens, Path(folder))
            again = recomputed(Path(folder))
        ours.append(len(prompts) / seconds)
        seconds, done = loop(stock, loaded[1], prompts, best, options.max_new_tokens, 60 * options.loop_minutes)
        theirs.append(done / seconds)
        print(f"tunesmith {ours[-1]:.2f} rows/s, generate {theirs[-1]:.2f} rows/s ({done} rows)", file=sys.stderr, flush=True)
    missing = sorted(figures.keys() ^ again.keys())
    compared = {name: [figures[name]["value"], value] for name, value in again.items() if name in figures}
    wrong = [name for name, (one, other) in compared.items() if abs(one - other) > SAME * max(1.0, abs(other))] + missing
    result = {
        "machine": machine.describe(), "threads": torch.get_num_threads(), "precision": options.precision, "rows": len(prompts),
        "max_new_tokens": options.max_new_tokens, "batch": best, "loop_rows": done,
        "tried_seconds": {str(size): round(seconds, 2) for size, seconds in tried.items()},
        "rows_per_second": round(max(ours), 2),
        "transformers_rows_per_second": round(max(theirs), 2),
        "ratio": round(max(ours) / max(theirs), 2), "recomputed": compared, "differ": wrong,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    if wrong:
        sys.exit(f"the saved answers have other figures: {', '.join(wrong)}")
    return result


if __name__ == "__main__":
    main()
