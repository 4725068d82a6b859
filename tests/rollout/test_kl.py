"""Estimators of the KL divergence against its exact value, and the adaptive coefficient."""

import pytest
import torch

from tunesmith.rollout import kl

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.4, 0.25, 0.25, 0.1], dtype=torch.float64)
EXACT = float((P * (P / Q).log()).sum())


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_the_unbiased_estimators_have_the_divergence_as_their_mean(name):
    assert float((P * kl.ESTIMATORS[name]((P / Q).log())).sum()) == pytest.approx(EXACT, abs=1e-12)


def test_the_others_are_never_negative_and_zero_for_equal_policies():
    ratios = torch.linspace(-3, 3, 101, dtype=torch.float64)
    for name, estimator in kl.ESTIMATORS.items():
        assert float(estimator(torch.zeros(1))) == 0
        assert name == "k1" or bool((estimator(ratios) >= 0).all())


def test_k2_has_the_gradient_of_the_divergence():
    """d/dp sum p log(p/q), against the mean over samples of p of the estimator's gradient."""
    logits = P.log().requires_grad_()
    policy = torch.softmax(logits, 0)
    (exact,) = torch.autograd.grad((policy * (policy / Q).log()).sum(), logits)
    policy = torch.softmax(logits, 0)
    (made,) = torch.autograd.grad((policy.detach() * kl.k2((policy / Q).log())).sum(), logits)
    assert torch.allclose(made, exact, atol=1e-12)


def test_the_coefficient_follows_the_divergence_to_its_target():
    adaptive = kl.KlController(target=6.0, horizon=100)
    assert adaptive.update(0.1, kl=6.0, answers=50) == pytest.approx(0.1)
    assert adaptive.update(0.1, kl=6.6, answers=50) == pytest.approx(0.1 * (1 + 0.1 * 50 / 100))
    assert adaptive.update(0.1, kl=60.0, answers=50) == pytest.approx(0.1 * (1 + 0.2 * 50 / 100)), "an error is clipped"
    assert adaptive.update(0.1, kl=0.0, answers=50) == pytest.approx(0.1 * (1 - 0.2 * 50 / 100))
    assert kl.KlController(target=None, horizon=100).update(0.1, kl=60.0, answers=50) == 0.1
