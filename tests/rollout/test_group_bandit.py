"""Groups of answers reach the known answers of ``bandit``, with the advantages and losses that a run uses."""

import pytest
import torch

from tests.rollout.bandit import BETA, KL_IN_LOSS, KL_IN_REWARD, REFERENCE, REWARDS, nats
from tunesmith.rollout import group_advantages, kl, policy_loss

ITERATIONS, RATE = 250, 0.05


def train(seed, advantage, answers, in_loss, groups=16, beta=BETA):
    """The policy that is reached; its parameters are five logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = REFERENCE.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=RATE)
    for iteration in range(ITERATIONS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - iteration / ITERATIONS)
        old = torch.log_softmax(logits.detach(), 0)
        actions = torch.multinomial(old.exp(), groups * answers, replacement=True, generator=generator)
        scores = REWARDS[actions] - (0.0 if in_loss else beta) * (old - REFERENCE.log())[actions]
        made = group_advantages.ADVANTAGES[advantage](scores.view(groups, answers).numpy())
        logps = torch.log_softmax(logits, 0)
        losses = policy_loss.clipped_surrogate((logps - old)[actions].exp(), torch.from_numpy(made).flatten(), 0.2)
        if in_loss:
            losses = losses + beta * kl.k3((logps - REFERENCE.log())[actions])
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return torch.softmax(logits.detach(), 0)


def test_the_two_problems_have_different_answers():
    assert nats(KL_IN_REWARD, KL_IN_LOSS) == pytest.approx(0.2396, abs=1e-4)


@pytest.mark.parametrize("answer", [KL_IN_REWARD, KL_IN_LOSS], ids=["reward", "loss"])
def test_an_answer_maximises_its_objective(answer):
    """Against 2000 distributions near it."""
    generator = torch.Generator().manual_seed(0)
    near = torch.softmax(answer.log() + 0.1 * torch.randn(2000, 5, dtype=torch.float64, generator=generator), 1)

    def objective(policy):
        if answer is KL_IN_REWARD:
            return (policy * (REWARDS - BETA * (policy / REFERENCE).log())).sum(-1)
        return (policy * REWARDS).sum(-1) - BETA * (REFERENCE * (REFERENCE / policy).log()).sum(-1)

    assert bool((objective(near) < objective(answer)).all())


@pytest.mark.parametrize("seed", range(5))
def test_rloo_with_kl_in_the_reward_reaches_its_answer(seed):
    assert nats(train(seed, "rloo", 8, in_loss=False, groups=128), KL_IN_REWARD) < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_group_means_with_k3_in_the_loss_reach_their_answer(seed):
    assert nats(train(seed, "dr_grpo", 128, in_loss=True, groups=8), KL_IN_LOSS) < 0.01


def test_the_mean_of_a_small_group_weakens_the_reward():
    """An answer is part of the mean that it is compared with: K answers act as beta K / (K - 1), which is in docs/grpo.md."""
    found = train(0, "dr_grpo", 3, in_loss=True, groups=400)
    same = train(0, "rloo", 3, in_loss=True, groups=400, beta=BETA * 3 / 2)
    assert nats(found, KL_IN_LOSS) > 0.02
    assert nats(found, same) < 0.005
