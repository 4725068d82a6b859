"""PPO through real runs on tiny models: what is invariant, what is measured, what is saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from tests import runs
from tests.rollout.completions import answered
from tests.rollout.sampling import made, rule
from tests.runs import apart, history, killed_before
from tests.shortened import shortened
from tests.tiny import tiny_model
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.models.fast import attention
from tunesmith.models.heads import lm_head, value_head
from tunesmith.models.network import base
from tunesmith.objectives import ppo
from tunesmith.report import run_page
from tunesmith.rollout.rewards import Rewards, Scored
from tunesmith.runs import metrics_file
from tunesmith.train import loop

ADAPTATIONS = {"full": "full", "lora": {"type": "lora", "r": 4}}
EVERY_STEP = {"save_steps": 1, "save_total_limit": 20}


@pytest.fixture(autouse=True)
def scored(monkeypatch):
    monkeypatch.setattr(Rewards, "score", rule)


def ppo_run(folder, name="llama", adaptation="full", train=(), **objective):
    return made(folder, name, adaptation, train=train, type="ppo", **objective)


def of_kind(run, kind):
    return [record for record in history(run) if record["kind"] == kind]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_before_the_first_update_the_policy_is_the_one_that_sampled(name, adaptation, temperature, tmp_path, monkeypatch):
    """In every iteration; prompts have unequal lengths. The KL divergence from itself is 0."""
    train_step, seen = loop.train_step, []

    def watched(job, step):
        if step.number % 4 == 1:
            with torch.no_grad():
                batch = step.collate(step.examples(), job.layout)
                arrays = job.objective.measure(job.model.eval(), batch)
            new = torch.cat([torch.from_numpy(one["old_logps"]) for one in arrays])
            seen.append(float(((new - batch["old_logps"]).exp() - 1).abs().max()))
        return train_step(job, step)

    monkeypatch.setattr(loop, "train_step", watched)
    tunesmith.train(ppo_run(tmp_path, name, ADAPTATIONS[adaptation], temperature=temperature, kl_coef=0.1), out=tmp_path / "run")
    assert len(seen) == 3 and max(seen) < 1e-5
    records = of_kind(tmp_path / "run", "rollout")
    assert records[0]["kl_per_answer"] == 0 and records[2]["kl_per_answer"] != 0
    assert all(record["sampler_mismatch"] < 1e-4 for record in records)
    first = [record for record in of_kind(tmp_path / "run", "train") if record["step"] % 4 == 1]
    assert all(abs(record["ratio"] - 1) < 1e-6 and record["approx_kl"] < 1e-10 for record in first)


def test_a_reward_model_on_the_same_base_is_a_second_adapter(tmp_path, monkeypatch):
    """The ratio is 1 next to it; reward and base keep every byte; after an error in it the policy's adapter is in use."""
    monkeypatch.undo()  # the model scores, no rule
    judge = tunesmith.train(runs.recipe(tmp_path, "llama", "reward", ADAPTATIONS["lora"], max_steps=2), out=tmp_path / "judge")
    recipe = ppo_run(tmp_path, adaptation=ADAPTATIONS["lora"], rewards=[{"type": "model", "path": judge["model_dir"]}])
    seen, train_step = [], loop.train_step

    def watched(job, step):
        frozen = {name: one.clone() for name, one in job.model.named_parameters() if not one.requires_grad}
        seen.append((job, frozen, job.model.active_adapters))
        return train_step(job, step)

    monkeypatch.setattr(loop, "train_step", watched)
    result = tunesmith.train(recipe, out=tmp_path / "run")
    first = [record for record in of_kind(tmp_path / "run", "train") if record["step"] % 4 == 1]
    assert all(abs(record["ratio"] - 1) < 1e-6 and record["approx_kl"] < 1e-10 for record in first)
    assert of_kind(tmp_path / "run", "rollout")[0]["kl_per_answer"] == 0
    job, before, active = seen[0]
    judges = [name for name in before if ".reward_" in name]
    assert judges and active == ["default"]
    now = dict(job.model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in before.items())
    assert not [name for name in adapter(tmp_path / "run") if "reward" in name]
    monkeypatch.setattr(lm_head, "outputs_at", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.objective.rewards.scorers[0]([answered("x")])
    assert job.model.active_adapters == ["default"] and result["steps"] == 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three iterations of four steps, with everything that is kept between iterations."""
    folder = tmp_path_factory.mktemp("whole")
    keys = dict(temperature=0.7, kl_coef=0.1, target_kl=0.01, horizon=100, reward_normalization="std", reward_clip=2.0)
    recipe = ppo_run(folder, adaptation=ADAPTATIONS["lora"], train=EVERY_STEP, **keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewards, "score", rule)
        tunesmith.train(recipe, out=folder / "run")
    return recipe, folder / "run"


def test_the_kl_coefficient_follows_its_target(whole):
    first, second, third = of_kind(whole[1], "rollout")
    assert first["kl_coef"] == 0.1 and first["kl_per_answer"] == 0
    assert second["kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 16 / 100)), "no divergence yet: the penalty shrinks"
    error = min(max(second["kl_per_answer"] / 0.01 - 1, -0.2), 0.2)
    assert third["kl_coef"] == pytest.approx(second["kl_coef"] * (1 + error * 16 / 100))


def test_a_run_logs_what_its_users_look_for(whole):
    record = of_kind(whole[1], "train")[5]
    assert {"policy_loss", "value_loss", "ratio", "clip_fraction", "approx_kl"} <= record.keys()
    record = of_kind(whole[1], "rollout")[2]
    names = {"reward", "reward_after_kl", "kl", "kl_per_answer", "kl_coef", "value", "explained_variance", "entropy", "stopped"}
    assert names <= record.keys()
    assert "zero_variance" not in record, "it compares no answers to one prompt"


PLOTS = (
    "Reward", "Reward/rule", "Reward after kl", "Kl", "Kl per answer", "Entropy", "Value loss", "Explained variance", "Clip fraction",
    "Ratio", "Approx kl", "Response length", "Stopped", "Seconds by phase", "Tokens per second by phase",
)  # fmt: skip


def test_the_report_plots_it_and_shows_the_answers_of_each_evaluation(tmp_path):
    recipe = ppo_run(tmp_path, train={"eval_steps": 4})
    recipe["data"]["eval"], recipe["samples"] = {"fraction": 0.25}, {"count": 1, "max_new_tokens": 2}
    tunesmith.train(recipe, out=tmp_path / "run")
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert [title for title in PLOTS if f">{title}<" not in html] == []
    times = run_page._read(tmp_path / "run").rollouts[1]
    phases = ("rollout", "scoring", "logps")
    assert all(times[f"{phase}_seconds"] > 0 and times[f"{phase}_tokens_per_second"] > 0 for phase in phases)
    assert of_kind(tmp_path / "run", "eval")[1]["eval_reward"] != 0
    answers = metrics_file.read(tmp_path / "run" / "samples.jsonl")
    assert [one["step"] for one in answers] == [0, 4, 8, 12] and all(f"step {one['step']}" in html for one in answers)


def adapter(run):
    return load_file(run / "model" / "adapter_model.safetensors")


def head(run):
    return load_file(run / "model" / value_head.FILE)


def test_the_value_head_is_trained_saved_and_continued(whole, tmp_path):
    recipe, run = whole
    trained = head(run)
    assert trained["weight"].any() and trained["bias"].any()
    seen = []

    def watched(model, folder=None):
        attach(model, folder)
        seen.append({name: value.clone() for name, value in value_head.find(model).state_dict().items()})

    attach = value_head.attach
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(value_head, "attach", watched)
        train = {name: value for name, value in recipe["train"].items() if name != "epochs"} | {"max_steps": 1}
        more = {**recipe, "model": str(run), "adapter": "continue", "train": train}
        more.pop("adaptation")
        tunesmith.train(more, out=tmp_path / "more")
    assert apart(seen[-1], trained) == 0, "the first head is the outline's"
    assert apart(head(tmp_path / "more"), trained) > 0


SPLITS = [{"micro_batch_tokens": 1}, {"packing": "off", "micro_batch_tokens": 90}]


@pytest.mark.parametrize("split", shortened(SPLITS, SPLITS[1:]))
def test_any_split_makes_the_same_update(split, tmp_path):
    recipe = ppo_run(
        tmp_path, adaptation=ADAPTATIONS["lora"], train={"learning_rate": 1e-3, "optim_args": {"eps": 1e-3}}, early_stop_kl=1.0
    )
    other = {**recipe, "train": {**recipe["train"], **split}}
    for name, one in {"whole": recipe, "split": other}.items():
        tunesmith.train(one, out=tmp_path / name)
    assert apart(adapter(tmp_path / "whole"), adapter(tmp_path / "split")) <= 1e-6
    assert apart(head(tmp_path / "whole"), head(tmp_path / "split")) <= 1e-6


def test_an_iteration_stops_once_the_policy_is_far_from_the_one_that_sampled(tmp_path):
    tunesmith.train(ppo_run(tmp_path, early_stop_kl=1e-9), out=tmp_path / "run")
    steps = [record["step"] for record in of_kind(tmp_path / "run", "train")]
    assert steps == [1, 2, 5, 6, 9, 10], "the second pass of each iteration is skipped"


@pytest.mark.parametrize("seeds", shortened([1, 3], [1]))
def test_the_reward_rises(seeds, tmp_path, monkeypatch):
    """Mean reward of the last iterations against the first: at least 3 standard errors of their difference."""
    monkeypatch.setattr(Rewards, "score", lambda self, answers: Scored(np.array([wanted(one) for one in answers]), {}))
    rises = []
    for seed in range(seeds):
        folder = tmp_path / str(seed)
        folder.mkdir()
        train = {"batch_size": 16, "learning_rate": 1e-2, "epochs": 6.0}
        keys = dict(
            num_generations=8, rollout_batch_size=8, update_epochs=4, max_new_tokens=4, temperature=1.0, missing_eos_penalty=0.0
        )
        tunesmith.train({**ppo_run(folder, train=train, **keys), "seed": seed}, out=folder / "run")
        records = of_kind(folder / "run", "rollout")
        before, after = (np.mean([one["reward"] for one in part]) for part in (records[:2], records[-4:]))
        error = np.mean([one["reward_std"] for one in records[:2] + records[-4:]]) / np.sqrt(64)
        rises.append((after - before) / (error * np.sqrt(2)))
        assert records[-1]["kl_per_answer"] < 20
    assert np.mean(rises) * np.sqrt(seeds) > 3 and min(rises) > 0, rises


def wanted(answer):
    """Share of tokens in the lower half of the vocabulary."""
    return float((np.array(answer.ids) < 256).mean())


def test_a_run_warns_once_and_names_the_key(tmp_path):
    """No answer of one token ends by itself here; a resumed run has the same records."""
    recipe = ppo_run(tmp_path, max_new_tokens=1, update_epochs=1, train=EVERY_STEP)
    tunesmith.train(recipe, out=tmp_path / "run")
    (warned,) = of_kind(tmp_path / "run", "warning")
    assert "objective.max_new_tokens" in warned["warning"]
    killed_before(4, recipe, tmp_path / "killed")
    tunesmith.train(recipe, out=tmp_path / "killed", resume=True)
    for record, again in zip(history(tmp_path / "run"), history(tmp_path / "killed"), strict=True):
        assert {**record, "sampler_mismatch": 0} == {**again, "sampler_mismatch": 0}  # the sampler's rounding


def sampled_batch(objective, layout):
    """Three answers with everything that an iteration measures, drawn at random."""
    generator = np.random.default_rng(0)
    examples = []
    for prompt, answer in ((5, 4), (2, 7), (9, 1)):
        ids = generator.integers(5, 500, prompt + answer).astype(np.int32)
        drawn = {name: generator.normal(0, 0.3, answer) for name in ("old_values", "advantages", "returns")}
        old = {"old_logps": generator.normal(-6.2, 0.3, answer)}
        examples.append({"input_ids": ids, "supervised": np.arange(len(ids)) >= prompt, **drawn, **old})
    return examples, objective.collate(examples, layout)


def loss_by_hand(model, examples, config):
    """The sums over tokens, from transformers' own forward of each row."""
    policy = value = entropy = 0.0
    for example in examples:
        ids = torch.from_numpy(example["input_ids"]).long()[None]
        out = model(input_ids=ids, output_hidden_states=True)
        targets = np.flatnonzero(example["supervised"])
        every = (out.logits[0, targets - 1] / config.temperature).log_softmax(-1)
        values = value_head.find(model)(out.hidden_states[-1][0, targets - 1])[:, 0]
        old, old_values, advantages, returns = (
            torch.from_numpy(example[name]) for name in ("old_logps", "old_values", "advantages", "returns")
        )
        ratio = (every[range(len(targets)), ids[0, targets]] - old).exp()
        policy += torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).sum()
        near = torch.max(torch.min(values, old_values + 0.2), old_values - 0.2)
        value += 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2).sum()
        entropy += -(every.exp() * every).sum()
    return policy + config.vf_coef * value - config.entropy_coef * entropy


