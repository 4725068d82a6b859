"""The source of sampled answers in the real loop: training uses exactly the answers that were sampled, scored and saved."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

import tunesmith
from tests.rollout.sampling import killed_in, made, measure_and_die, rule, sampled_by_resuming, score_by_rule
from tests.runs import apart, history, killed_before, weights
from tests.train import launching
from tunesmith.errors import DataError, RecipeError, RewardError, StaleRolloutError
from tunesmith.models.heads import log_probs
from tunesmith.objectives import grpo
from tunesmith.rollout import held_out, iteration_file, sampled_answers
from tunesmith.rollout.rewards import Rewards, Scored
from tunesmith.runs import run_list
from tunesmith.train import checkpoint, loop, setup
from tunesmith.train.session import RunSession

EVERY_STEP = {"save_steps": 1, "save_total_limit": 20}
PER_ITERATION = 4


@pytest.fixture(autouse=True)
def scored(monkeypatch):
    monkeypatch.setattr(Rewards, "score", rule)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three iterations of four steps, with the KL divergence in the loss."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewards, "score", rule)
        tunesmith.train(made(folder, beta=0.1, train=EVERY_STEP), out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def whole_ppo(tmp_path_factory):
    """The same of PPO, with everything that it keeps from one iteration to the next: (its recipe, its folder)."""
    folder = tmp_path_factory.mktemp("whole-ppo")
    keys = dict(temperature=0.7, kl_coef=0.1, target_kl=0.01, horizon=100, reward_normalization="std", reward_clip=2.0)
    recipe = made(folder, adaptation={"type": "lora", "r": 4}, train=EVERY_STEP, type="ppo", **keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewards, "score", rule)
        tunesmith.train(recipe, out=folder / "run")
    return recipe, folder / "run"


def rollouts_of(run):
    return [record for record in history(run) if record["kind"] == "rollout"]


def same(run, whole):
    assert history(run) == history(whole)
    assert apart(weights(run / "model"), weights(whole / "model")) == 0


def test_each_iteration_samples_scores_and_trains(whole):
    records = rollouts_of(whole)
    assert [record["step"] for record in records] == [1, 5, 9]
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert [record["step"] for record in history(whole) if record["kind"] == "train"] == list(range(1, 13))
    assert records[0]["kl_per_answer"] == 0 and records[2]["kl_per_answer"] > 0
    assert len({record["reward"] for record in records}) == 3


def test_a_checkpoint_holds_the_answers_of_its_iteration(whole):
    tensors, state = checkpoint.load(whole / "checkpoints", 6)
    kept = {name.removeprefix("source."): values for name, values in tensors.items() if name.startswith("source.")}
    answers = sampled_answers.load(kept, state["source"]["answers"])
    assert [answer.name for answer in answers] == [f"rollout:{4 + n // 4}:{n % 4}" for n in range(16)]
    assert [answer.reward for answer in answers] == rule(None, answers).total.tolist()
    for answer in answers:
        assert {name: len(values) for name, values in answer.tokens.items()} == dict.fromkeys(
            ("old_logps", "reference_logps", "advantages"), len(answer.ids)
        )
    assert state["source"]["iteration"] == 1 and state["source"]["next_prompt"] == 8


def test_a_pass_over_an_iteration_takes_every_answer_once(tmp_path, monkeypatch):
    seen, train_step = [], loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda job, step: seen.append(step.names()) or train_step(job, step))
    tunesmith.train(made(tmp_path, train={"max_steps": 4, "epochs": 1.0}), out=tmp_path / "run")
    passes = [seen[0] + seen[1], seen[2] + seen[3]]
    assert passes[0] != passes[1], "the order of the answers is drawn anew in each pass"
    for names in passes:
        assert sorted(names) == sorted(f"rollout:{prompt}:{sample}" for prompt in range(4) for sample in range(4))


def test_every_prompt_comes_once_in_an_epoch(tmp_path, monkeypatch):
    """Five prompts an iteration do not divide eight: the sixth of an epoch belongs to the next iteration."""
    asked, sample = [], RunSession.sample
    monkeypatch.setattr(RunSession, "sample", lambda self, requests: asked.extend(requests) or sample(self, requests))
    tunesmith.train(
        made(tmp_path, rollout_batch_size=5, num_generations=2, update_epochs=1, train={"batch_size": 10, "epochs": 2}),
        out=tmp_path / "run",
    )
    ids = [request.ids for request in asked if request.sample == 0]
    assert len(ids) == 20 and len(set(ids[:8])) == 8 and set(ids[8:16]) == set(ids[:8]) and ids[8:16] != ids[:8]
    assert [request.prompt for request in asked if request.sample == 0] == list(range(20))


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_stopped_run_goes_on_without_sampling_twice(whole, tmp_path, monkeypatch, step):
    """In the first pass over an iteration, right before the next one, and at the last step of one."""
    recipe = made(tmp_path, beta=0.1, train=EVERY_STEP)
    killed_before(step, recipe, tmp_path / "run")
    sampled, sample = [], RunSession.sample
    monkeypatch.setattr(RunSession, "sample", lambda self, requests: sampled.append(requests) or sample(self, requests))
    tunesmith.train(recipe, out=tmp_path / "run", resume=True)
    same(tmp_path / "run", whole)
    assert len(sampled) == 3 - -(-step // PER_ITERATION)


@pytest.mark.parametrize(("phase", "sampled"), {"rollout": 8, "scoring": 4, "measuring": 4, "update": 4}.items())
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_killed_process_goes_on_bit_for_bit_and_samples_nothing_twice(
    whole, whole_ppo, tmp_path, monkeypatch, kind, phase, sampled
):
    """SIGKILL in each phase of the second of three iterations of four prompts. No checkpoint holds that iteration's answers yet,
    but in "update"."""
    recipe, run = {"grpo": (made(tmp_path, beta=0.1, train=EVERY_STEP), whole), "ppo": whole_ppo}[kind]
    assert killed_in(phase, recipe, tmp_path / "run") == -signal.SIGKILL
    saved = {"update": 6}.get(phase, 4)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == saved
    again = sampled_by_resuming(recipe, tmp_path / "run", monkeypatch)
    assert again == list(range(12 - sampled, 12))
    same(tmp_path / "run", run)


def test_a_damaged_file_of_answers_costs_time_alone(whole, tmp_path, monkeypatch):
    recipe = made(tmp_path, beta=0.1, train=EVERY_STEP)
    assert killed_in("scoring", recipe, tmp_path / "run") == -signal.SIGKILL
    file = tmp_path / "run" / "checkpoints" / iteration_file.NAME
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert sampled_by_resuming(recipe, tmp_path / "run", monkeypatch) == list(range(4, 12))
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("iteration", [1, 2])
def test_a_reward_that_fails_costs_no_answer(whole, tmp_path, monkeypatch, iteration):
    """The answers are saved before the error is raised; the resumed run scores them and samples the next iteration only."""
    recipe, sampled, sample = made(tmp_path, beta=0.1, train=EVERY_STEP), [], RunSession.sample
    monkeypatch.setattr(RunSession, "sample", lambda self, requests: sampled.append(requests) or sample(self, requests))

    def fails(self, answers):
        if len(sampled) == iteration:
            raise RewardError("the reward failed")
        return rule(self, answers)

    monkeypatch.setattr(Rewards, "score", fails)
    with pytest.raises(RewardError, match="the reward failed"):
        tunesmith.train(recipe, out=tmp_path / "run")
    monkeypatch.setattr(Rewards, "score", rule)
    tunesmith.train(recipe, out=tmp_path / "run", resume=True)
    same(tmp_path / "run", whole)
    assert len(sampled) == 3


def test_a_reward_that_fails_in_the_measurement_of_the_time_costs_no_answer(tmp_path, monkeypatch):
    """Its answers are those of the first iteration: neither the resumed run nor the run after a measurement samples them again."""
    recipe = made(tmp_path, train={"max_minutes": 60})
    samples, sample = [], RunSession.sample
    monkeypatch.setattr(RunSession, "sample", lambda self, requests: samples.append(requests) or sample(self, requests))

    def fails(self, answers):
        raise RewardError("the reward failed")

    monkeypatch.setattr(Rewards, "score", fails)
    with pytest.raises(RewardError, match="The answers are saved: their scoring is repeated with --resume"):
        tunesmith.train(recipe, out=tmp_path / "run")
    assert run_list.read(tmp_path / "run").manifest["stopped"].startswith("RewardError: the reward failed")
    monkeypatch.setattr(Rewards, "score", rule)
    tunesmith.train(recipe, out=tmp_path / "run", resume=True)
    assert [len(requests) for requests in samples] == [16, 16, 16] and len(rollouts_of(tmp_path / "run")) == 3


@pytest.mark.parametrize("call", [3, 4], ids=["step 8", "the last step"])
def test_an_evaluation_in_which_a_reward_fails_is_made_by_the_resumed_run(evaluated, tmp_path, monkeypatch, call):
    """Nothing is trained or sampled twice, and an uncorrected reward fails again, in the same place."""
    recipe, straight = evaluated
    calls, answers_scored = [], held_out.score

    def fails(*arguments):
        calls.append(len(calls) + 1)
        if calls[-1] >= call:
            raise RewardError("the reward failed")
        return answers_scored(*arguments)

    monkeypatch.setattr(held_out, "score", fails)
    with pytest.raises(RewardError, match=r"the reward failed\n  The evaluation is repeated with --resume\."):
        tunesmith.train(recipe, out=tmp_path / "run")
    step = 4 * (call - 1)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == step
    with pytest.raises(RewardError, match="The evaluation is repeated with --resume"):
        tunesmith.train(recipe, out=tmp_path / "run", resume=True)
    assert [record["step"] for record in history(tmp_path / "run") if record["kind"] == "eval"] == list(range(0, step, 4))
    monkeypatch.setattr(held_out, "score", answers_scored)
    tunesmith.train(recipe, out=tmp_path / "run", resume=True)
    same(tmp_path / "run", straight)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An uninterrupted run with held-out prompts: (its recipe, its folder)."""
    folder = tmp_path_factory.mktemp("evaluated")
    recipe = made(folder, train={"eval_steps": 4, "save_steps": 1})
    recipe["data"]["eval"] = {"fraction": 0.25}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewards, "score", rule)
        tunesmith.train(recipe, out=folder / "run")
    return recipe, folder / "run"


