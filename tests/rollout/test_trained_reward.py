"""Policies that learn from a trained reward model, which is a second adapter of their network."""

from __future__ import annotations

import numpy as np
import pytest

import tunesmith
from tests.rollout.sampling import made
from tests.runs import history, recipe

KINDS = {
    "grpo": {"beta": 0.02},
    "rloo": {"advantage": "rloo", "beta": 0.02, "use_kl_in_reward": True},
    "ppo": {"type": "ppo", "temperature": 1.0, "kl_coef": 0.02, "missing_eos_penalty": 0.0},
}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tunesmith.train(recipe(folder, "llama", "reward", "lora", max_steps=12, learning_rate=1e-2), out=folder / "rm")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_of_a_trained_reward_model_rises(reward_model, kind):
    """By three standard errors over three seeds, with a bounded KL divergence."""
    rises = []
    for seed in range(3):
        keys = made(
            reward_model, adaptation={"type": "lora", "r": 8}, num_generations=8, rollout_batch_size=8, max_new_tokens=8,
            rewards=[{"type": "model", "path": str(reward_model / "rm")}], **KINDS[kind],
            train={"batch_size": 32, "epochs": 12.0, "learning_rate": 1e-2, "lr_scheduler_type": "constant"},
        )  # fmt: skip
        out = reward_model / f"{kind}-{seed}"
        tunesmith.train({**keys, "seed": seed}, out=out)
        records = [record for record in history(out) if record["kind"] == "rollout"]
        before, after = (np.mean([one["reward"] for one in part]) for part in (records[:2], records[-2:]))
        error = np.mean([one["reward_std"] for one in records[:2] + records[-2:]]) / np.sqrt(2 * 64)
        rises.append((after - before) / (error * np.sqrt(2)))
        assert records[-1]["kl_per_answer"] < 20
    assert min(rises) > 0 and np.mean(rises) * np.sqrt(3) > 3, rises
