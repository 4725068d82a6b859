"""An update that overflows stops the run before anything of it is saved or evaluated."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tests.runs import recipe
from tunesmith.errors import ModelError, NonFiniteError
from tunesmith.train import checkpoint, evaluation, master_weights
from tunesmith.train.update import Update


@pytest.fixture
def overflows(monkeypatch):
    """Let the update of a step overflow in one tensor: in the masters, or only in the working copies."""
    apply = Update.apply

    def at(step, copies=False):
        def overflowing(self, number):
            apply(self, number)
            if number == step:
                weights = self.masters.parameters if copies else self.masters.masters
                with torch.no_grad():
                    next(iter(weights.values())).view(-1)[:3] = math.inf

        monkeypatch.setattr(Update, "apply", overflowing)

    return at


def assert_stopped(run, made, told, steps):
    with pytest.raises(NonFiniteError, match=told) as caught:
        tunesmith.train(made, out=run)
    assert caught.value.exit_code == 3
    assert checkpoint.steps(run / "checkpoints") == steps
    manifest = json.loads((run / "manifest.json").read_text())
    assert "NonFiniteError" in manifest["stopped"] and "result" not in manifest
    return str(caught.value)


WEIGHTS = r"step 3: the update overflowed: \d+ of \d+ tensors hold values that are not finite \(\S+: 3 of [\d,]+ values"


@pytest.mark.parametrize("adaptation", ["full", {"type": "lora", "r": 2}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_last_update_is_not_saved(precision, adaptation, overflows, tmp_path):
    overflows(3)
    made = recipe(tmp_path, adaptation=adaptation, max_steps=3, save_steps=2, precision=precision)
    said = assert_stopped(tmp_path / "run", made, WEIGHTS, [2])
    assert f"The last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-2'}." in said
    assert not (tmp_path / "run" / "model").exists()


def test_it_is_not_evaluated_and_the_best_model_stays(overflows, tmp_path):
    overflows(3)
    made = recipe(tmp_path, max_steps=3, eval_steps=1)
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl"), "limit": 2}
    said = assert_stopped(tmp_path / "run", made, WEIGHTS, [])
    assert "There is no checkpoint yet" in said
    evaluated = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"eval"' in line
    ]
    assert evaluated == [0, 1, 2]
    model, _ = tunesmith.load(tmp_path / "run" / "model")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_working_copies_that_overflow_are_not_evaluated(overflows, tmp_path):
    """As in fp16: the masters are finite, and what is evaluated is not."""
    overflows(3, copies=True)
    made = recipe(tmp_path, max_steps=3, eval_steps=3, precision="bf16")
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl"), "limit": 2}
    assert_stopped(tmp_path / "run", made, WEIGHTS, [])


def test_an_overflow_between_two_saves_is_named_by_the_next_step(overflows, tmp_path):
    """Every row has a loss of NaN then: the rows are not the cause."""
    overflows(2)
    made = recipe(tmp_path, max_steps=4, save_steps=None)
    told = r"step 3: the loss is nan, because the weights are not finite: \d+ of \d+ tensors"
    assert "rows.jsonl" not in assert_stopped(tmp_path / "run", made, told, [])


def test_a_base_model_that_is_not_finite_is_named_before_the_first_step(tmp_path):
    made = recipe(tmp_path, max_steps=1)
    file = tmp_path / "model-llama" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model-llama cannot be used: 1 of \d+ tensors .*model.norm.weight: 1 of 32 values"):
        tunesmith.train(made, out=tmp_path / "run")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_whose_every_evaluation_is_not_finite_is_not_saved(value, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "measure", lambda *args, **options: ({"eval_loss": value, "perplexity": value}, []))
    made = recipe(tmp_path, max_steps=2, eval_steps=1)
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl"), "limit": 2}
    said = assert_stopped(tmp_path / "run", made, "the loss of every evaluation after the first step is not finite", [2])
    assert "step-2" in said and not (tmp_path / "run" / "model").exists()


def test_the_state_of_the_optimiser_is_checked_too(tmp_path, monkeypatch):
    step = master_weights.Masters.step

    def overflowing(self, optimizer, seed, number):
        step(self, optimizer, seed, number)
        if number == 3:
            next(iter(optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = math.inf

    monkeypatch.setattr(master_weights.Masters, "step", overflowing)
    made = recipe(tmp_path, max_steps=3, save_steps=1)
    assert_stopped(tmp_path / "run", made, r"optimizer\.\S+\.exp_avg_sq: 1 of", [1, 2])
