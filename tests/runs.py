"""Tiny runs: a model folder, a few rows and a recipe in a temporary folder, trained in about a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.tiny import ENCODERS, save_tiny, save_tiny_encoder
from tunesmith.runs import metrics_file

ANSWERS = [
    "Paris is the capital.",
    "a lazy dog",
    "0123",
    "안녕하세요",
    "def add(a, b): return a",
    "the quick brown fox jumps",
    "x",
    "short answer",
]


TRAIN = {
    "kind": "train",
    "step": 3,
    "epoch": 0.25,
    "loss": 1.8423,
    "learning_rate": 1.6e-4,
    "grad_norm": 0.9171,
    "tokens": 1700,
    "supervised_tokens": 600,
    "seconds": 2.5,
    "tokens_per_second": 680.4,
    "memory_bytes": 1_920_000_000,
}
EVAL = {"kind": "eval", "step": 3, "epoch": 0.25, "eval_loss": 1.801, "perplexity": 6.0557, "seconds": 12.3}
"""Records of metrics.jsonl: a log and an evaluation."""


def rows(count: int = 12) -> list[dict[str, str]]:
    """Prompts and completions of unequal length."""
    return [
        {"prompt": f"question {n}:" + " what is the" * (n % 5), "completion": f" {ANSWERS[n % 8]} {n}"} for n in range(count)
    ]  # no prompt ends in a space: tools that tokenise it alone would cut it elsewhere


def documents(count: int = 6) -> list[dict[str, str]]:
    return [{"text": f"document {n}. " + ", ".join(ANSWERS[n % 8 :: 1 + n % 3])} for n in range(count)]


LABELS = ("good", "bad", "so so")


def labelled(count: int = 12) -> list[dict[str, Any]]:
    """Texts of unequal length with one of three labels."""
    return [{"text": f"{ANSWERS[n % 8]} {n}" + " what is the" * (n % 4), "label": LABELS[n % 3]} for n in range(count)]


def tagged(count: int = 12) -> list[dict[str, Any]]:
    """Sentences whose names are tagged."""
    made = []
    for n in range(count):
        words = [*ANSWERS[n % 8].split(), "the", "Paris", "of", "France", *["what"] * (n % 4)]
        made.append({"tokens": words, "ner_tags": ["B-LOC" if word[0].isupper() else "O" for word in words]})
    return made


def questions(count: int = 12) -> list[dict[str, Any]]:
    made = []
    for n in range(count):
        context = f"{ANSWERS[n % 8]} The answer {n} is here." + " what is the" * (n % 3)
        answer = f"answer {n}"
        made.append({"id": str(n), "question": f"which one is {n}?", "context": context,
                     "answers": {"text": [answer], "answer_start": [context.index(answer)]}})  # fmt: skip
    return made


def preferences(count: int = 12) -> list[dict[str, Any]]:
    """Prompts with two answers, of which the first was preferred."""
    return [
        {
            "prompt": f"question {n}:" + " what is the" * (n % 5),
            "chosen": f" {ANSWERS[n % 8]} {n}",
            "rejected": f" {ANSWERS[(n + 3) % 8]}",
        }
        for n in range(count)
    ]


def judged(count: int = 12) -> list[dict[str, Any]]:
    """Single responses, every other one desirable; two neighbours answer the same prompt."""
    return [
        {
            "prompt": f"question {n // 2}:" + " what is the" * (n // 2 % 5),
            "completion": f" {ANSWERS[n % 8]} {n}",
            "label": n % 2 == 0,
        }
        for n in range(count)
    ]


ROWS = {
    "kto": judged,
    "dpo": preferences,
    "reward": preferences,
    "cpt": lambda count: documents(count // 2),
    "classify": labelled,
    "tag": tagged,
    "qa": questions,
}

TASKS = ("classify", "tag", "qa", "reward")
"""Objectives of models that write no text."""


def model_folder(folder: Path, name: str, **changes: Any) -> Path:
    target = folder / f"model-{name}"
    if target.exists():
        return target
    return save_tiny_encoder(name, target, **changes) if name in ENCODERS else save_tiny(name, target, **changes)


def recipe(
    folder: Path, name: str = "llama", objective: Any = "sft", adaptation: Any = "full", count: int = 12, **train: Any
) -> dict[str, Any]:
    """A run of a few steps in fp32 with no evaluation and no samples, unless ``train`` says otherwise."""
    kind = objective if isinstance(objective, str) else objective["type"]
    data = ROWS.get(kind, rows)(count)
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in data), encoding="utf-8")
    optim, arguments = train.pop("optim", "adamw"), train.pop("optim_args", {"eps": 1e-4})
    settings = {
        "batch_size": 5, "max_steps": 4, "learning_rate": 1e-2, "precision": "fp32", "eval_steps": None, "save_steps": None,
        "optim": {"type": optim, **arguments}, **train,
    }  # fmt: skip
    return {
        "model": str(model_folder(folder, name)),
        "objective": objective,
        "adaptation": adaptation,
        "data": {"train": [{"path": str(file)}], "eval": {"fraction": 0}, "cache": False},
        "train": settings,
        **({} if kind in TASKS else {"samples": {"count": 0}}),
    }


def weights(model_dir: str | Path) -> dict[str, torch.Tensor]:
    """All of them, those of a value head next to the model included."""
    return {name: value for file in Path(model_dir).glob("*.safetensors") for name, value in load_file(file).items()}


def history(run: Path) -> list[dict[str, Any]]:
    """The run's records without what may differ between identical runs."""
    return [
        {k: v for k, v in record.items() if k not in metrics_file.TIMING_KEYS}
        for record in metrics_file.read(run / "metrics.jsonl")
    ]


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight; the names must agree."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)


class Killed(BaseException):
    """Stands for a kill: nothing in the product catches it."""


def killed_before(step: int, made: dict[str, Any], out: Path) -> None:
    """Train ``made`` into ``out`` until ``step`` would begin."""
    import tunesmith
    from tunesmith.train import loop

    def dies(job: Any, now: Any) -> Any:
        if now.number == step:
            raise Killed
        return train_step(job, now)

    train_step, loop.train_step = loop.train_step, dies
    try:
        tunesmith.train(made, out=out)
    except Killed:
        return
    finally:
        loop.train_step = train_step
    raise AssertionError(f"the run never came to step {step}")
