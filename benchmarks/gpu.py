#!/usr/bin/env python
"""Supervised fine-tuning on a GPU against transformers.Trainer, with random weights and made rows: nothing is downloaded.

    python benchmarks/gpu.py --shape smollm2-135m                 # full and LoRA, each side in a fresh process
    python benchmarks/gpu.py --shape llama-1b --adaptation full --compile
    python benchmarks/gpu.py --tiny                               # seconds on a CPU: shows that this file works, no more

Both sides get the same weights, token rows, masks, rows a step, rate, schedule and optimiser (fused AdamW on fp32 weights; LoRA on a
frozen bf16 base). Trainer gets bf16 autocast, batches of like length, SDPA, no gradient checkpointing, and each of ``--peer-batch``:
its best counts. ``--compile`` adds a run of each side with torch.compile. Reported: tokens a second after the first steps, without
padding; peak memory of the device; the share of the rate that one large bf16 product reaches here, counting only the products that
the rows need; and the loss on held-out rows by one plain scorer. A setting that runs out of memory is reported as such.
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
WARM_UP = 3  # steps that are not timed: allocation, cuBLAS, the compiler
EVAL_ROWS = 64

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "llama-1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, tie_word_embeddings=True,
    ),
}  # fmt: skip


def make(folder: Path, shape: str, rows: int, longest: int) -> None:
    """A model folder of random weights whose tokenizer has a word for each number, and rows of a chain that can be learnt."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    words = ["<pad>", "<s>", "</s>"] + [f"w{number}" for number in range(3, config.vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")

    draw = np.random.default_rng(0)
    known = min(2000, config.vocab_size - 3)
    follows = draw.permutation(known)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for length in np.clip(draw.lognormal(5.1, 0.75, rows + EVAL_ROWS), 16, longest).astype(int):  # like alpaca's: mean 220
            chain = [int(draw.integers(known))]
            while len(chain) < length:
                chain.append(int(follows[chain[-1]]) if draw.random() < 0.8 else int(draw.integers(known)))
            text, cut = [f"w{number + 3}" for number in chain], length // 3
            file.write(json.dumps({"prompt": " ".join(text[:cut]), "completion": " " + " ".join(text[cut:])}) + "\n")


