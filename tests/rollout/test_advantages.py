"""Rewards, advantages and losses of PPO against slow references, in fp64."""

import math

import pytest
import torch

from tunesmith.rollout import advantages, kl, policy_loss

GAMMA, LAMBDA, KL_COEF, PENALTY, CLIP = 0.9, 0.8, 0.05, 1.0, 0.2
LENGTHS = [5, 1, 8, 3, 2, 13]
COUNT = sum(LENGTHS)


def tokens(seed, count=COUNT, scale=1.0):
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def gae_by_loop(rewards, values, lengths, gamma, gae_lambda):
    made, start = [], 0
    for length in lengths:
        running, of_answer = 0.0, []
        for t in reversed(range(start, start + length)):
            following = values[t + 1] if t + 1 < start + length else 0.0
            running = rewards[t] + gamma * following - values[t] + gamma * gae_lambda * running
            of_answer.append(running)
        made += of_answer[::-1]
        start += length
    return made


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(GAMMA, LAMBDA), (1.0, 0.95), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_by_scan_are_those_by_loop(gamma, gae_lambda):
    rewards, values = tokens(1), tokens(2)
    made, returns = advantages.gae(rewards, values, torch.tensor(LENGTHS), gamma, gae_lambda)
    expected = torch.tensor(gae_by_loop(rewards.tolist(), values.tolist(), LENGTHS, gamma, gae_lambda), dtype=torch.float64)
    assert torch.allclose(made, expected, rtol=0, atol=1e-12)
    assert torch.allclose(returns, expected + values, rtol=0, atol=1e-12)


def test_an_answer_does_not_see_the_others():
    rewards, values = tokens(1), tokens(2)
    together, _ = advantages.gae(rewards, values, torch.tensor(LENGTHS), GAMMA, LAMBDA)
    start = 0
    for length in LENGTHS:
        here = slice(start, start + length)
        alone, _ = advantages.gae(rewards[here], values[here], torch.tensor([length]), GAMMA, LAMBDA)
        assert torch.allclose(together[here], alone, rtol=0, atol=1e-12)
        start += length


def by_hand(old, reference, new, old_values, values, score, truncated):
    """The whole of PPO on one answer, in Python numbers: rewards, advantages, returns and the two losses."""
    rewards = [-KL_COEF * (p - q) for p, q in zip(old, reference, strict=True)]
    rewards[-1] += score - (PENALTY if truncated else 0)
    made = gae_by_loop(rewards, old_values, [len(old)], GAMMA, LAMBDA)
    returns = [a + v for a, v in zip(made, old_values, strict=True)]
    policy = value = 0.0
    for t, advantage in enumerate(made):
        ratio = math.exp(new[t] - old[t])
        policy += max(-advantage * ratio, -advantage * min(max(ratio, 1 - CLIP), 1 + CLIP))
        near = min(max(values[t], old_values[t] - CLIP), old_values[t] + CLIP)
        value += max((values[t] - returns[t]) ** 2, (near - returns[t]) ** 2) / 2
    return rewards, made, returns, policy, value