def test_attempts_to_replace_prompts_are_counted_by_a_resumed_run(tmp_path, monkeypatch):
    """A reward that fails in the only second attempt: no prompt is replaced once more."""
    recipe = made(tmp_path, resample=1, train={"max_steps": 4, "epochs": 1.0})
    calls = []

    def useless(self, answers):
        calls.append(len(answers))
        if len(calls) == 2:
            raise RewardError("the reward failed")
        return Scored(np.zeros(len(answers)), {"rule": np.zeros(len(answers))})

    monkeypatch.setattr(Rewards, "score", useless)
    with pytest.raises(RewardError, match="The answers are saved: their scoring is repeated with --resume"):
        tunesmith.train(recipe, out=tmp_path / "run")
    tunesmith.train(recipe, out=tmp_path / "run", resume=True)
    assert calls == [16, 16, 16]
    (record,) = rollouts_of(tmp_path / "run")
    assert record["replaced"] == 4


def test_answers_of_other_weights_stop_the_run(tmp_path, monkeypatch):
    sample = RunSession.sample

    def stale(self, requests):
        answers = sample(self, requests)
        if requests[0].prompt:  # not in the first iteration
            with torch.no_grad():
                next(parameter for parameter in self.model.parameters() if parameter.requires_grad).mul_(1.001)
        return answers

    monkeypatch.setattr(RunSession, "sample", stale)
    with pytest.raises(StaleRolloutError, match=r"step 5: rollout:4:0 was sampled by other weights"):
        tunesmith.train(made(tmp_path, train=EVERY_STEP), out=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-4").is_dir()
    assert [record["step"] for record in history(tmp_path / "run") if record["kind"] == "train"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "temperature", "adaptation", "packing"),
    [
        ("llama", 0.7, "full", "auto"),
        ("gpt2", 0.7, {"type": "lora", "r": 4}, "auto"),
        ("gpt2", 1.0, "full", "off"),
        ("gemma", 1.0, {"type": "lora", "r": 4}, "off"),
    ],
)
def test_before_its_first_update_a_policy_is_the_one_that_sampled(tmp_path, monkeypatch, name, temperature, adaptation, packing):
    """Rotary and absolute positions, answers and prompts of mixed length, both layouts."""
    ratios, divergences, loss = {}, {}, grpo.Objective.loss
    train_step = loop.train_step

    def watched(self, model, batch):
        if model.training and "old_logps" in batch:
            with torch.no_grad():
                logps = log_probs.log_probs(model, batch, temperature)
            apart = float((torch.exp(logps - batch["old_logps"]) - 1).abs().max())
            ratios[number[0]] = max(ratios.get(number[0], 0.0), apart)
            divergences[number[0]] = float((logps - batch["reference_logps"]).abs().max())
        return loss(self, model, batch)

    number = [0]
    monkeypatch.setattr(loop, "train_step", lambda job, step: number.__setitem__(0, step.number) or train_step(job, step))
    monkeypatch.setattr(grpo.Objective, "loss", watched)
    recipe = made(
        tmp_path, name, adaptation, temperature=temperature, beta=0.1,
        train={"packing": packing, "micro_batch_tokens": 90, "learning_rate": 1e-2},
    )  # fmt: skip
    tunesmith.train(recipe, out=tmp_path / "run")
    assert all(ratios[step] < 1e-5 for step in (1, 5, 9)) and ratios[2] > 1e-3
    assert divergences[1] == 0 and divergences[9] > 1e-3
    assert all(record["sampler_mismatch"] < 1e-4 for record in rollouts_of(tmp_path / "run"))


