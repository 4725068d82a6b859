"""Runs of an objective that samples, on tiny models, with a rule as the reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.runs import recipe
from tunesmith.rollout.rewards import Scored


def prompts(count: int = 8) -> list[dict[str, Any]]:
    """Prompts of unequal length with a column that rewards may read."""
    return [{"prompt": f"question {n}:" + " what is the" * (n % 4), "target": n} for n in range(count)]


def made(
    folder: Path, name: str = "llama", adaptation: Any = "full", count: int = 8, train: Any = (), **objective: Any
) -> dict[str, Any]:
    """A run of GRPO in fp32: four prompts of four answers an iteration, in steps of eight, twice; three iterations."""
    keys = {"type": "grpo", "num_generations": 4, "rollout_batch_size": 4, "update_epochs": 2, "max_new_tokens": 6, **objective}
    keys.setdefault("rewards", [{"type": "length", "target": 3}])
    settings = {
        "batch_size": 8, "max_steps": None, "epochs": 3.0 * (keys["rollout_batch_size"] or 4) / count, "logging_steps": 1, "learning_rate": 3e-3, **dict(train),
    }  # fmt: skip
    out = recipe(folder, name, keys, adaptation, **settings)
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in prompts(count)), encoding="utf-8")
    return {**out, "data": {"train": [{"path": str(file)}], "eval": {"fraction": 0}, "cache": False}}


def rule(self: Any, answers: Any) -> Scored:
    """A reward that differs from answer to answer: how many different tokens it has, and a function of their sum."""
    total = np.array([len(set(one.ids)) + np.cos(sum(one.ids) + len(one.name)) for one in answers], np.float64)
    return Scored(total, {"rule": total})
