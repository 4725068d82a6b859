#!/usr/bin/env python
"""The engine next to transformers' ``generate``, on the same prompts, in one process, alternating; other engines in their own.

    python benchmarks/rollout.py --rows 1 8 64 --samples --sampling --prefill --first-token --memory --queue 96 --out rollout.json
    python benchmarks/rollout.py --peer llama.cpp peers/bin/python smollm2-f16.gguf --peer openvino peers/bin/python smollm2-f16.gguf

SmolLM2-135M continues prompts of ``$TUNESMITH_SHARED/data/alpaca_en_demo.json`` greedily, 48 tokens each, none stopping sooner.
transformers loads the model itself, as its users do, pads on the left and runs with its dynamic and with its static cache (not compiled); the better
one counts. A run of one new token is prefill; decoding is a run of 49 tokens less that. Each figure is the best of ``--repeats``.
``share_of_bandwidth`` is that of reading every weight once a step, ``share_of_matmul`` that of multiplying by it. AVX2 is emulated with
``ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2`` and ``--precision fp32``.

``--rows``: rows at once. ``--samples``: 8 answers to one prompt of 400 tokens, in one engine with a shared prefill and as 8 prompts of their own.
``--sampling``: decoding of 64 rows by sampling rule. ``--prefill``: prompts of 512 tokens, next to the matrix products alone, and of each peer. ``--first-token``: of a
prompt of 2,000 tokens. ``--queue``: prompts with 8 to 400 new tokens in 32 slots, next to transformers' batches of 32 in the order of length, which
no one can know before; half of them run before, half after. ``--memory``: peak of a process that loads the model and answers 64 prompts, with
int8 weights, too. ``--int8``: decoding with int8 weights, too. ``--peer``: another engine of
``rollout_peers.py``, the Python of its environment, and its model; it is skipped where that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import rates
import torch
from transformers import AutoModelForCausalLM

import tunesmith
from tunesmith import machine
from tunesmith.models.find.locate import locate
from tunesmith.models.generate.decode_step import DecodeWeights
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.load.compute_dtype import cast_and_move

SHARED = Path(os.environ.get("TUNESMITH_SHARED", Path(__file__).resolve().parents[2] / "shared"))
TOKENS = 48


class Pair:
    """The model by the engine and by transformers."""

    def __init__(self, dtype: torch.dtype, int8: bool = False) -> None:
        self.int8 = int8
        self.rates = {"matmul_flops": rates.matmul_flops(dtype), "read_bytes_per_second": rates.read_bandwidth()}
        self.model, self.tokenizer = tunesmith.load("smollm2-135m", dtype=dtype)
        cast_and_move(self.model, "fp32" if dtype is torch.float32 else "bf16", torch.device("cpu"))
        self.stock = AutoModelForCausalLM.from_pretrained(locate("smollm2-135m").network, dtype=dtype).eval()

    def prompts(self, count: int) -> list[list[int]]:
        rows = json.loads((SHARED / "data" / "alpaca_en_demo.json").read_text(encoding="utf-8"))[:count]
        turns = [[{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}] for row in rows]
        return [self.tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in turns]

    def engine(self, requests: Sequence[Request], slots: int, weights: DecodeWeights = "stored") -> tuple[float, float]:
        """Return seconds of prefill and of decoding in a new engine."""
        engine = Engine(self.model, self.tokenizer, slots, decode_weights=weights)
        for _ in engine.run(requests[:1]):  # the check of the fast paths
            pass
        for held in engine.slots.held:  # nothing of the prompt is reused
            held.clear()
        engine.timing.prefill_seconds = engine.timing.decode_seconds = 0.0
        for _ in engine.run(requests):
            pass
        copies = 1 if weights == "int8" else 2
        step = engine.slots._pass.packed_step  # None where nothing was decoded
        self.bytes_per_weight = copies if step and step.panels else self.model.dtype.itemsize
        return engine.timing.prefill_seconds, engine.timing.decode_seconds

    def shares(self, rows: int, seconds: float) -> dict[str, float]:
        """Return the share of the machine's rates that one decoding step of ``seconds`` reaches."""
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "share_of_bandwidth": round(weights * self.bytes_per_weight / seconds / self.rates["read_bytes_per_second"], 2),
            "share_of_matmul": round(2 * rows * weights / seconds / self.rates["matmul_flops"], 2),
        }

    def transformers(self, prompts: Sequence[Sequence[int]], tokens: int, cache: str) -> float:
        """Return the seconds of ``generate`` on one left-padded batch."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        static = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
        began = time.perf_counter()
        self.stock.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **static,
        )
        return time.perf_counter() - began


def requests(prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[Request]:
    never = frozenset[int]()
    pairs = enumerate(zip(prompts, tokens, strict=True))
    return [Request(tuple(ids), SamplingParams(max_new_tokens=count, stop=never), row) for row, (ids, count) in pairs]


def rows_at_once(pair: Pair, rows: int, repeats: int) -> dict[str, Any]:
    prompts = pair.prompts(rows)
    wanted = requests(prompts, [TOKENS] * rows)
    ours: dict[DecodeWeights, list[tuple[float, float]]] = {"int8": [], "stored": []} if pair.int8 else {"stored": []}
    theirs: dict[str, list[tuple[float, float]]] = {"dynamic": [], "static": []}
    for _ in range(repeats):
        for weights, measured in ours.items():
            measured.append(pair.engine(wanted, rows, weights))
        for cache, found in theirs.items():
            first = pair.transformers(prompts, 1, cache)
            found.append((first, pair.transformers(prompts, TOKENS + 1, cache) - first))
    best = {cache: [min(column) for column in zip(*found, strict=True)] for cache, found in theirs.items()}
    prefill, decode = (min(column) for column in zip(*ours["stored"], strict=True))
    decoded = min(seconds for _, seconds in best.values())
    return {
        "rows": rows,
        "prompt_tokens": sum(map(len, prompts)),
        "decode_tokens_per_second": round(rows * (TOKENS - 1) / decode, 1),
        "transformers": {cache: round(rows * TOKENS / seconds, 1) for cache, (_, seconds) in best.items()},
        "decode_ratio": round(decoded / TOKENS * (TOKENS - 1) / decode, 2),
        "prefill_tokens_per_second": round(sum(map(len, prompts)) / prefill, 1),
        "prefill_ratio": round(min(first for first, _ in best.values()) / prefill, 2),
        **pair.shares(rows, decode / (TOKENS - 1)),
        **(
            {"int8_decode_tokens_per_second": round(rows * (TOKENS - 1) / min(t for _, t in ours["int8"]), 1)}
            if pair.int8
            else {}
        ),
    }


def samples_of_one(pair: Pair, repeats: int) -> dict[str, Any]:
    """8 answers to one prompt of 400 tokens: whole time with a shared prefill, and as separate engines' prompts."""
    prompt = [token for row in pair.prompts(40) for token in row][:400]
    params = SamplingParams(max_new_tokens=TOKENS, temperature=1.0, stop=frozenset())
    together, apart = [], []
    for _ in range(repeats):
        together.append(sum(pair.engine([Request(tuple(prompt), params, 0, sample) for sample in range(8)], 8)))
        # another first token, so that nothing is shared
        alone = [Request((5 + sample, *prompt[1:]), params, 0, sample) for sample in range(8)]
        apart.append(sum(pair.engine(alone, 8)))
    return {
        "shared_seconds": round(min(together), 2),
        "separate_seconds": round(min(apart), 2),
        "ratio": round(min(apart) / min(together), 2),
    }


