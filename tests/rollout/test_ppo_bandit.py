"""PPO with the KL penalty in the reward reaches the known answer of ``bandit``, with the functions that a run uses."""

import pytest
import torch

from tests.rollout.bandit import BETA, KL_IN_REWARD, REFERENCE, REWARDS, nats
from tunesmith.rollout import advantages, kl, policy_loss

SAMPLES, ITERATIONS, EPOCHS = 256, 120, 4


def train(seed, whitening, estimator="k1"):
    """The policy that PPO reaches; its parameters are five logits, its value model is one number."""
    generator = torch.Generator().manual_seed(seed)
    logits = REFERENCE.log().clone().requires_grad_()
    value = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, value], lr=0.05)
    lengths, never = torch.ones(SAMPLES, dtype=torch.long), torch.zeros(SAMPLES, dtype=torch.bool)
    for iteration in range(ITERATIONS):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - iteration / ITERATIONS)
        old = torch.log_softmax(logits.detach(), 0)
        actions = torch.multinomial(old.exp(), SAMPLES, replacement=True, generator=generator)
        old_values = value.detach().expand(SAMPLES)
        divergence = kl.ESTIMATORS[estimator]((old - REFERENCE.log())[actions])
        rewards = advantages.token_rewards(divergence, lengths, REWARDS[actions], never, BETA)
        made, returns = advantages.gae(rewards, old_values, lengths, gamma=1.0, gae_lambda=0.95)
        made = advantages.whiten(made) if whitening else made
        for _ in range(EPOCHS):
            ratio = (torch.log_softmax(logits, 0) - old)[actions].exp()
            loss = policy_loss.clipped_surrogate(ratio, made, 0.2).mean()
            loss = loss + policy_loss.clipped_value_loss(value.expand(SAMPLES), old_values, returns, 0.2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.softmax(logits.detach(), 0)


@pytest.mark.parametrize("whitening", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_ppo_reaches_the_answer(seed, whitening):
    assert nats(train(seed, whitening), KL_IN_REWARD) < 0.01


def test_a_penalty_by_k3_has_another_answer():
    """Its mean is the divergence and its policy gradient is not, so k1 is the default; docs/ppo.md."""
    assert nats(train(0, False, "k3"), KL_IN_REWARD) > 0.02
