#!/usr/bin/env python
"""Prove that a refactoring changes no number: record what 14 small runs write, and compare two records.

    python benchmarks/recorded.py record FOLDER           # before the change
    python benchmarks/recorded.py check FOLDER            # after it: record again and compare
    python benchmarks/recorded.py compare FOLDER OTHER    # two records

The exit code is 1 when anything differs. The runs are those of ``CASES``: tiny random models, every objective,
every adaptation. Each case is trained straight through, then interrupted at half of its steps and resumed; the
case that sets ``kill`` is also killed by SIGKILL and resumed. A record is one JSON file per case: the sha256 of
every tensor, metrics without timing keys, samples, predictions, figures and the merged model. Paths (``PATHS``)
and sentences (``PROSE``) are left out.

The script uses tunesmith's public functions and file formats alone, so modules may move and change their
names between two records. A record depends on the processor and on the versions of torch and the other
libraries; ``compare`` warns where two records differ in these. A record takes a minute and a half.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tunesmith

STEPS, HALF = 6, 3
TIMING = {"time", "seconds", "eta_seconds", "tokens_per_second", "rows_per_second"}
TIMING |= {"train_seconds", "reference_seconds", "memory_bytes", "peak_memory_bytes", "update_seconds"}
TIMING |= {"rollout_seconds", "scoring_seconds", "logps_seconds", "rollout_tokens_per_second", "scoring_tokens_per_second"}
PATHS = {"base_model_name_or_path", "model_dir", "run_dir", "report", "path", "base", "adapter"}
PROSE = {"why", "notes"}
MERGES = ("lora", "qlora", "ia3")  # adaptations that tunesmith.merge folds into the base model

# name: (architecture, objective, adaptation, keys of train)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "sft-full": ("llama", {"type": "sft"}, {"type": "full"},
                 {"micro_batch_tokens": 150, "neftune_noise_alpha": 5, "weight_decay": 0.1, "lr_scheduler_type": "cosine",
                  "warmup_steps": 2}),
    "sft-lora": ("qwen3", {"type": "sft", "train_on": "all"}, {"type": "lora", "r": 4},
                 {"precision": "auto", "micro_batch_tokens": 150, "kill": True}),
    "sft-qlora": ("llama", {"type": "sft"}, {"type": "qlora", "r": 4}, {"gradient_checkpointing": True}),
    "sft-prefix": ("gpt2", {"type": "sft"}, {"type": "prefix", "num_virtual_tokens": 4, "prefix_projection": True},
                   {"micro_batch_tokens": 150}),
    "sft-prompt": ("qwen3", {"type": "sft"}, {"type": "prompt", "num_virtual_tokens": 4}, {"packing": "off", "precision": "fp16"}),
    "cpt-lora": ("gpt2", {"type": "cpt"}, {"type": "lora", "r": 4, "lora_dropout": 0.2, "loraplus_lr_ratio": 16},
                 {"max_length": 64, "micro_batch_tokens": 130}),
    "cpt-features": ("llama", {"type": "cpt"}, {"type": "features", "target_modules": ["lm_head"]}, {"optim": "adafactor"}),
    "dpo-lora": ("llama", {"type": "dpo"}, {"type": "lora", "r": 4, "use_dora": True}, {"micro_batch_tokens": 250}),
    "dpo-simpo": ("gemma", {"type": "dpo", "loss_type": "simpo"}, {"type": "full"}, {"optim": "lion", "learning_rate": 1e-4}),
    "kto-lora": ("llama", {"type": "kto"}, {"type": "lora", "r": 4}, {"micro_batch_tokens": 150}),
    "grpo-lora": ("llama", {"type": "grpo", "num_generations": 5, "update_epochs": 2, "max_new_tokens": 6, "beta": 0.1,
                            "rewards": [{"type": "length", "target": 9, "unit": "characters"}]},
                  {"type": "lora", "r": 4}, {"micro_batch_tokens": 150}),
    "ppo-lora": ("llama", {"type": "ppo", "update_epochs": 2, "max_new_tokens": 6,
                           "rewards": [{"type": "length", "target": 9, "unit": "characters"}]},
                 {"type": "lora", "r": 4}, {"micro_batch_tokens": 150}),
    "reward-full": ("qwen3", {"type": "reward"}, {"type": "full"}, {"precision": "auto", "micro_batch_tokens": 250}),
    "classify-full": ("bert", {"type": "classify"}, {"type": "full"}, {"micro_batch_tokens": 100, "head_learning_rate": 2e-3}),
    "classify-bottleneck": ("llama", {"type": "classify"}, {"type": "bottleneck", "bottleneck_size": 4, "dropout": 0.2},
                            {"precision": "bf16", "micro_batch_tokens": 100}),
    "tag-features": ("bert", {"type": "tag"}, {"type": "features", "train_last": 1}, {"packing": "off", "micro_batch_tokens": 100}),
    "qa-ia3": ("bert", {"type": "qa", "window": 64, "stride": 16}, {"type": "ia3"}, {"micro_batch_tokens": 150}),
}  # fmt: skip

SHAPE = {"vocab_size": 272, "max_position_embeddings": 256, "bos_token_id": 257, "eos_token_id": 260, "pad_token_id": 256}
DECODER = {**SHAPE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "qwen3": DECODER,
    "gemma": DECODER,
    "gpt2": {**SHAPE, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.2, "embd_pdrop": 0.1,
             "attn_pdrop": 0.0},
    "bert": {**SHAPE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "type_vocab_size": 2, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0},
}  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]  # ids 256 to 260, after the 256 bytes
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHRASES = ["Paris is the capital.", "a lazy dog", "0123", "안녕하세요", "def f(a): return a", "the brown fox jumps", "x"]


def rows_of(objective: str, count: int = 13) -> list[dict[str, Any]]:
    """Rows of unequal length: two steps of five rows and one of three in each epoch."""
    made: list[dict[str, Any]] = []
    for n in range(count):
        phrase, other, filler = PHRASES[n % 7], PHRASES[(n + 3) % 7], " what is it" * (n % 4)
        words = [*phrase.split(), "in", "Rome", *filler.split()]
        context = f"{phrase} The answer {n} is here.{filler}"
        answers = {"text": [f"answer {n}"], "answer_start": [context.index("answer")]}
        made.append({
            "sft": {"prompt": f"question {n}:{filler}", "completion": f" {phrase} {n}"},
            "cpt": {"text": f"document {n}. {phrase}{filler}, {other}" + filler},
            "kto": {"prompt": f"question {n}:{filler}", "completion": f" {phrase} {n}", "label": n % 2 == 0},
            "grpo": {"prompt": f"question {n}:{filler}"},
            "ppo": {"prompt": f"question {n}:{filler}"},
            "dpo": {"prompt": f"question {n}:{filler}", "chosen": f" {phrase} {n}", "rejected": f" {other}"},
            "reward": {"prompt": f"question {n}:{filler}", "chosen": f" {phrase} {n}", "rejected": f" {other}"},
            "classify": {"text": f"{phrase} {n}{filler}", "label": ("good", "bad", "so so")[n % 3]},
            "tag": {"tokens": words, "ner_tags": ["B-LOC" if word[0].isupper() else "O" for word in words]},
            "qa": {"id": str(n), "question": f"which one is {n}?", "context": context, "answers": answers},
        }[objective])  # fmt: skip
    return made


def write_model(name: str, folder: Path) -> None:
    """Write a random network of two layers and a tokenizer of bytes, which needs no training."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

    encoder = name == "bert"
    torch.manual_seed(0)
    kind = AutoModelForMaskedLM if encoder else AutoModelForCausalLM
    model = kind.from_config(AutoConfig.for_model(name, **ARCHITECTURES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # larger than the default initialisation, so that attention matters
                parameter.mul_(5.0)
    model.save_pretrained(folder)
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    ids = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if encoder:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
        )
        names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<|im_end|>"}
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)
    else:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML
        )
    tokenizer.save_pretrained(folder)


