"""Runs of an objective that samples, on tiny models, with a rule as the reward."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from tests import kill_points
from tests.runs import recipe
from tunesmith.rollout.rewards import Rewards, Scored
from tunesmith.train import loop, session


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


PHASES: dict[str, tuple[Any, str, int]] = {
    "rollout": (session.RunSession, "sample", 2),
    "scoring": (Rewards, "score", 2),
    "measuring": (session.RunSession, "reference", 2),
    "update": (loop, "train_step", 7),
}
"""Phase of an iteration -> (place, function, the call of it that belongs to the second iteration) of ``made``."""


def kill_in(phase: str) -> None:
    """End this process by SIGKILL at the beginning of a phase of its second iteration."""
    place, name, left = PHASES[phase]
    function = getattr(place, name)

    def dies(*args: Any, **keys: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **keys)

    setattr(place, name, dies)


def score_by_rule() -> None:
    Rewards.score = rule  # type: ignore[method-assign]


def measure_and_die() -> None:
    """For each of several processes: score by ``rule``, and end in the second iteration, when its answers are scored."""
    score_by_rule()
    kill_in("measuring")


def killed_in(phase: str, made: dict[str, Any], out: Path) -> int:
    """Train ``made`` in a process that ends in ``phase`` of its second iteration. Returns its exit code."""

    def work() -> None:
        import tunesmith

        kill_in(phase)
        tunesmith.train(made, out=out)

    return kill_points.in_fork(work)[0]


def sampled_by_resuming(made: dict[str, Any], out: Path, patch: Any) -> list[int]:
    """Resume a run. Returns the prompts that were sampled again or for the first time, in order."""
    import tunesmith

    prompts, sample = [], session.RunSession.sample

    def counted(self: Any, requests: Any) -> Any:
        prompts.extend(request.prompt for request in requests if request.sample == 0)
        return sample(self, requests)

    patch.setattr(session.RunSession, "sample", counted)
    tunesmith.train(made, out=out, resume=True)
    return prompts
