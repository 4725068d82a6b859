"""A run whose reward model is a second adapter of the policy: the same rewards, its own files alone, and nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch

import tunesmith
from tests.rollout.sampling import made
from tests.runs import history, recipe, weights
from tunesmith.models.find.locate import locate
from tunesmith.rollout import reward_models

LORA = {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A reward model, and the same GRPO run with it attached and with a network of its own."""
    folder = tmp_path_factory.mktemp("attached")
    rm = folder / "rm"
    tunesmith.train(recipe(folder, "llama", "reward", "lora", max_steps=2), out=rm)
    files = {path.name: path.read_bytes() for path in (rm / "model").iterdir()}
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        open_model = reward_models.RewardModel.open

        def watched(self, run):
            open_model(self, run)
            opened.append(self)

        patch.setattr(reward_models.RewardModel, "open", watched)
        for name, share in (("shared", True), ("alone", False)):
            rewards = [{"type": "model", "path": str(rm), "share_base": share}, {"type": "final_stop"}]
            tunesmith.train(made(folder, adaptation=LORA, rewards=rewards), out=folder / name)
    assert files == {path.name: path.read_bytes() for path in (rm / "model").iterdir()}
    return folder, opened


def rollouts(run):
    return [record for record in history(run) if record["kind"] == "rollout"]


def test_the_rewards_are_those_of_a_separate_model(runs):
    folder, opened = runs
    assert {model.keys.share_base: model._attached is not None for model in opened} == {True: True, False: False}
    shared, alone = (rollouts(folder / name) for name in ("shared", "alone"))
    assert len(shared) == len(alone) == 3 and shared[0]["reward/rm"] != 0
    for one, other in zip(shared, alone, strict=True):
        assert one["reward/rm"] == pytest.approx(other["reward/rm"], abs=1e-5)
        assert one["reward"] == pytest.approx(one["reward/rm"] + one["reward/final_stop"], abs=1e-9)


def test_only_the_policys_adapter_is_saved_and_the_reward_model_is_unchanged(runs):
    folder, opened = runs
    for name in ("shared", "alone"):
        saved = weights(folder / name / "model")
        assert {key.rpartition(".lora_")[0].rpartition(".")[2] for key in saved} == {"q_proj", "v_proj"}
        config = json.loads((folder / name / "model" / "adapter_config.json").read_text())
        assert config["r"] == 2
    (attached,) = {id(one): one._attached for one in opened if one._attached is not None}.values()
    policy, stored = attached.run.model, weights(folder / "rm" / "model")
    assert policy.active_adapter == "default"
    for key, value in stored.items():
        layer, kind, _ = key.removeprefix("base_model.model.").rpartition(".lora_")
        if kind:
            factor = key.rpartition(".lora_")[2][0]
            held = policy.get_base_model().get_submodule(f"{layer}.lora_{factor}")[attached.name].weight
            assert torch.equal(held, value), key
    assert torch.equal(attached.head.weight, stored["base_model.model.score.weight"])
    assert locate(folder / "shared").base == locate(folder / "rm").base
