"""Rewards, advantages and returns of the sampled tokens, for an objective with a value model.

The tokens of all answers of a rollout lie one after another, (tokens,); ``lengths`` (answers,) says how many
each answer has. There is no padding, so none can be counted. The value of a token is that of the state before
it: the value model reads it at the position that predicts the token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def last_tokens(lengths: Tensor) -> Tensor:
    """Return the index (answers,) of each answer's last token. Every answer has at least one token."""
    return lengths.cumsum(0) - 1


def token_rewards(
    kl: Tensor,
    lengths: Tensor,
    scores: Tensor,
    truncated: Tensor,
    kl_coef: float,
    missing_eos_penalty: float = 0.0,
) -> Tensor:
    """Return the reward of each token, (tokens,): -kl_coef * ``kl`` (tokens,), plus the score of the answer
    at its last token.

    ``scores`` (answers,). ``truncated`` (answers,): the answer reached its token limit without a stop token;
    ``missing_eos_penalty`` is subtracted from its score, once.
    """
    earned = scores - missing_eos_penalty * truncated.to(scores)
    return (-kl_coef * kl).index_add(0, last_tokens(lengths), earned.to(kl))


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, (tokens,) each: generalised advantage estimation (Schulman et al. 2016).

    delta_t = r_t + gamma V_{t+1} - V_t (equation 10); A_t = delta_t + gamma lambda A_{t+1} (equation 16);
    the return is A_t + V_t. V after the last token is 0 for every answer: the score of a
    truncated answer is that of the cut text and so the whole return, to which a continuation adds nothing.

    A_t = b_t + a_t A_{t+1} is computed by a parallel scan: after k rounds b_t holds 2^k terms of the sum.
    """
    ends = last_tokens(lengths)
    inside = torch.ones_like(rewards).index_fill(0, ends, 0.0)  # 0 at the last token of an answer
    following = torch.cat([values[1:], values.new_zeros(1)])
    sums = rewards + gamma * inside * following - values
    factors = gamma * gae_lambda * inside
    distance, longest = 1, int(lengths.max()) if len(lengths) else 0
    while distance < longest:
        ahead = torch.cat([sums[distance:], sums.new_zeros(distance)])
        sums = sums + factors * ahead
        factors = factors * torch.cat([factors[distance:], factors.new_zeros(distance)])
        distance *= 2
    return sums, sums + values


def whiten(advantages: Tensor) -> Tensor:
    """Return the advantages of a whole rollout, (tokens,), with mean 0 and standard deviation 1.

    Whitening a mini-batch would make an answer's advantage depend on the answers that it is updated with.
    """
    centred = advantages - advantages.mean()
    if len(advantages) < 2:
        return centred
    return centred * torch.rsqrt(centred.square().sum() / (len(advantages) - 1) + 1e-8)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns): 1 for a perfect value model, 0 for a constant one,
    NaN where all returns are equal."""
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else float("nan")