def recipe_of(name: str, folder: Path) -> dict[str, Any]:
    """The recipe of a case, its model and its rows written into ``folder``."""
    architecture, objective, adaptation, train = CASES[name]
    model, rows = folder / architecture, folder / f"{objective['type']}.jsonl"
    if not model.exists():
        write_model(architecture, model)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows_of(objective["type"])]
    rows.write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "batch_size": 5, "max_steps": STEPS, "learning_rate": 5e-3, "precision": "fp32", "logging_steps": 1, "eval_steps": 2,
        "save_steps": 4, **{key: value for key, value in train.items() if key != "kill"},
    }  # fmt: skip
    writes = objective["type"] in ("sft", "cpt", "dpo", "kto", "grpo", "ppo")
    return {
        "model": str(model), "objective": objective, "adaptation": adaptation, "train": settings, "seed": 7,
        "data": {"train": [{"path": str(rows)}], "eval": {"path": str(rows), "limit": 6}, "cache": False},
        **({"samples": {"count": 2, "max_new_tokens": 6}} if writes else {}),
    }  # fmt: skip


class Interruption(Exception):
    """Raised by ``on_log`` to stop a run after half of its steps; tunesmith saves a checkpoint first."""


def interrupt(record: dict[str, Any]) -> None:
    if record["step"] == HALF:
        raise Interruption


