#!/usr/bin/env python
"""Decoding and prefill of the engine next to transformers' ``generate``, on the same prompts, in one process, alternating.

    python benchmarks/rollout.py --rows 1 8 64 --out rollout.json

SmolLM2-135M continues prompts of ``$TUNESMITH_SHARED/data/alpaca_en_demo.json`` greedily, 48 tokens each, none stopping sooner.
transformers loads the model itself, as its users do, pads on the left and runs with its dynamic and with its static cache (not compiled); the better
one counts. A run of
one new token is prefill; decoding is a run of 49 tokens less that. Each figure is the best of ``--repeats``. ``share_of_bandwidth`` is that of reading every weight once a step,
``share_of_matmul`` that of multiplying by it. AVX2 is emulated with ``ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2``
and ``--precision fp32``. Cases: rows at once;
``samples``: 8 answers to one prompt of 400 tokens, in one engine with a shared prefill and as 8 prompts of their own;
``queue``: 256 prompts with 8 to 400 new tokens in 32 slots, next to transformers' batches of 32 in the order of length.
"""

from __future__ import annotations

import argparse
import json
import os
import random
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
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.load.compute_dtype import cast_and_move

SHARED = Path(os.environ.get("TUNESMITH_SHARED", Path(__file__).resolve().parents[2] / "shared"))
TOKENS = 48


class Pair:
    """The model by the engine and by transformers."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.rates = {"matmul_flops": rates.matmul_flops(dtype), "read_bytes_per_second": rates.read_bandwidth()}
        self.model, self.tokenizer = tunesmith.load("smollm2-135m", dtype=dtype)
        cast_and_move(self.model, "fp32" if dtype is torch.float32 else "bf16", torch.device("cpu"))
        self.stock = AutoModelForCausalLM.from_pretrained(locate("smollm2-135m").network, dtype=dtype).eval()

    def prompts(self, count: int) -> list[list[int]]:
        rows = json.loads((SHARED / "data" / "alpaca_en_demo.json").read_text(encoding="utf-8"))[:count]
        turns = [[{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}] for row in rows]
        return [self.tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in turns]

    def engine(self, requests: Sequence[Request], slots: int) -> tuple[float, float]:
        """Return seconds of prefill and of decoding in a new engine."""
        engine = Engine(self.model, self.tokenizer, slots)
        for _ in engine.run(requests[:1]):  # the check of the fast paths
            pass
        engine.slots.forget()
        engine.timing.prefill_seconds = engine.timing.decode_seconds = 0.0
        for _ in engine.run(requests):
            pass
        self.bytes_per_weight = 2 if engine.slots._pass.packed_step.panels else self.model.dtype.itemsize
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
    ours: list[tuple[float, float]] = []
    theirs: dict[str, list[tuple[float, float]]] = {"dynamic": [], "static": []}
    for _ in range(repeats):
        ours.append(pair.engine(wanted, rows))
        for cache, found in theirs.items():
            first = pair.transformers(prompts, 1, cache)
            found.append((first, pair.transformers(prompts, TOKENS + 1, cache) - first))
    best = {cache: [min(column) for column in zip(*found, strict=True)] for cache, found in theirs.items()}
    prefill, decode = (min(column) for column in zip(*ours, strict=True))
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


def queue(pair: Pair) -> dict[str, Any]:
    drawn = random.Random(0)
    prompts = (pair.prompts(256) * 256)[:256]
    counts = [drawn.randint(8, 400) for _ in prompts]
    ours = sum(pair.engine(requests(prompts, counts), 32))
    order = sorted(range(256), key=counts.__getitem__)
    theirs = sum(
        pair.transformers([prompts[row] for row in order[start : start + 32]], counts[order[min(start + 31, 255)]], "dynamic")
        for start in range(0, 256, 32)
    )
    return {"seconds": round(ours, 1), "transformers_seconds": round(theirs, 1), "ratio": round(theirs / ours, 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", action="store_true", help="also 8 answers to one prompt")
    parser.add_argument("--queue", action="store_true", help="also the queue, which takes minutes")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    pair = Pair(torch.float32 if options.precision == "fp32" else torch.bfloat16)
    result: dict[str, Any] = {"precision": options.precision, "machine": machine.describe(), "rates": pair.rates, "cases": []}
    for rows in options.rows:
        result["cases"].append(rows_at_once(pair, rows, options.repeats))
        print(json.dumps(result["cases"][-1]), file=sys.stderr, flush=True)
    if options.samples:
        result["samples"] = samples_of_one(pair, options.repeats)
    if options.queue:
        result["queue"] = queue(pair)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
