import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.runs import overfit


def records(evaluations, stderr=0.02, train=lambda step: 2 * math.exp(-step / 60), every=10):
    """Evaluations every ten steps from step 0 on, and a training record for each step."""
    found = []
    for index, loss in enumerate(evaluations):
        error = {} if stderr is None else {"eval_loss_stderr": stderr}
        found.append({"kind": "eval", "step": index * every, "eval_loss": loss, **error})
        if index < len(evaluations) - 1:
            found += [{"kind": "train", "step": index * every + k, "loss": train(index * every + k)} for k in range(1, every + 1)]
    return found


def test_a_turn_is_named_by_the_step_of_the_lowest_evaluation():
    found = overfit.detect(records([2.0, 1.6, 1.5, 1.58, 1.7]))
    assert found is not None
    assert (found.step, found.eval_loss, found.last_step, found.last_eval_loss) == (20, 1.5, 40, 1.7)
    assert found.last_train_loss < found.train_loss
    assert "turned at step 20" in found.text and "the model of step 20 is kept" in found.text


@pytest.mark.parametrize(
    ("why", "evaluations"),
    [
        ("still falling", [2.0, 1.8, 1.7, 1.6]),
        ("one rise only", [2.0, 1.6, 1.5, 1.7]),
        ("rises within the standard error", [2.0, 1.6, 1.5, 1.515, 1.519]),
        ("came down again", [2.0, 1.6, 1.5, 1.7, 1.51]),
        ("two evaluations", [2.0, 2.5]),
        ("none", []),
    ],
)
def test_it_is_silent_when(why, evaluations):
    assert overfit.detect(records(evaluations)) is None


def test_a_run_whose_training_loss_rose_too_is_not_overfit():
    assert overfit.detect(records([2.0, 1.6, 1.5, 1.7, 1.9], train=lambda step: 1 + step / 50)) is None


def test_without_a_standard_error_nothing_is_reported():
    assert overfit.detect(records([2.0, 1.6, 1.5, 1.7, 1.9], stderr=None)) is None
    assert overfit.detect(records([2.0, 1.6, 1.5, 1.7, 1.9], stderr=math.nan)) is None


def test_a_run_whose_loss_only_rose_reports_that_no_model_is_better():
    found = overfit.detect(records([1.5, 1.6, 1.8]))
    assert found is not None and found.step == 0 and "no trained model is better" in found.text


def test_evaluations_that_are_not_finite_are_passed_over():
    found = overfit.detect(records([2.0, 1.6, 1.5, math.nan, 1.7, math.inf, 1.9]))
    assert found is not None and found.step == 20


anything = st.sampled_from(["eval", "train", "1", None, True, math.nan, math.inf]) | st.floats(-5, 5)


@given(st.lists(st.dictionaries(st.sampled_from(["kind", "step", "loss", "eval_loss", "eval_loss_stderr"]), anything)))
def test_records_of_any_shape_do_no_harm(found):
    overfit.detect(found)


@given(
    st.integers(3, 40),
    st.floats(0.01, 2),
    st.floats(0.5, 20),
    st.floats(0, 0.1),
)
def test_a_curve_that_only_falls_never_alarms(count, fall, pace, stderr):
    assert overfit.detect(records([1 + fall * math.exp(-n / pace) for n in range(count)], stderr)) is None


def alarms(count, jitter, trials=400):
    """The share of falling, then flat, noisy curves that raise the alarm; ``jitter`` in standard errors of an evaluation."""
    draw, said = np.random.default_rng(0), 0
    for _ in range(trials):
        curve = 1.5 + 0.3 * np.exp(-np.arange(count) / (count / 10)) + 0.02 * jitter * draw.standard_normal(count)
        train = {step: 1.4 * math.exp(-step / 300) + 0.1 * draw.standard_normal() for step in range(10 * count)}
        said += overfit.detect(records(curve.tolist(), train=train.__getitem__)) is not None
    return said / trials


@pytest.mark.parametrize(("count", "jitter"), [(3, 0.3), (5, 0.3), (7, 0.3), (8, 1.0), (12, 1.0), (30, 1.0)])
def test_false_alarms_on_noisy_falling_curves_are_rare(count, jitter):
    assert alarms(count, jitter) < 0.015


@pytest.mark.parametrize("count", [4, 6, 10, 20])
def test_a_clear_rise_is_found(count):
    """A rise of five standard errors after a third of the run, with jitter."""
    draw, said = np.random.default_rng(1), 0
    for _ in range(100):
        x = np.arange(count) / (count - 1)
        curve = np.where(x < 1 / 3, 1.5 + 1.5 * (1 / 3 - x), 1.5 + 0.15 * (x - 1 / 3)) + 0.006 * draw.standard_normal(count)
        said += overfit.detect(records(curve.tolist())) is not None
    assert said >= 98