def recipe(folder: Path, options: argparse.Namespace, side: dict[str, Any]) -> dict[str, Any]:
    lora = options.adaptation == "lora"
    return {
        "model": str(folder / "model"),
        "objective": "sft",
        "adaptation": {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"} if lora else "full",
        "data": {"train": [{"path": str(folder / "rows.jsonl"), "limit": options.rows}], "eval": {"fraction": 0.0}, "cache": False},
        "train": {
            "learning_rate": 2e-4, "batch_size": options.batch_size, "precision": "fp32" if options.tiny else "bf16",
            "micro_batch_tokens": side["micro_batch_tokens"], "torch_compile": side["compile"], "eval_steps": None, "save_steps": None,
        },
        "samples": {"count": 0},
    }  # fmt: skip


def encoded(folder: Path, options: argparse.Namespace, held_out: bool) -> list[dict[str, Any]]:
    """The rows as tunesmith encodes them: token numbers, and which are learnt."""
    import torch

    from tunesmith import recipe as recipes
    from tunesmith.train import setup

    made = recipe(folder, options, {"micro_batch_tokens": 2048, "compile": False})
    if held_out:
        made["data"]["train"][0].pop("limit")
    data = setup.read(recipes.parse(made), torch.device("cpu"), lambda line: None).data.train
    chosen = range(options.rows, options.rows + EVAL_ROWS) if held_out else range(options.rows)
    return [{name: value.tolist() for name, value in data[row].items()} for row in chosen]


def products(options: argparse.Namespace, rows: list[dict[str, Any]]) -> float:
    """Floating-point operations a token that training on these rows needs in matrix products: no padding, nothing twice.

    2 a weight forward, 2 for the gradient of its input, 2 for its own where it is trained; the vocabulary at learnt positions only;
    attention of each token to those before it.
    """
    shape = SHAPES[options.shape]
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    kept = hidden * (2 + 2 * shape["num_key_value_heads"] / shape["num_attention_heads"]) + 3 * shape["intermediate_size"]
    body, head = layers * hidden * kept, hidden * shape["vocab_size"]
    tokens = sum(len(row["input_ids"]) for row in rows)
    learnt = sum(sum(row["supervised"][1:]) for row in rows)
    pairs = sum(len(row["input_ids"]) ** 2 / 2 for row in rows)
    each = 4 if options.adaptation == "lora" else 6
    return (each * (body * tokens + head * learnt) + 3 * 4 * layers * hidden * pairs) / tokens


def product_rate() -> float:
    """Operations a second of a large bf16 product on this device, the best of several."""
    import torch

    cuda = torch.cuda.is_available()
    size = 8192 if cuda else 512
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda" if cuda else "cpu") for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = now()
        a @ b
        best = min(best, now() - started)
    return 2 * size**3 / best


def now() -> float:
    """The time when the device has done what it was asked for."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak() -> int:
    import torch

    from tunesmith import machine

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else machine.peak_memory_bytes()


def ours(folder: Path, options: argparse.Namespace, side: dict[str, Any], save: Path) -> dict[str, Any]:
    """One run of tunesmith."""
    import tunesmith
    from tunesmith.runs import metrics_file

    outcome = tunesmith.train(recipe(folder, options, side), out=save)
    steps = [record for record in metrics_file.read(save / "metrics.jsonl") if record["kind"] == "train"]
    tokens, seconds = steps[-1]["tokens"] - steps[WARM_UP - 1]["tokens"], sum(step["seconds"] for step in steps[WARM_UP:])
    manifest = json.loads((save / "manifest.json").read_text(encoding="utf-8"))
    return {
        "tokens_per_second": tokens / seconds, "tokens": outcome["tokens"], "model": outcome["model_dir"], "route": manifest["route"],
        "micro_batch_tokens": manifest["micro_batch_tokens"],
    }  # fmt: skip


def theirs(folder: Path, options: argparse.Namespace, side: dict[str, Any], save: Path) -> dict[str, Any]:
    """One run of transformers.Trainer on the rows that tunesmith makes."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    lora, cpu = options.adaptation == "lora", not torch.cuda.is_available()
    rows = encoded(folder, options, held_out=False)
    dtype = torch.bfloat16 if lora and not options.tiny else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, attn_implementation=side["attention"])
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    sizes: list[int] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in batch)
        sizes.append(sum(len(row["input_ids"]) for row in batch))
        padded = {name: torch.full((len(batch), longest), fill) for name, fill in (("input_ids", 0), ("labels", -100))}
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for place, row in enumerate(batch):
            ids, learnt = torch.tensor(row["input_ids"]), torch.tensor(row["supervised"])
            padded["input_ids"][place, : len(ids)] = ids
            padded["labels"][place, : len(ids)] = ids.masked_fill(~learnt, -100)
            mask[place, : len(ids)] = 1
        return {**padded, "attention_mask": mask}

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(now())

    arguments = TrainingArguments(
        output_dir=str(save / "trainer"), num_train_epochs=1, per_device_train_batch_size=side["batch"],
        gradient_accumulation_steps=options.batch_size // side["batch"], learning_rate=2e-4, lr_scheduler_type="linear", warmup_steps=0,
        weight_decay=0.0, bf16=not lora and not options.tiny, optim="adamw_torch_fused", torch_compile=side["compile"],
        train_sampling_strategy="group_by_length", remove_unused_columns=False, gradient_checkpointing=False, use_cpu=cpu,
        logging_steps=10_000, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()])
    trainer.train()
    done = sizes[WARM_UP * (options.batch_size // side["batch"]) :]
    trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).save_pretrained(save / "model")
    seconds = times[-1] - times[WARM_UP - 1]
    return {"tokens_per_second": sum(done) / seconds, "tokens": sum(sizes), "model": str(save / "model")}


def score(folder: Path, model_folder: str, options: argparse.Namespace) -> float:
    """Mean loss of a learnt token of the held-out rows: plain transformers (and peft) in fp32, one row at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.adaptation == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), model_folder
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.to(device).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in encoded(folder, options, held_out=True):
            ids, learnt = torch.tensor(row["input_ids"], device=device), torch.tensor(row["supervised"], device=device)[1:]
            losses = torch.nn.functional.cross_entropy(
                model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:], reduction="none"
            )
            total, count = total + float(losses[learnt].sum()), count + int(learnt.sum())
    return total / count


def one(folder: Path, options: argparse.Namespace, side: dict[str, Any]) -> dict[str, Any]:
    """One side trained and scored, in this process."""
    from tunesmith import machine

    save = Path(tempfile.mkdtemp(dir=folder))
    try:
        found = (ours if side["who"] == "tunesmith" else theirs)(folder, options, side, save)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        return {**side, "failed": "out of memory"}
    found["peak_memory_bytes"] = peak()
    loss = score(folder, found.pop("model"), options)
    return {**side, **found, "eval_loss": loss}


def sides(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Who is to run: tunesmith and each setting of Trainer, without and (if asked) with torch.compile."""
    found = []
    for compile_too in [False, True] if options.compile else [False]:
        found.append({"who": "tunesmith", "compile": compile_too, "micro_batch_tokens": options.micro_batch_tokens})
        peer = {"who": "Trainer", "compile": compile_too, "attention": options.peer_attention}
        found += [{**peer, "batch": batch} for batch in options.peer_batch]
    return found


def fresh(folder: Path, options: argparse.Namespace, side: dict[str, Any]) -> dict[str, Any]:
    """The same in a process of its own, so that nobody inherits memory, caches or compiled code."""
    given = [
        "--shape", options.shape, "--rows", str(options.rows), "--batch-size", str(options.batch_size), "--adaptation",
        options.adaptation, "--folder", str(folder), "--side", json.dumps(side),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, env=environment)
    if done.returncode:
        return {**side, "failed": done.stderr.strip()[-1000:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(folder: Path, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """Every side once with one adaptation; the share of the product rate that each reaches."""
    runs = []
    for side in sides(options):
        run = one(folder, options, side) if options.tiny else fresh(folder, options, side)
        if "failed" not in run:
            run["share_of_product_rate"] = run["tokens_per_second"] * products(options, encoded(folder, options, False)) / rate
        print(json.dumps(run), file=sys.stderr)
        runs.append(run)
    good = [run for run in runs if "failed" not in run]
    best = {
        who: max((run for run in good if run["who"] == who), key=lambda run: run["tokens_per_second"], default=None)
        for who in ("tunesmith", "Trainer")
    }
    ratio = best["tunesmith"]["tokens_per_second"] / best["Trainer"]["tokens_per_second"] if all(best.values()) else None
    return {"adaptation": options.adaptation, "ratio": ratio, "runs": runs}


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--tiny", action="store_true", help="a two-layer model, few rows, fp32, all in this process")
    parser.add_argument("--adaptation", choices=["lora", "full"], help="default: both")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--peer-batch", type=int, nargs="+", default=[8, 32], help="rows at a time for Trainer; the best counts")
    parser.add_argument("--peer-attention", default="sdpa", help="flash_attention_2 where that package is installed")
    parser.add_argument("--micro-batch-tokens", default="auto", help="of tunesmith")
    parser.add_argument("--compile", action="store_true", help="both sides with torch.compile too (on a GPU)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # with --side: one run in the folder that was made
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(one(options.folder, options, options.side)))
        return None

    import torch
    import transformers

    from tunesmith import machine

    cuda = torch.cuda.is_available()
    if not cuda and not options.tiny:
        raise SystemExit("no GPU here: --tiny shows that this file works; benchmarks/sft.py measures CPUs")
    if options.tiny:
        options.shape, options.rows, options.batch_size, options.peer_batch, options.micro_batch_tokens = "tiny", 40, 8, [8], 2048
    elif options.micro_batch_tokens != "auto":
        options.micro_batch_tokens = int(options.micro_batch_tokens)
    rate, results = product_rate(), []
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), options.shape, options.rows, longest=64 if options.tiny else 1024)
        for adaptation in [options.adaptation] if options.adaptation else ["full", "lora"]:
            results.append(compare(Path(name), argparse.Namespace(**{**vars(options), "adaptation": adaptation}), rate))
    about = {
        "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__, "transformers": transformers.__version__,
        "shape": options.shape, "rows": options.rows, "batch_size": options.batch_size, "product_rate": rate,
        "machine": machine.describe(), "results": results,
    }  # fmt: skip
    for result in results:
        print(
            f"{result['adaptation']}: {result['ratio']:.2f} times Trainer"
            if result["ratio"]
            else f"{result['adaptation']}: failed"
        )
    if cuda and not options.tiny:
        target = ROOT / "benchmarks" / "results" / f"gpu-{options.shape}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(about, indent=1), encoding="utf-8")
        print(f"written to {target}")
    return about


if __name__ == "__main__":
    main()
