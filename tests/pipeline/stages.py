"""A tiny pipeline: sft, then a reward model and dpo on its result, two steps each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.runs import preferences, rows
from tests.tiny import save_tiny
from tunesmith.pipeline import pipeline_file
from tunesmith.recipe import text as recipe_text

TRAIN = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "eval_steps": 2, "save_steps": 1}


def recipe(data: Path, objective: str, **keys: Any) -> dict[str, Any]:
    return {
        "objective": objective, "adaptation": "lora", "data": {"train": [{"path": str(data)}], "eval": {"fraction": 0.3}},
        "train": dict(TRAIN), **keys,
    }  # fmt: skip


def write(folder: Path) -> Path:
    """Write the model, the data, the recipes and the pipeline's file. Returns the latter."""
    save_tiny("llama", folder / "base")
    for name, made in (("rows", rows(24)), ("pairs", preferences(24))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    samples = {"samples": {"count": 0}}
    on_sft = {"model": {"stage": "sft"}, "adapter": "merge"}
    sft = recipe(folder / "rows.jsonl", "sft", model=str(folder / "base"), **samples)
    pairs = folder / "pairs.jsonl"
    stages = {
        "sft": {"recipe": "sft.yaml"},
        "reward": {"recipe": recipe(pairs, "reward", **on_sft)},
        "dpo": {"recipe": recipe(pairs, "dpo", model="nowhere", **samples), "overrides": on_sft},
    }
    (folder / "sft.yaml").write_text(recipe_text.dump(sft), encoding="utf-8")
    return dump(folder / "pipe.yaml", {"stages": stages, "compare": {"count": 3, "max_new_tokens": 4}})


def dump(file: Path, content: dict[str, Any]) -> Path:
    file.write_text(recipe_text.dump(json.loads(json.dumps(content))), encoding="utf-8")  # no aliases
    return file


def read(file: Path, out: Path, *overrides: str) -> pipeline_file.Pipeline:
    return pipeline_file.read(file, out, overrides)
