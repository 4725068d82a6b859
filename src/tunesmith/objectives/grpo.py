"""GRPO: learn from groups of sampled answers, without a value model (Shao et al. 2024, arXiv:2402.03300).

The policy samples several answers to each prompt, rewards score them, and an answer's advantage is its score
compared with the other answers to its prompt. ``rollout.rollouts`` samples and measures; this file has the
loss and the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from tunesmith import objectives
from tunesmith.data.rows import Prompt
from tunesmith.objectives import Batch, JsonObject, Metrics, Session, Source
from tunesmith.rollout.answer_objective import AnswerObjective
from tunesmith.rollout.rollout_config import RolloutKeys

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from tunesmith.rollout.sampled_answers import SampledAnswer


class Config(RolloutKeys, objectives.Config):
    advantage: Literal["grpo", "rloo", "dr_grpo"] = Field(
        "grpo",
        description="grpo = (r - mean) / std of the prompt's answers (Shao et al. 2024); dr_grpo = without the division "
        "(Liu et al. 2025); rloo = r - mean of the other answers (Ahmadian et al. 2024)",
    )
    loss_aggregation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="mean over tokens (DAPO's; TRL: dapo, bnpo), over answers of their token means (GRPO's; TRL: grpo), "
        "or token sums divided by max_new_tokens (Dr. GRPO's; TRL: dr_grpo)",
    )
    clip_range: float = Field(
        0.2, gt=0, description="most change of a token's probability ratio (Schulman et al. 2017)"
    )
    clip_range_high: float | None = Field(
        None,
        gt=0,
        description="another clip range above 1, such as 0.28 (DAPO, Yu et al. 2025); default: clip_range",
    )
    beta: float = Field(
        0.0,
        ge=0,
        description="weight of the KL divergence from the policy at step 0, such as 0.04 (Shao et al. 2024); TRL's default: 0",
    )
    use_kl_in_reward: bool = Field(
        False,
        description="subtract the KL divergence from each answer's reward (RLOO) instead of adding its estimator k3 to the "
        "loss (Shao et al. 2024, equation 4)",
    )
    resample: int = Field(
        0,
        ge=0,
        description="attempts of an iteration to replace prompts whose answers all score the same (DAPO's dynamic sampling)",
    )

    @model_validator(mode="after")
    def _check_groups(self) -> Config:
        if self.num_generations < 2:
            raise ValueError(
                "num_generations must be at least 2: an answer is compared with the others to its prompt"
            )
        if self.use_kl_in_reward and not self.beta:
            raise ValueError("use_kl_in_reward does nothing: beta is 0")
        return self


def _per_token(config: Config, lengths: Sequence[int]) -> tuple[list[float], int]:
    return [1.0] * len(lengths), sum(lengths)


def _per_answer(config: Config, lengths: Sequence[int]) -> tuple[list[float], int]:
    return [1 / length for length in lengths], len(lengths)


def _by_constant(config: Config, lengths: Sequence[int]) -> tuple[list[float], int]:
    return [1 / config.max_new_tokens] * len(lengths), len(lengths)


AGGREGATIONS: dict[str, Callable[[Config, Sequence[int]], tuple[list[float], int]]] = {
    "token": _per_token,
    "sequence": _per_answer,
    "constant": _by_constant,
}
"""(configuration, tokens of each answer) -> (weight of each answer's tokens, loss units of the answers)."""


class Objective(AnswerObjective, objectives.Objective):
    config: Config
    kl_key = "objective.beta"
    traits = objectives.answer_traits(Prompt, rate=0.05)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.traits = replace(self.traits, keeps_start=config.beta > 0)

    def bind(self, config: PreTrainedConfig, tokenizer: Tokenizer, max_length: int | None) -> None:
        super().bind(config, tokenizer, self.config.prompt_room(max_length))
        self.make_rewards(tokenizer)

    def _weights(self, batch: Batch) -> tuple[list[float], int]:
        return AGGREGATIONS[self.config.loss_aggregation](self.config, batch["lengths"])

    def count(self, batch: Batch) -> int:
        return self._weights(batch)[1]

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over tokens of the clipped surrogate and, with ``beta``, of the KL divergence in the loss.

        A batch without ``old_logps`` was not sampled (the parity check, the forecast): its ratio is 1."""
        import torch

        from tunesmith.models.heads.log_probs import log_probs
        from tunesmith.rollout import kl, policy_loss

        config = self.config
        logps = log_probs(model, batch, config.temperature)
        old = batch["old_logps"].to(logps) if "old_logps" in batch else logps.detach()
        advantages = batch["advantages"].to(logps) if "advantages" in batch else torch.ones_like(old)
        clips = config.clip_range, config.clip_range_high
        ratio = torch.exp(logps - old)
        losses = policy_loss.clipped_surrogate(ratio, advantages, *clips)
        tokens, fixed = len(batch["labels"]), ratio.detach()
        metrics: Metrics = {
            "ratio": (fixed.sum(), tokens),
            "clip_fraction": (policy_loss.is_clipped(fixed, advantages, *clips).sum(), tokens),
            "approx_kl": (kl.k3(old - logps.detach()).sum(), tokens),
        }
        if config.beta and not config.use_kl_in_reward:
            reference = batch["reference_logps"].to(logps) if "reference_logps" in batch else logps.detach()
            divergence = kl.k3(logps - reference)
            losses = losses + config.beta * divergence
            metrics["kl"] = (divergence.detach().sum(), tokens)
        weights = torch.tensor(self._weights(batch)[0], dtype=losses.dtype).to(losses.device)
        return (weights[batch["owners"].to(losses.device)] * losses).sum(), metrics

    # ------------------------------------------------------------------------------------- the iteration

    def source(self, session: Session) -> Source:
        from tunesmith.rollout.rollouts import Rollouts

        return Rollouts(session, self.config, self, self.config.beta > 0, self.config.resample)

    def measure(self, model: PreTrainedModel, batch: Batch) -> list[dict[str, np.ndarray]]:
        from tunesmith.rollout import answer_batch

        return answer_batch.measure(model, batch, self.config.temperature)

    def is_useless(self, rewards: np.ndarray) -> np.ndarray:
        from tunesmith.rollout import group_advantages

        return group_advantages.without_variance(rewards)

    def finish(self, answers: Sequence[SampledAnswer]) -> JsonObject:
        """Give every token of an answer the advantage of the answer in its group."""
        from tunesmith.rollout import group_advantages

        config, figures = self.config, {}
        rewards = np.array([answer.reward for answer in answers], np.float64)
        if config.beta:
            ratios = [one.tokens["old_logps"] - one.tokens["reference_logps"] for one in answers]
            sums = np.array([ratio.sum(dtype=np.float64) for ratio in ratios])
            figures["kl_per_answer"] = float(sums.mean())
            if config.use_kl_in_reward:
                rewards = rewards - config.beta * sums
                figures["reward_after_kl"] = float(rewards.mean())
        groups = rewards.reshape(-1, config.num_generations)
        for answer, value in zip(
            answers, group_advantages.ADVANTAGES[config.advantage](groups).flat, strict=True
        ):
            answer.tokens["advantages"] = np.full(len(answer.ids), value, np.float32)
        return figures
