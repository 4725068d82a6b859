"""A run whose reward model is a second adapter of the policy: the same rewards, its own files alone, and nothing else changes."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from tests.rollout.completions import answered
from tests.rollout.sampling import made
from tests.runs import history, recipe, weights
from tunesmith.models.find.locate import locate
from tunesmith.rollout import reward_adapter, reward_models
from tunesmith.runs import run_folder
from tunesmith.train import weights_at_start

LORA = {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}


KINDS = {"grpo": {"beta": 0.1}, "ppo": {"type": "ppo", "update_epochs": 2}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A reward model, and the same runs with it attached ("shared") and with a network of its own ("alone"): (folder, what each run
    made of the reward model and of the weights at its start)."""
    folder = tmp_path_factory.mktemp("attached")
    rm = folder / "rm"
    tunesmith.train(recipe(folder, "llama", "reward", "lora", max_steps=2), out=rm)
    files = {path.name: path.read_bytes() for path in (rm / "model").iterdir()}
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        open_model, keep = reward_models.RewardModel.open, weights_at_start.WeightsAtStart.__init__

        def watched(self, run):
            open_model(self, run)
            now["reward"] = self

        def kept(self, parameters):
            keep(self, parameters)
            now["start"], now["bytes"] = self, {name: digest(value) for name, value in self._kept.items()}

        patch.setattr(reward_models.RewardModel, "open", watched)
        patch.setattr(weights_at_start.WeightsAtStart, "__init__", kept)
        for (kind, keys), (name, share) in product(KINDS.items(), (("shared", True), ("alone", False))):
            rewards = [{"type": "model", "path": str(rm), "share_base": share}, {"type": "final_stop"}]
            now = seen[kind, name] = {}
            tunesmith.train(made(folder, adaptation=LORA, rewards=rewards, **keys), out=folder / f"{kind}-{name}")
    assert files == {path.name: path.read_bytes() for path in (rm / "model").iterdir()}
    return folder, seen


def digest(tensor):
    return tensor.detach().numpy().tobytes()


def rollouts(run):
    return [record for record in history(run) if record["kind"] == "rollout"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rewards_are_those_of_a_separate_model(runs, kind):
    folder, seen = runs
    assert [seen[kind, name]["reward"]._attached is not None for name in ("shared", "alone")] == [True, False]
    shared, alone = (rollouts(folder / f"{kind}-{name}") for name in ("shared", "alone"))
    assert len(shared) == len(alone) == 3 and shared[0]["reward/rm"] != 0
    for one, other in zip(shared, alone, strict=True):
        assert one["reward/rm"] == pytest.approx(other["reward/rm"], abs=1e-5)
        assert one["reward"] == pytest.approx(one["reward/rm"] + one["reward/final_stop"], abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["shared", "alone"])
def test_reward_model_and_reference_keep_every_byte(runs, kind, name):
    """Against the saved reward model, and against the copy that the run made before its first step."""
    folder, seen = runs
    reward, start = seen[kind, name]["reward"], seen[kind, name]["start"]
    assert {key: digest(value) for key, value in start._kept.items()} == seen[kind, name]["bytes"] != {}
    stored = weights(folder / "rm" / "model")
    if name == "alone":
        fresh = reward._loaded(torch.device("cpu")).state_dict()
        held = reward._network.state_dict()
        unused = {key for key in fresh if ".original_module." in key}  # peft draws it at random
        assert held.keys() == fresh.keys() and all(digest(held[key]) == digest(fresh[key]) for key in fresh.keys() - unused)
        return
    policy, compared = reward._attached.run.model, 0
    assert policy.active_adapter == "default"
    for key, value in stored.items():
        layer, kind_of, _ = key.removeprefix("base_model.model.").rpartition(".lora_")
        if kind_of:
            factor = key.rpartition(".lora_")[2][0]
            held = policy.get_base_model().get_submodule(f"{layer}.lora_{factor}")[reward._attached.name].weight
            assert digest(held) == digest(value), key
            compared += 1
    assert compared and digest(reward._attached.head.weight) == digest(stored["base_model.model.score.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_policys_adapter_is_saved(runs, kind):
    folder, _ = runs
    for name in ("shared", "alone"):
        saved = load_file(folder / f"{kind}-{name}" / "model" / "adapter_model.safetensors")
        assert {key.rpartition(".lora_")[0].rpartition(".")[2] for key in saved} == {"q_proj", "v_proj"}
        config = json.loads((folder / f"{kind}-{name}" / "model" / "adapter_config.json").read_text())
        assert config["r"] == 2
    assert locate(folder / f"{kind}-shared").base == locate(folder / "rm").base


def test_the_run_reports_whether_the_reward_model_is_attached_and_why_not(runs):
    folder, _ = runs
    shared, alone = (run_folder.read_mapping(folder / f"grpo-{name}" / "manifest.json")["notes"] for name in ("shared", "alone"))
    adapter = sum(value.numel() for value in load_file(locate(folder / "rm").path / "adapter_model.safetensors").values())
    whole = adapter + sum(value.numel() for value in load_file(locate(folder / "rm").base / "model.safetensors").values())
    name = f"reward model {folder / 'rm'}: "
    assert (
        f"{name}attached to the policy's network as a second adapter; {4 * adapter / 1e6:,.2f} MB ({adapter:,} parameters)"
        in shared
    )
    assert (
        f"{name}loaded as a second network, because share_base is false; {4 * whole / 1e6:,.2f} MB ({whole:,} parameters)"
        in alone
    )


class Failure(Exception):
    """An error that only these tests raise."""


def test_after_an_error_in_a_scoring_or_reference_pass_the_policy_is_in_use(runs, monkeypatch):
    _, seen = runs
    reward, start = seen["ppo", "shared"]["reward"], seen["ppo", "shared"]["start"]
    policy = reward._attached.run.model
    before = {name: digest(value) for name, value in policy.named_parameters()}
    with pytest.raises(Failure), start.installed():
        assert {digest(value) for value in start._parameters.values()} == {*seen["ppo", "shared"]["bytes"].values()}
        raise Failure
    assert {name: digest(value) for name, value in policy.named_parameters()} == before

    def fails(*arguments):
        assert policy.active_adapter == reward._attached.name
        raise Failure

    monkeypatch.setattr(reward_adapter.lm_head, "outputs_at", fails)
    with pytest.raises(Failure):
        reward([answered("x")])
    assert policy.active_adapter == "default"
    assert {name: digest(value) for name, value in policy.named_parameters()} == before
    assert all(value.requires_grad for value in start._parameters.values())
