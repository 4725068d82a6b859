#!/usr/bin/env python
"""One engine on the prompts of ``rollout.py``, in a process and an environment of its own. ``rollout.py`` starts it.

    python benchmarks/rollout_peers.py tunesmith|"tunesmith int8"|transformers|llama.cpp|openvino < job.json

The job has ``model`` (a folder, or a GGUF file), ``dtype``, ``tokens``, ``repeats``, and ``cases``: lists of prompts as token ids. Each case is
continued greedily by ``tokens`` tokens, none stopping sooner. The result, printed as JSON, has seconds of prefill and of decoding for each case
(the best of ``repeats``), the version, and the peak memory of the process. llama.cpp needs llama-cpp-python; openvino needs openvino-genai.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Sequence[int]]
Continue = Callable[[Rows, int], None]
"""Continue all prompts at once by this many tokens."""


def tunesmith(job: dict[str, Any], weights: str = "stored") -> tuple[Continue, str]:
    import torch

    import tunesmith as package
    from tunesmith.models.generate.engine import Engine
    from tunesmith.models.generate.running_rows import Request
    from tunesmith.models.generate.sampling import SamplingParams
    from tunesmith.models.load.compute_dtype import cast_and_move

    model, tokenizer = package.load(job["model"])
    cast_and_move(model, {"bfloat16": "bf16", "float32": "fp32"}[job["dtype"]], torch.device("cpu"))
    engine = Engine(model, tokenizer, decode_weights=weights)

    def run(prompts: Rows, tokens: int) -> None:
        engine.slots.forget()
        params = SamplingParams(max_new_tokens=tokens, stop=frozenset())
        list(engine.run([Request(tuple(ids), params, row) for row, ids in enumerate(prompts)]))

    return run, package.__version__


def transformers(job: dict[str, Any]) -> tuple[Continue, str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    tokenizer = AutoTokenizer.from_pretrained(job["model"])  # answers are texts: its memory counts
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()

    def run(prompts: Rows, tokens: int) -> None:
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        exactly = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        found = model.generate(input_ids=ids, attention_mask=mask, **exactly)
        tokenizer.batch_decode(found[:, longest:])

    return run, __version__


def llama_cpp(job: dict[str, Any]) -> tuple[Continue, str]:
    """The C interface: the class ``Llama`` runs one row at a time."""
    import llama_cpp as lib
    import numpy as np

    most = max(len(rows) for rows in job["cases"])
    longest = max(len(row) for rows in job["cases"] for row in rows) + job["tokens"]
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.kv_unified = most * (-(-longest // 256) * 256), most, True
    settings.n_batch = settings.n_ubatch = 2048
    settings.n_threads = settings.n_threads_batch = job["threads"]
    lib.llama_log_set(quiet := lib.llama_log_callback(lambda level, text, data: None), None)
    model = lib.llama_model_load_from_file(str(job["model"]).encode(), lib.llama_model_default_params())
    context = lib.llama_init_from_model(model, settings)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(settings.n_batch, 0, 1)

    def decode(tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        for place, (token, position, row, wanted) in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
        batch.n_tokens = len(tokens)
        assert lib.llama_decode(context, batch) == 0, quiet

    def largest(place: int) -> int:
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, place), (vocabulary,)).argmax())

    def run(prompts: Rows, tokens: int) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        following: list[int] = []
        waiting: list[tuple[int, int, int, bool]] = []

        def prefill() -> None:
            decode(waiting)
            following.extend(largest(place) for place, (*_, wanted) in enumerate(waiting) if wanted)
            waiting.clear()

        for row, prompt in enumerate(prompts):
            if len(waiting) + len(prompt) > settings.n_batch:
                prefill()
            waiting += [(token, place, row, place == len(prompt) - 1) for place, token in enumerate(prompt)]
        prefill()
        for step in range(tokens - 1):
            decode([(following[row], len(prompt) + step, row, True) for row, prompt in enumerate(prompts)])
            following[:] = [largest(row) for row in range(len(prompts))]

    return run, str(lib.__version__)


def openvino(job: dict[str, Any]) -> tuple[Continue, str]:
    import numpy as np
    import openvino
    import openvino_genai

    settings = openvino_genai.SchedulerConfig()
    settings.max_num_batched_tokens, settings.max_num_seqs, settings.cache_size = 2048, 256, 2
    settings.enable_prefix_caching = False
    hints = {
        "INFERENCE_NUM_THREADS": job["threads"],
        "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[job["dtype"]],
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(job["model"]), settings, "CPU", hints)

    def run(prompts: Rows, tokens: int) -> None:
        rule = openvino_genai.GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, ignore_eos=True)
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        found = pipeline.generate(inputs, [rule] * len(inputs))
        assert all(len(one.m_generation_ids[0]) == tokens for one in found)

    return run, str(openvino_genai.__version__)


def tunesmith_int8(job: dict[str, Any]) -> tuple[Continue, str]:
    return tunesmith(job, "int8")


ENGINES = {
    "tunesmith": tunesmith,
    "tunesmith int8": tunesmith_int8,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
    "openvino": openvino,
}


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    job = json.load(sys.stdin)
    run, version = ENGINES[sys.argv[1]](job)
    cases = []
    for prompts in job["cases"]:
        times = []
        run(prompts, 2)
        for _ in range(job["repeats"]):
            started = time.perf_counter()
            run(prompts, 1)
            first = time.perf_counter()
            run(prompts, job["tokens"] + 1)
            times.append((first - started, time.perf_counter() - first - (first - started)))
        prefill, decode = (min(column) for column in zip(*times, strict=True))
        cases.append({"rows": len(prompts), "prefill_seconds": prefill, "decode_seconds": decode})
    print(json.dumps({"version": version, "cases": cases, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