@pytest.mark.parametrize("layout", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("plain", [False, True], ids=["blocked", "own logits"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_equals_transformers_forward(name, plain, layout):
    """In fp64, with an entropy bonus: loss and gradients of every weight, those of the value head included."""
    objective = ppo.Objective(ppo.Config(entropy_coef=0.3))
    model = tiny_model(name)
    value_head.attach(model)
    torch.nn.init.normal_(value_head.find(model).weight, generator=torch.Generator().manual_seed(0))
    model.double()
    examples, batch = sampled_batch(objective, layout)
    theirs = loss_by_hand(model, examples, objective.config)
    expected = torch.autograd.grad(theirs, list(model.parameters()))
    attention.register()
    base(model).set_attn_implementation(attention.NAME if layout.packed else "sdpa")
    lm_head.use_plain_head(model, plain)
    ours, metrics = objective.loss(model, batch)
    found = torch.autograd.grad(ours, list(model.parameters()))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-9) and objective.count(batch) == 12
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(found, expected, strict=True))
    assert {name: count for name, (_, count) in metrics.items()} == dict.fromkeys(metrics, 12)


def test_what_lies_in_the_padding_changes_nothing():
    """In loss and figures, and in what an iteration measures: log-probabilities, entropies and values."""
    objective = ppo.Objective(ppo.Config(entropy_coef=0.3))
    model = tiny_model("llama")
    value_head.attach(model)
    torch.nn.init.normal_(value_head.find(model).weight, generator=torch.Generator().manual_seed(0))
    _, batch = sampled_batch(objective, PADDED)
    inside = batch["attention_mask"].bool()
    filled = {**batch, "input_ids": torch.where(inside, batch["input_ids"], 77)}
    assert not inside.all()
    (one, figures), (other, others) = (objective.loss(model, each) for each in (batch, filled))
    assert one.item() == other.item() and str(figures) == str(others)
    for mine, theirs in zip(objective.measure(model, batch), objective.measure(model, filled), strict=True):
        assert all(np.array_equal(mine[name], theirs[name]) for name in ("old_logps", "entropies", "old_values"))


def test_the_value_loss_leaves_the_body_alone_where_asked():
    keys = {"vf_coef": 1.0, "value_stop_gradient": True}
    grads = []
    for returns in (0.0, 5.0):
        objective = ppo.Objective(ppo.Config(**keys))
        model = tiny_model("llama")
        value_head.attach(model)
        torch.nn.init.ones_(value_head.find(model).weight)
        _, batch = sampled_batch(objective, PADDED)
        loss, _ = objective.loss(model, {**batch, "returns": batch["returns"] + returns})
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    differing = {name for name in grads[0] if not torch.equal(grads[0][name], grads[1][name])}
    assert differing == {"value_head.weight", "value_head.bias"}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"target_kl": 6, "kl_coef": 0}, "target_kl adapts kl_coef, which is 0"),
        ({"horizon": 100}, "horizon does nothing without target_kl"),
        ({"early_stop_kl": 0.1, "update_epochs": 1}, "early_stop_kl skips passes after the first"),
    ],
)
def test_keys_that_do_nothing_are_errors(keys, problem):
    with pytest.raises(ValueError, match=problem):
        ppo.Config(**keys)