@pytest.mark.parametrize("truncated", [False, True])
def test_five_tokens_equal_a_slow_reference(truncated):
    old, reference, new, old_values, values = (tokens(seed, 5, 0.4) for seed in range(5))
    rewards = advantages.token_rewards(
        kl.k1(old - reference),
        torch.tensor([5]),
        torch.tensor([0.7], dtype=torch.float64),
        torch.tensor([truncated]),
        KL_COEF,
        PENALTY,
    )
    made, returns = advantages.gae(rewards, old_values, torch.tensor([5]), GAMMA, LAMBDA)
    policy = policy_loss.clipped_surrogate((new - old).exp(), made, CLIP).sum()
    value = policy_loss.clipped_value_loss(values, old_values, returns, CLIP).sum()
    given = [x.tolist() for x in (old, reference, new, old_values, values)]
    for ours, expected in zip((rewards, made, returns, policy, value), by_hand(*given, 0.7, truncated), strict=True):
        assert torch.allclose(ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_truncated_answer_is_penalised_once_at_its_last_token():
    lengths, scores = torch.tensor([3, 2]), torch.tensor([1.0, 2.0])
    truncated = torch.tensor([True, False])
    made = advantages.token_rewards(torch.zeros(5), lengths, scores, truncated, KL_COEF, missing_eos_penalty=5.0)
    assert made.tolist() == [0, 0, 1.0 - 5.0, 0, 2.0]


def test_whitening_equals_a_hand_computation():
    made = advantages.whiten(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    deviation = math.sqrt((4 + 1 + 9) / 2)  # around the mean 3
    assert torch.allclose(made, torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / deviation, atol=1e-8)
    assert advantages.whiten(torch.tensor([4.0])).tolist() == [0.0], "one token has no deviation"
    assert advantages.whiten(torch.full((4,), 2.0)).tolist() == [0.0] * 4


def trl(old, reference, new, old_values, values, scores, ends, after=1):
    """The lines of TRL 0.24's PPOTrainer (``train``, ``masked_whiten``) for padded rows, (rows, longest) each, in their order.

    ``ends``: index of each row's last token. ``after``: tokens after it at which TRL puts the score; 0 is not TRL."""
    index = torch.arange(old.shape[1]).repeat(len(old), 1)
    padding, padding_p1 = index > ends[:, None], index > ends[:, None] + after
    old, reference = old.masked_fill(padding, 1.0), reference.masked_fill(padding, 1.0)
    old_values = old_values.masked_fill(padding_p1, 0)
    rewards = -KL_COEF * -(reference - old)
    last = torch.where(ends + after < old.shape[1], ends + after, ends)
    rewards[torch.arange(len(old)), last] += scores
    running, made = 0, []
    for t in reversed(range(old.shape[1])):
        following = old_values[:, t + 1] if t < old.shape[1] - 1 else 0.0
        running = rewards[:, t] + GAMMA * following - old_values[:, t] + GAMMA * LAMBDA * running
        made.append(running)
    made = torch.stack(made[::-1], dim=1)
    returns, mask = made + old_values, ~padding
    mean = (made * mask).sum() / mask.sum()
    variance = ((made - mean) ** 2 * mask).sum() / mask.sum() * mask.sum() / (mask.sum() - 1)
    made = ((made - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(padding, 0)
    ratio = (new.masked_fill(padding, 1.0) - old).exp()
    policy = torch.max(-made * ratio, -made * ratio.clamp(1 - CLIP, 1 + CLIP))
    values = values.masked_fill(padding_p1, 0)
    near = torch.clamp(values, old_values - CLIP, old_values + CLIP)
    value = 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)
    return tuple(part[mask] for part in (made, returns, policy, value))


def ours_of(old, reference, new, old_values, values, scores, lengths):
    """The same of rows (rows, longest) of which the first ``lengths`` tokens count."""
    is_token = torch.arange(old.shape[1]) < lengths[:, None]
    old, reference, new, old_values, values = (part[is_token] for part in (old, reference, new, old_values, values))
    never = torch.zeros(len(lengths), dtype=torch.bool)
    rewards = advantages.token_rewards(kl.k1(old - reference), lengths, scores, never, KL_COEF)
    made, returns = advantages.gae(rewards, old_values, lengths, GAMMA, LAMBDA)
    made = advantages.whiten(made)
    policy = policy_loss.clipped_surrogate((new - old).exp(), made, CLIP)
    return made, returns, policy, policy_loss.clipped_value_loss(values, old_values, returns, CLIP)


def difference(lengths, after):
    """The largest difference from TRL's lines in advantages, returns and both losses."""
    rows = len(lengths)
    parts = [tokens(seed, rows * 6, 0.4).view(rows, 6) for seed in range(5)]
    lengths, scores = torch.tensor(lengths), tokens(9, rows)
    theirs = trl(*(part.clone() for part in parts), scores, lengths - 1, after)
    pairs = zip(ours_of(*parts, scores, lengths), theirs, strict=True)
    return max(float((mine - other).abs().max()) for mine, other in pairs)


def test_rows_of_equal_length_equal_trl():
    assert difference([6, 6, 6, 6], after=1) < 1e-9


def test_padded_rows_differ_from_trl_by_the_place_of_the_score_alone():
    """TRL puts the score of a row that ends early one token after its stop token, where it has a value, too; docs/ppo.md."""
    assert difference([6, 2, 5, 1], after=0) < 1e-9
    assert difference([6, 2, 5, 1], after=1) > 0.1


def test_a_clipped_token_is_one_without_a_gradient():
    ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.1, 1.3], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(policy_loss.clipped_surrogate(ratio, advantage, CLIP).sum(), ratio)
    clipped = policy_loss.is_clipped(ratio.detach(), advantage, CLIP)
    assert clipped.tolist() == [1, 0, 0, 1, 0, 0]
    assert torch.equal(gradient == 0, (clipped == 1) | (advantage == 0))


def test_explained_variance():
    returns = tokens(1, 50)
    assert advantages.explained_variance(returns, returns) == pytest.approx(1)
    assert advantages.explained_variance(torch.full_like(returns, 3.0), returns) == pytest.approx(0)
    assert math.isnan(advantages.explained_variance(returns, torch.ones_like(returns)))