def test_the_result_does_not_depend_on_the_micro_batches(whole, tmp_path):
    tunesmith.train(made(tmp_path, beta=0.1, train={"micro_batch_tokens": 40}), out=tmp_path / "run")
    assert apart(weights(tmp_path / "run" / "model"), weights(whole / "model")) < 1e-5


def test_two_killed_processes_go_on_bit_for_bit(whole_ppo, tmp_path):
    """And PPO in two processes is that of one."""
    recipe, alone = whole_ppo
    both, killed = tmp_path / "both", tmp_path / "killed"
    assert launching.forked(recipe, both, before=score_by_rule) == [0, 0]
    assert apart(weights(both / "model"), weights(alone / "model")) < 1e-5
    assert launching.forked(recipe, killed, before=measure_and_die) == [-signal.SIGKILL] * 2
    assert not [one for one in rollouts_of(killed) if one["iteration"] == 2]
    assert launching.forked(recipe, killed, before=score_by_rule, resume=True) == [0, 0]
    same(killed, both)


def test_two_processes_sample_and_train_as_one(whole, tmp_path):
    codes = launching.forked(made(tmp_path, beta=0.1), tmp_path / "run", before=score_by_rule)
    assert codes == [0, 0]
    assert apart(weights(tmp_path / "run" / "model"), weights(whole / "model")) < 1e-5
    ours, theirs = rollouts_of(tmp_path / "run"), rollouts_of(whole)
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("kind") == other.pop("kind")
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("keys", "batch_size", "expected"),
    [
        ({"rollout_batch_size": 3}, 8, "has 12 answers"),
        ({"rollout_batch_size": None}, 6, "set objective.rollout_batch_size"),
        ({"max_new_tokens": 512}, 8, "no token is left for the prompt"),
        ({"max_new_tokens": 500}, 8, "a prompt of at most 12 tokens"),
    ],
)
def test_sizes_that_do_not_fit_stop_before_the_weights_load(tmp_path, monkeypatch, keys, batch_size, expected):
    monkeypatch.setattr(setup, "build", lambda *args: pytest.fail("the weights were loaded"))
    with pytest.raises((RecipeError, DataError), match=expected):
        tunesmith.train(made(tmp_path, train={"batch_size": batch_size}, **keys), out=tmp_path / "run")


def test_prompts_whose_answers_all_score_the_same_are_replaced(tmp_path, monkeypatch):
    """All answers to a prompt with an even index score the same. Two more prompts are drawn, and one of them is useless again."""

    def even(self, answers):
        parts = [one.name.split(":") for one in answers]
        total = np.array([float(sample) * (int(place) % 2) for _, place, sample in parts])
        return Scored(total, {"even": total})

    monkeypatch.setattr(Rewards, "score", even)
    found = {}
    finish = grpo.Objective.finish

    def kept(self, answers):
        found[len(found)] = [one.place for one in answers if one.sample == 0]
        return finish(self, answers)

    monkeypatch.setattr(grpo.Objective, "finish", kept)
    tunesmith.train(made(tmp_path, resample=1, train={"max_steps": 8, "epochs": 1.0}), out=tmp_path / "run")
    assert found == {0: [1, 3, 4, 5], 1: [7, 9, 10, 11]}
    (first, second) = rollouts_of(tmp_path / "run")
    assert first["zero_variance"] == second["zero_variance"] == pytest.approx(3 / 6) and first["replaced"] == 2
    assert first["reward"] == pytest.approx(np.mean([0.0] * 12 + [0, 1, 2, 3] * 3))
