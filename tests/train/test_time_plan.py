"""A run that ends in time: steps are chosen once, from a measurement that changes nothing of the run."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunesmith
from tests.rollout.sampling import made as made_of_prompts
from tests.runs import apart, history, killed_before, recipe, weights
from tunesmith.data.batch.step import Plan
from tunesmith.errors import RecipeError
from tunesmith.runs import run_folder
from tunesmith.train import forecast, reproduce, time_plan
from tunesmith.train import run as run_module
from tunesmith.train.forecast import PLANNED_SHARE, Costs
from tunesmith.train.train_config import TrainConfig, due, times

COSTS = Costs(step=10, first_extra=1, evaluation=2, model=1, checkpoint=1, reference=0, reference_steps=9, seconds=3)


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


def measured(monkeypatch, costs=COSTS):
    """Every run is measured to cost ``costs``, and no time is over yet. Returns how often it was measured."""
    calls = []
    monkeypatch.setattr(forecast, "measure", lambda *given: calls.append(1) or costs)
    monkeypatch.setattr(time_plan, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: 0.0, time=lambda: 0.0))
    return calls


def fails(*given):
    raise AssertionError("the run was measured again")


@pytest.mark.parametrize(
    ("adaptation", "precision"), [("full", "bf16"), ("full", "fp32"), ({"type": "lora", "r": 4, "lora_dropout": 0.2}, "bf16")]
)
def test_the_measured_steps_change_nothing(tmp_path, monkeypatch, adaptation, precision):
    made = recipe(tmp_path, adaptation=adaptation, precision=precision, max_steps=3, lr_scheduler_type="linear")
    plain = tunesmith.train(made, out=tmp_path / "plain")
    made["train"] |= {"max_minutes": 5, "max_steps": 7}
    monkeypatch.setattr(Costs, "most_steps", lambda self, ready, seconds: 3)
    timed = tunesmith.train(made, out=tmp_path / "timed")
    assert history(tmp_path / "timed") == history(tmp_path / "plain") and timed["steps"] == 3
    assert apart(weights(plain["model_dir"]), weights(timed["model_dir"])) == 0
    assert manifest(tmp_path / "timed")["time_plan"]["measured"]["step"] > 0


@pytest.mark.parametrize("adaptation", ["full", {"type": "lora", "r": 4}])
def test_the_measured_iteration_changes_nothing(tmp_path, monkeypatch, adaptation):
    """A policy samples, scores and takes the steps of an iteration; what adapts from one to the next begins anew."""
    keys = dict(type="ppo", kl_coef=0.1, target_kl=0.01, horizon=100, reward_normalization="std")
    short, timed = (
        {"epochs": 1.0, "max_steps": 8, "precision": "bf16", **more} for more in ({}, {"max_steps": 12, "max_minutes": 5})
    )
    plain = tunesmith.train(made_of_prompts(tmp_path, adaptation=adaptation, train=short, **keys), out=tmp_path / "plain")
    monkeypatch.setattr(Costs, "most_steps", lambda self, ready, seconds: 8)
    found = tunesmith.train(made_of_prompts(tmp_path, adaptation=adaptation, train=timed, **keys), out=tmp_path / "timed")
    assert history(tmp_path / "timed") == history(tmp_path / "plain") and found["steps"] == 8
    assert len({record["kl_coef"] for record in history(tmp_path / "plain") if record["kind"] == "rollout"}) == 2
    assert apart(weights(plain["model_dir"]), weights(found["model_dir"])) == 0
    assert manifest(tmp_path / "timed")["time_plan"]["measured"]["step"] > 0


def test_a_preference_run_computes_the_reference_of_its_steps_alone(tmp_path, monkeypatch):
    made = recipe(tmp_path, objective="dpo", adaptation={"type": "lora", "r": 4}, count=20, max_steps=2)
    tunesmith.train(made, out=tmp_path / "plain")
    made["train"] |= {"max_minutes": 5, "max_steps": None}
    monkeypatch.setattr(Costs, "most_steps", lambda self, ready, seconds: 2)
    tunesmith.train(made, out=tmp_path / "timed")
    assert history(tmp_path / "timed") == history(tmp_path / "plain")
    assert any("10 rows" in note for note in manifest(tmp_path / "timed")["notes"] if "reference" in note)


def test_the_plan_is_printed_recorded_and_kept_when_resumed_and_reproduced(tmp_path, monkeypatch):
    made = recipe(tmp_path, max_steps=None, epochs=9, max_minutes=1, save_steps=2, lr_scheduler_type="cosine")
    measured(monkeypatch)
    tunesmith.train(made, out=tmp_path / "straight")
    kept = manifest(tmp_path / "straight")
    left = 60 * PLANNED_SHARE
    assert kept["time_plan"]["steps"] == kept["steps"] == kept["result"]["steps"] == int((left - 1 - 1 - 3) / 10)
    (line,) = [note for note in kept["notes"] if "max_minutes" in note]
    assert line.startswith("train.max_minutes 1: 5 of 27 steps, because a step takes 10.00 s")
    killed_before(4, made, tmp_path / "run")
    monkeypatch.setattr(forecast, "measure", fails)
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert history(tmp_path / "run") == history(tmp_path / "straight")
    assert apart(weights(tmp_path / "run" / "model"), weights(tmp_path / "straight" / "model")) == 0
    found = reproduce.reproduce(tmp_path / "straight")
    assert found["equal"] and manifest(tmp_path / "straight-again")["steps"] == 5


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"epochs": 0.5}])
def test_a_shorter_run_stays_short(tmp_path, monkeypatch, length):
    made = recipe(tmp_path, **{"max_steps": None, "max_minutes": 9, **length})
    measured(monkeypatch)
    assert tunesmith.train(made, out=tmp_path / "run")["steps"] == 2
    assert any(note.startswith("train.max_minutes 9: all 2 steps fit") for note in manifest(tmp_path / "run")["notes"])


def test_a_time_that_is_too_short_takes_one_step_and_warns(tmp_path, monkeypatch):
    made = recipe(tmp_path, max_minutes=0.1)
    measured(monkeypatch)
    assert tunesmith.train(made, out=tmp_path / "run")["steps"] == 1
    (line,) = [note for note in manifest(tmp_path / "run")["notes"] if "max_minutes" in note]
    assert line.startswith("warning: ") and line.endswith("later than asked for")


def test_every_process_takes_the_steps_of_the_main_one(tmp_path, monkeypatch):
    measured(monkeypatch)
    monkeypatch.setattr(time_plan, "distributed", SimpleNamespace(broadcast=lambda value: 2))
    made = recipe(tmp_path, max_steps=None, epochs=9, max_minutes=1)
    assert tunesmith.train(made, out=tmp_path / "run")["steps"] == 2


def test_seconds_before_the_start_count(tmp_path, monkeypatch):
    measured(monkeypatch)
    made = recipe(tmp_path, max_steps=None, epochs=9, max_minutes=1)
    assert tunesmith.train(made, out=tmp_path / "run", spent=20.0)["steps"] == 3


def test_it_is_refused_where_the_steps_cannot_be_taken_back(tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"not supported with train\.max_minutes"):
        tunesmith.train(recipe(tmp_path, max_minutes=1), out=tmp_path / "run", deepspeed=tmp_path / "ds.json")


def test_a_check_reports_what_is_not_known_yet(tmp_path):
    facts = tunesmith.check(recipe(tmp_path, max_minutes=2))
    assert any("at most 4 steps" in note for note in facts["notes"])


EVERY = st.one_of(st.none(), st.just("epoch"), st.integers(1, 30).map(float), st.floats(0.01, 0.99))


@given(EVERY, st.integers(1, 60), st.integers(1, 20))
def test_times_counts_what_is_due(every, steps, per_epoch):
    counted = sum(step == steps or due(every, step, steps, per_epoch) for step in range(1, steps + 1))
    assert times(every, steps, per_epoch) == counted


@given(st.floats(0.1, 20), st.floats(0, 20), EVERY, EVERY, st.integers(1, 300), st.floats(1, 900), st.integers(1, 8))
def test_the_steps_fill_the_time_with_whole_iterations(step, evaluation, eval_steps, save_steps, most, seconds, together):
    train = TrainConfig(eval_steps=eval_steps, save_steps=save_steps)
    plan = Plan(most, 17, together)
    ready = SimpleNamespace(recipe=SimpleNamespace(train=train), source=SimpleNamespace(plan=plan), data=SimpleNamespace(eval=[]))
    costs = dataclasses.replace(COSTS, step=step, evaluation=evaluation)
    steps = costs.most_steps(ready, seconds)
    assert 1 <= steps <= most and (steps == most or steps % together == 0)
    first = min(together, most)
    assert steps == first or costs.total(ready, -(-steps // together) * together) <= seconds
    assert steps == most or costs.total(ready, steps + together) > seconds


def test_a_recorded_plan_is_that_of_a_resumed_run_alone(tmp_path):
    folder = run_folder.RunFolder(tmp_path, start="resume")
    folder.record(time_plan={"steps": 5})
    assert time_plan.recorded_steps(folder) == 5
    assert time_plan.recorded_steps(dataclasses.replace(folder, start="restart")) is None