def kill(record: dict[str, Any]) -> None:
    """End this process at the last evaluation, when records after the checkpoint of step 4 are on disk."""
    if record["step"] == STEPS:
        os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(recipe: dict[str, Any], out: Path) -> None:
    one_thread()
    tunesmith.train(recipe, out=out, on_eval=kill)


def trained(recipe: dict[str, Any], folder: Path, killed: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(how the run went, its result), one run folder each."""
    yield "straight", tunesmith.train(recipe, out=folder / "straight")
    try:
        tunesmith.train(recipe, out=folder / "interrupted", on_log=interrupt)
        raise SystemExit("recorded.py: on_log raised at half of the steps, and the run went on")
    except Interruption:
        yield "interrupted", tunesmith.train(recipe, out=folder / "interrupted", resume=True)
    if killed:
        arguments = (recipe, folder / "killed")
        process = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=arguments)
        process.start()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise SystemExit(f"recorded.py: expected exit code -9 (SIGKILL), got {process.exitcode}")
        yield "killed", tunesmith.train(recipe, out=folder / "killed", resume=True)


def repeats(value: Any) -> Any:
    """``value`` without timing keys, paths and sentences: what two runs of the same recipe have in common."""
    if isinstance(value, dict):
        # peft writes target_modules from a set, in an order that changes with every process
        return {
            key: sorted(inner) if key == "target_modules" and isinstance(inner, list) else repeats(inner)
            for key, inner in value.items()
            if key not in TIMING | PATHS | PROSE
        }
    return [repeats(inner) for inner in value] if isinstance(value, list | tuple) else value


def tensors_in(file: Path) -> dict[str, str]:
    """Dtype, shape and sha256 of every tensor of a safetensors file, by name."""
    import torch
    from safetensors.torch import load_file

    def described(tensor: torch.Tensor) -> str:
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"

    return {name: described(tensor) for name, tensor in sorted(load_file(file).items())}


def tensors_of(folder: Path) -> dict[str, dict[str, str]]:
    """``tensors_in`` every safetensors file of a model folder; empty where there is no folder."""
    return {file.name: tensors_in(file) for file in sorted(folder.glob("*.safetensors"))}


def lines_of(file: Path) -> list[Any]:
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [repeats(json.loads(line)) for line in text.splitlines()]


def facts_of(run: Path, result: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Everything in a run folder that must repeat, and what the saved model says."""
    checkpoints = sorted((run / "checkpoints").glob("step-*"))  # steps of one digit
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    configs = list((run / "model").glob("adapter_config.json"))
    rows, precision = recipe["data"]["train"][0]["path"], recipe["train"]["precision"]
    model, objective = result["model_dir"], recipe["objective"]["type"]
    evaluated, predicted, merged = {}, [], {}
    if objective not in ("dpo", "kto", "grpo", "ppo"):  # evaluate refuses it: its reference is gone, or its rewards
        evaluated = tunesmith.evaluate(model, rows, objective=objective, precision=precision)
    if "samples" not in recipe:
        predicted = list(tunesmith.predict(model, rows, precision=precision))
    if recipe["adaptation"]["type"] in MERGES:
        merged = tunesmith.merge(model, run / "folded")
    return {
        "metrics": lines_of(run / "metrics.jsonl"),
        "result": repeats(result),
        "manifest": repeats({key: manifest[key] for key in ("parameters", "precision", "route")}),
        "model": tensors_of(run / "model"),
        "merged": tensors_of(run / "merged"),
        "checkpoints": [folder.name for folder in checkpoints],
        "checkpoint": tensors_in(checkpoints[-1] / "state.safetensors"),
        "state": repeats(json.loads((checkpoints[-1] / "state.json").read_text(encoding="utf-8"))),
        "adapter_config": [repeats(json.loads(file.read_text(encoding="utf-8"))) for file in configs],
        "samples": lines_of(run / "samples.jsonl"),
        "evaluate": repeats(evaluated),
        "predict": repeats(predicted),
        "merge": repeats(merged) | tensors_of(run / "folded"),
    }  # fmt: skip


def one_thread() -> None:
    """Sums over several threads depend on their number."""
    import torch

    torch.set_num_threads(1)


def record(folder: Path) -> None:
    """Write the record of the tunesmith that is imported into ``folder``, which must be new or empty."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty; expected a new folder for the record. Name another.")
    one_thread()
    print(f"recording {Path(tunesmith.__file__).parent}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "transformers", "peft", "tokenizers", "numpy", "bitsandbytes")
    machine = {"processor": processor(), "python": platform.python_version()}
    versions = {name: importlib.metadata.version(name) for name in packages}
    write(folder / "environment.json", machine | versions)
    with tempfile.TemporaryDirectory() as name:
        os.environ["TUNESMITH_HOME"] = str(Path(name, "home"))  # not what earlier runs left on this machine
        for case, (*_, train) in CASES.items():
            print(case, file=sys.stderr)
            recipe = recipe_of(case, Path(name))
            runs = trained(recipe, Path(name, "runs", case), "kill" in train)
            facts = {how: facts_of(Path(result["run_dir"]), result, recipe) for how, result in runs}
            write(folder / f"{case}.json", facts)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every leaf of plain data; an empty list or mapping is a leaf."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [(f"{key}.{name}" if key else str(name), one) for name, one in pairs]
    if not inner:
        yield key, json.dumps(value, ensure_ascii=False)
    for name, one in inner:
        yield from leaves(one, name)


def read(file: Path) -> dict[str, str]:
    return dict(leaves(json.loads(file.read_text(encoding="utf-8")))) if file.exists() else {}


def compare(before: Path, after: Path, say: Callable[[str], None] = print) -> bool:
    """Whether two records are the same; print a line for each case, with the first key that differs."""
    found = {file.name for folder in (before, after) for file in folder.glob("*.json")}
    files = sorted(found - {"environment.json"})
    if not files:
        raise SystemExit(f"no record in {before} or {after}; expected a folder that `record` has written.")
    if read(before / "environment.json") != read(after / "environment.json"):
        say("warning: environment.json differs: another processor or library version may change numbers")
    same = True
    for name in files:
        old, new = read(before / name), read(after / name)
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        same = same and not changed
        case = name.removesuffix(".json")
        if changed:
            key = changed[0]
            say(f"{case}: {len(changed)} of {len({**old, **new})} keys differ, first {key}")
            say(f"  {old.get(key, 'absent')} -> {new.get(key, 'absent')}")
        else:
            say(f"{case}: same")
    return same


def main(arguments: list[str] | None = None) -> bool:
    """Run one verb; return whether nothing differs."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, folders in (("record", ["folder"]), ("compare", ["folder", "other"]), ("check", ["folder"])):
        chosen = verbs.add_parser(verb)
        for name in folders:
            chosen.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    # before torch and its kin are imported, which read these when they load
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    if options.verb == "record":
        record(options.folder)
        return True
    if options.verb == "compare":
        return compare(options.folder, options.other)
    with tempfile.TemporaryDirectory() as name:
        record(Path(name, "now"))
        return compare(options.folder, Path(name, "now"))


if __name__ == "__main__":
    sys.exit(not main())