def sampling(pair: Pair, repeats: int) -> dict[str, float]:
    """Decoded tokens/s of 64 rows by rule: greedy, as RLHF samples, and with filters."""
    prompts, never = pair.prompts(64), frozenset[int]()
    rules = {
        "greedy": {},
        "temperature 1": {"temperature": 1.0},
        "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    }
    found: dict[str, list[float]] = {name: [] for name in rules}
    for _ in range(repeats):
        for name, rule in rules.items():
            params = SamplingParams(max_new_tokens=TOKENS, stop=never, **rule)
            found[name].append(pair.engine([Request(tuple(ids), params, row) for row, ids in enumerate(prompts)], 64)[1])
    return {name: round(64 * (TOKENS - 1) / min(seconds), 1) for name, seconds in found.items()}


def prefill(pair: Pair, repeats: int) -> dict[str, Any]:
    """8 prompts of 512 tokens, next to transformers' (all or half of them in a batch) and to the products of a pass alone."""
    prompts = long_prompts(pair)
    times: dict[str, list[float]] = {"engine": [], "8 rows": [], "4 rows": [], "products": []}
    for _ in range(repeats):
        times["engine"].append(pair.engine(requests(prompts, [1] * 8), 8)[0])
        times["8 rows"].append(pair.transformers(prompts, 1, "dynamic"))
        times["4 rows"].append(sum(pair.transformers(half, 1, "dynamic") for half in (prompts[:4], prompts[4:])))
        times["products"].append(2 * products(pair, 2048))
    best = {name: min(seconds) for name, seconds in times.items()}
    theirs = min(best["8 rows"], best["4 rows"])
    return {
        "tokens_per_second": round(8 * 512 / best["engine"], 1),
        "transformers_tokens_per_second": round(8 * 512 / theirs, 1),
        "ratio": round(theirs / best["engine"], 2),
        "share_of_matmul_rate": round(best["products"] / best["engine"], 2),
    }


def long_prompts(pair: Pair) -> list[list[int]]:
    """8 prompts of 512 tokens."""
    tokens = [token for row in pair.prompts(200) for token in row]
    return [tokens[512 * row : 512 * (row + 1)] for row in range(8)]


def products(pair: Pair, tokens: int) -> float:
    """Return the seconds of the matrix products of all layers, each with its own weights, for so many tokens."""
    linears = [module for module in pair.stock.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {width: torch.randn(tokens, width).to(pair.stock.dtype) for width in {one.in_features for one in linears}}
    began = time.perf_counter()
    with torch.inference_mode():
        for linear in linears:
            torch.nn.functional.linear(inputs[linear.in_features], linear.weight)
    return time.perf_counter() - began


def first_token(pair: Pair, repeats: int) -> dict[str, Any]:
    """Seconds to the first token of a prompt of 2,000: of a new engine with its check of the fast path, and of one that has run."""
    prompt = [token for row in pair.prompts(100) for token in row][:2000]
    new, again, theirs = [], [], []
    for _ in range(repeats):
        engine = Engine(pair.model, pair.tokenizer)
        for times in (new, again):
            engine.slots.forget()
            began = time.perf_counter()
            list(engine.run(requests([prompt], [1])))
            times.append(time.perf_counter() - began)
        theirs.append(pair.transformers([prompt], 1, "dynamic"))
    found = {"new_engine": min(new), "seconds": min(again), "transformers": min(theirs)}
    return {name: round(seconds, 3) for name, seconds in found.items()}


def queue(pair: Pair, count: int) -> dict[str, Any]:
    """``count`` prompts with 8 to 400 new tokens each: 32 slots, next to transformers' batches of 32 rows of similar length."""
    drawn = random.Random(0)
    prompts = (pair.prompts(count) * count)[:count]
    counts = [drawn.randint(8, 400) for _ in prompts]
    order = sorted(range(count), key=counts.__getitem__)
    batches = [order[start : start + 32] for start in range(0, count, 32)]

    def static(some: list[list[int]]) -> float:
        return sum(pair.transformers([prompts[row] for row in batch], counts[batch[-1]], "dynamic") for batch in some)

    theirs = static(batches[::2])  # the other half comes afterwards: the machine's speed may drift
    engine = Engine(pair.model, pair.tokenizer, 32)
    began = time.perf_counter()
    assert sum(len(answer.ids) for answer in engine.run(iter(requests(prompts, counts)))) == sum(counts)
    ours = time.perf_counter() - began
    theirs += static(batches[1::2])
    return {
        "prompts": count,
        "tokens": sum(counts),
        "seconds": round(ours, 1),
        "prefill_seconds": round(engine.timing.prefill_seconds, 1),
        "transformers_seconds": round(theirs, 1),
        "ratio": round(theirs / ours, 2),
    }


def in_its_own_process(
    pair: Pair, name: str, python: str, model: str, rows: Sequence[int], repeats: int, long: bool = False
) -> dict[str, Any]:
    """Run one engine of ``rollout_peers.py``; where that fails, return why. ``long``: the prompts of 512 tokens, too."""
    job = {
        "model": model,
        "dtype": str(pair.stock.dtype).removeprefix("torch."),
        "tokens": TOKENS,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "cases": [pair.prompts(count) for count in rows] + ([long_prompts(pair)] if long else []),
    }
    command = [python, str(Path(__file__).with_name("rollout_peers.py")), name]
    ended = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if ended.returncode:
        return {"skipped": (ended.stderr.strip().splitlines() or ["no output"])[-1]}
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    cases = [
        {
            "rows": case["rows"],
            "prompt_tokens": sum(map(len, prompts)),
            "decode_tokens_per_second": round(case["rows"] * TOKENS / case["decode_seconds"], 1),
            "prefill_tokens_per_second": round(sum(map(len, prompts)) / case["prefill_seconds"], 1),
        }
        for case, prompts in zip(found["cases"], job["cases"], strict=True)
    ]
    return {"version": found["version"], "peak_mb": round(found["peak_bytes"] / 1e6), "cases": cases}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--queue", type=int, nargs="?", const=256, help="prompts of the queue; 256 take minutes")
    for flag in ("samples", "sampling", "prefill", "first-token", "memory", "int8"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--peer", nargs=3, action="append", default=[], metavar=("NAME", "PYTHON", "MODEL"))
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    pair = Pair(torch.float32 if options.precision == "fp32" else torch.bfloat16, options.int8)
    result: dict[str, Any] = {"precision": options.precision, "machine": machine.describe(), "rates": pair.rates}

    def add(name: str, found: Any) -> None:
        result[name] = found
        print(json.dumps({name: found}), file=sys.stderr, flush=True)

    add("cases", [rows_at_once(pair, rows, options.repeats) for rows in options.rows])
    timed = {"samples": samples_of_one, "sampling": sampling, "prefill": prefill, "first_token": first_token}
    for name, measure in timed.items():
        if getattr(options, name):
            add(name, measure(pair, options.repeats))
    if options.queue:
        add("queue", queue(pair, options.queue))
    folder, rows = str(locate("smollm2-135m").network), options.rows or [1, 8, 64]
    if options.memory:
        engines = ("tunesmith", "tunesmith int8", "transformers")
        add("memory", {name: in_its_own_process(pair, name, sys.executable, folder, [64], 1) for name in engines})
    for name, python, model in options.peer:
        add(name, in_its_own_process(pair, name, python, model, rows, options.repeats, options.prefill))
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
