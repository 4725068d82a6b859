import math

import pytest

import tunesmith
from tests.runs import apart, history, recipe, weights
from tunesmith.errors import NonFiniteError, RecipeError
from tunesmith.runs import metrics_file


def with_evaluation(folder, **train):
    made = recipe(folder, **{"eval_steps": 2.0, "save_steps": 2.0, "max_steps": 6, **train})
    made["data"]["eval"] = {"fraction": 0.25}
    return made


def test_every_record_and_every_checkpoint_is_handed_over(tmp_path):
    logs, evaluations, saves = [], [], []
    tunesmith.train(
        with_evaluation(tmp_path), out=tmp_path / "run", on_log=logs.append, on_eval=evaluations.append,
        on_save=lambda *given: saves.append(given),
    )  # fmt: skip
    written = metrics_file.read(tmp_path / "run" / "metrics.jsonl")
    assert logs == [one for one in written if one["kind"] == "train"]
    assert evaluations == [one for one in written if one["kind"] == "eval"]
    assert saves == [(tmp_path / "run" / "checkpoints" / f"step-{step}", step) for step in (2, 4, 6)]
    assert saves[-1][0].is_dir()


def test_what_a_function_does_to_its_record_stays_its_own_business(tmp_path):
    tunesmith.train(recipe(tmp_path), out=tmp_path / "run", on_log=lambda record: record.clear())
    assert [one["step"] for one in history(tmp_path / "run")] == [1, 2, 3, 4]


def test_true_of_a_save_ends_the_run_with_that_save(tmp_path):
    result = tunesmith.train(with_evaluation(tmp_path), out=tmp_path / "run", on_save=lambda folder, step: step == 2)
    assert (result["steps"], result["stopped"]) == (2, "on_save returned True")


def test_true_at_step_0_trains_nothing_and_leaves_a_model(tmp_path):
    result = tunesmith.train(with_evaluation(tmp_path), out=tmp_path / "run", on_eval=lambda record: True)
    assert (result["steps"], result["stopped"]) == (0, "on_eval returned True")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["on_log", "on_eval"])
def test_true_ends_the_run_after_its_step_with_a_model_that_was_evaluated(tmp_path, name):
    result = tunesmith.train(with_evaluation(tmp_path), out=tmp_path / "run", **{name: lambda record: record["step"] >= 3})
    step = 3 if name == "on_log" else 4
    assert (result["steps"], result["stopped"]) == (step, f"{name} returned True")
    assert [one["step"] for one in history(tmp_path / "run") if one["kind"] == "eval"][-1] == step
    assert (tmp_path / "run" / "checkpoints" / f"step-{step}").is_dir()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_what_is_no_function_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(RecipeError, match="on_log: expected a function, got 3"):
        tunesmith.train(recipe(tmp_path), out=tmp_path / "run", on_log=3)


def test_only_true_ends_a_run(tmp_path):
    assert tunesmith.train(recipe(tmp_path), out=tmp_path / "run", on_log=lambda record: "yes")["steps"] == 4


@pytest.mark.parametrize("name", ["on_log", "on_eval", "on_save"])
def test_what_a_function_raises_reaches_the_caller_and_the_run_goes_on_bit_for_bit(tmp_path, name):
    made = with_evaluation(tmp_path)
    tunesmith.train(made, out=tmp_path / "whole")

    def fails(first, *rest):
        step = rest[0] if rest else first["step"]
        if step >= 3:
            raise KeyError("my own mistake")

    with pytest.raises(KeyError, match="my own mistake") as error:
        tunesmith.train(made, out=tmp_path / "run", **{name: fails})
    assert name in error.value.__notes__[0]
    assert error.traceback[-1].name == "fails"
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert apart(weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model")) == 0


def test_a_function_that_fails_at_step_0_stops_before_training(tmp_path):
    def fails(record):
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        tunesmith.train(with_evaluation(tmp_path), out=tmp_path / "run", on_eval=fails)
    assert [one["step"] for one in history(tmp_path / "run")] == [0]


def test_a_function_that_fails_at_the_last_step_costs_nothing(tmp_path):
    def fails(folder, step):
        raise ValueError("too late")

    with pytest.raises(ValueError, match="too late"):
        tunesmith.train(recipe(tmp_path), out=tmp_path / "run", on_save=fails)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


def test_on_log_gets_a_loss_that_is_not_finite_before_the_run_stops(tmp_path):
    seen = []
    made = recipe(tmp_path, learning_rate=1e30, max_grad_norm=0.0, optim="sgd", optim_args={})
    with pytest.raises(NonFiniteError):
        tunesmith.train(made, out=tmp_path / "run", on_log=seen.append)
    assert seen[-1]["kind"] == "stop" and not math.isfinite(seen[-1]["grad_norm"])
