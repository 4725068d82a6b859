"""PPO: learn from sampled answers and their scores with a value model (Schulman et al. 2017, arXiv:1707.06347;
for language models Ziegler et al. 2019, arXiv:1909.08593, and Ouyang et al. 2022, arXiv:2203.02155).

The policy samples an answer to each prompt, rewards score it, and each token is rewarded: with the score at
the last token, and everywhere with a penalty for leaving the policy of step 0. Policy, reference and value
model share one network. ``rollout.rollouts`` samples and measures; this file has the losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from tunesmith import objectives
from tunesmith.data.rows import Prompt
from tunesmith.objectives import Batch, JsonObject, Metrics, Session, Source, Step
from tunesmith.rollout.answer_objective import AnswerObjective
from tunesmith.rollout.reward_scale import Normalization, RewardScale
from tunesmith.rollout.rollout_config import RolloutKeys

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from tunesmith.rollout.sampled_answers import SampledAnswer


class Config(RolloutKeys, objectives.Config):
    num_generations: int = Field(1, ge=1, description="answers sampled for each prompt (TRL 0.24: 1)")
    update_epochs: int = Field(
        4, gt=0, description="passes over the answers of an iteration (Ziegler et al. 2019: 4)"
    )
    max_new_tokens: int = Field(
        53, gt=0, description="most tokens of an answer (Huang et al. 2024, TRL 0.24: 53)"
    )
    temperature: float = Field(
        0.7,
        gt=0,
        description="of sampling; log-probabilities are those at this temperature (Ziegler et al. 2019, TRL 0.24: 0.7)",
    )
    kl_coef: float = Field(
        0.05,
        ge=0,
        description="weight of the KL penalty in the reward of each token (Huang et al. 2024, TRL 0.24: 0.05)",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="estimator of the penalty; only k1 in the reward has the KL's gradient (Schulman 2020)",
    )
    target_kl: float | None = Field(
        None,
        gt=0,
        description="adapt kl_coef to this KL of an answer, in nats, such as 6 (Ziegler et al. 2019)",
    )
    horizon: float = Field(
        10_000,
        gt=0,
        description="answers over which target_kl corrects an error (Ziegler et al. 2019: 10000)",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="discount of later rewards (Ziegler et al. 2019: 1)")
    gae_lambda: float = Field(
        0.95,
        ge=0,
        le=1,
        description="0 = trust the value model, 1 = the sampled return (Ziegler et al. 2019: 0.95)",
    )
    clip_range: float = Field(
        0.2, gt=0, description="most change of a token's probability ratio (Schulman et al. 2017: 0.2)"
    )
    clip_range_value: float | None = Field(
        0.2, gt=0, description="most change of a value (Ziegler et al. 2019: 0.2); null = any"
    )
    vf_coef: float = Field(0.1, ge=0, description="weight of the value loss (Ziegler et al. 2019: 0.1)")
    entropy_coef: float = Field(
        0.0, ge=0, description="weight of an entropy bonus (Ziegler et al. 2019: none)"
    )
    value_stop_gradient: bool = Field(
        False,
        description="train the value head alone on the value loss, not the body that it shares with the policy",
    )
    whiten_advantages: bool = Field(
        True,
        description="mean 0 and standard deviation 1 over the tokens of an iteration (Ziegler et al. 2019)",
    )
    missing_eos_penalty: float = Field(
        1.0,
        ge=0,
        description="subtracted from the score of an answer that reached max_new_tokens (example of TRL 0.24: 1)",
    )
    reward_normalization: Normalization = Field(
        "none",
        description="divide scores by their running standard deviation (std), subtract their running mean first (mean_std)",
    )
    reward_clip: float | None = Field(
        None, gt=0, description="limit of a score's magnitude after that, such as 10; default: none"
    )
    early_stop_kl: float | None = Field(
        None,
        gt=0,
        description="skip the other passes of an iteration once the policy is this far from the one that sampled "
        "(nats of a token), such as 0.02; default: never",
    )

    @model_validator(mode="after")
    def _check_keys(self) -> Config:
        if self.target_kl is not None and not self.kl_coef:
            raise ValueError("target_kl adapts kl_coef, which is 0. Leave target_kl out, or set kl_coef")
        if self.target_kl is None and self.horizon != type(self).model_fields["horizon"].default:
            raise ValueError("horizon does nothing without target_kl")
        if self.early_stop_kl is not None and self.update_epochs == 1:
            raise ValueError("early_stop_kl skips passes after the first, and update_epochs is 1")
        return self


class Objective(AnswerObjective, objectives.Objective):
    config: Config
    kl_key = "objective.kl_coef"
    traits = objectives.answer_traits(Prompt, rate=0.15, value_head=True)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.traits = replace(self.traits, keeps_start=config.kl_coef > 0)
        self.kl_coef = config.kl_coef
        """The coefficient in use; ``target_kl`` adapts it."""
        self.scale = RewardScale(config.reward_normalization, config.reward_clip)
        self.session: Session | None = None

    def bind(self, config: PreTrainedConfig, tokenizer: Tokenizer, max_length: int | None) -> None:
        super().bind(config, tokenizer, self.config.prompt_room(max_length))
        self.make_rewards(tokenizer)

    def count(self, batch: Batch) -> int:
        """Tokens of the answers."""
        return sum(batch["lengths"])

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over the answers' tokens of: clipped surrogate + vf_coef * value loss - entropy_coef * entropy.

        A batch without ``old_logps`` was not sampled (the parity check, the forecast): its ratio is 1."""
        from tunesmith.models.heads import value_head
        from tunesmith.models.heads.log_probs import at_targets
        from tunesmith.rollout import kl, policy_loss

        config, tokens = self.config, len(batch["labels"])
        found = at_targets(model, batch, config.temperature, config.entropy_coef > 0)
        values = value_head.values_at(model, found.hidden, config.value_stop_gradient)
        logps = found.logps
        old, old_values, advantages, returns = self._sampled(batch, logps.detach(), values.detach())
        ratio = (logps - old).exp()
        policy = policy_loss.clipped_surrogate(ratio, advantages, config.clip_range)
        value = policy_loss.clipped_value_loss(values, old_values, returns, config.clip_range_value)
        losses, fixed = policy + config.vf_coef * value, ratio.detach()
        metrics: Metrics = {
            "policy_loss": (policy.detach().sum(), tokens),
            "value_loss": (value.detach().sum(), tokens),
            "ratio": (fixed.sum(), tokens),
            "clip_fraction": (policy_loss.is_clipped(fixed, advantages, config.clip_range).sum(), tokens),
            "approx_kl": (kl.k3(old - logps.detach()).sum(), tokens),
        }
        if found.entropies is not None:
            losses = losses - config.entropy_coef * found.entropies
            metrics["entropy"] = (found.entropies.detach().sum(), tokens)
        return losses.sum(), metrics

    def _sampled(self, batch: Batch, logps: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities and values when the answers were sampled, advantages and returns, (tokens,) each."""
        import torch

        if "old_logps" not in batch:
            return logps, values, torch.ones_like(logps), torch.ones_like(values)
        names = ("old_logps", "old_values", "advantages", "returns")
        old, old_values, advantages, returns = (batch[name].to(logps) for name in names)
        return old, old_values, advantages, returns

    # ------------------------------------------------------------------------------------- the iteration

    def source(self, session: Session) -> Source:
        from tunesmith.rollout.rollouts import Rollouts

        self.session = session
        return Rollouts(session, self.config, self, self.config.kl_coef > 0)

    def measure(self, model: PreTrainedModel, batch: Batch) -> list[dict[str, np.ndarray]]:
        from tunesmith.models.heads import value_head
        from tunesmith.models.heads.log_probs import at_targets
        from tunesmith.rollout import answer_batch

        found = at_targets(model, batch, self.config.temperature, entropies=True)
        values = value_head.values_at(model, found.hidden)
        return answer_batch.arrays(batch, old_logps=found.logps, entropies=found.entropies, old_values=values)

    def finish(self, answers: Sequence[SampledAnswer]) -> JsonObject:
        """Add ``advantages`` and ``returns`` to the tokens of each answer, over the whole iteration."""
        import torch

        from tunesmith.rollout import advantages, kl

        config = self.config
        lengths = torch.tensor([len(answer.ids) for answer in answers])
        old, values = _joined(answers, "old_logps"), _joined(answers, "old_values")
        ratios = old - _joined(answers, "reference_logps") if config.kl_coef else torch.zeros_like(old)
        scores = torch.from_numpy(self.scale(np.array([answer.reward for answer in answers])))
        truncated = torch.tensor([not answer.stopped for answer in answers])
        rewards = advantages.token_rewards(
            kl.ESTIMATORS[config.kl_estimator](ratios),
            lengths,
            scores,
            truncated,
            self.kl_coef,
            config.missing_eos_penalty,
        )
        made, returns = advantages.gae(rewards, values, lengths, config.gamma, config.gae_lambda)
        explained = advantages.explained_variance(values, returns)
        if config.whiten_advantages:
            made = advantages.whiten(made)
        for name, joined in (("advantages", made), ("returns", returns)):
            for answer, part in zip(answers, torch.split(joined, lengths.tolist()), strict=True):
                answer.tokens[name] = part.numpy()
        divergence = float(ratios.sum()) / len(answers)
        figures: JsonObject = {
            "reward_after_kl": float(rewards.sum()) / len(answers),
            "value": float(values.mean()),
            **({} if math.isnan(explained) else {"explained_variance": explained}),
        }
        if config.kl_coef:
            figures |= {"kl_per_answer": divergence, "kl": float(ratios.mean()), "kl_coef": self.kl_coef}
            controller = kl.KlController(config.target_kl, config.horizon)
            self.kl_coef = controller.update(self.kl_coef, divergence, len(answers))
        return figures

    def stops_iteration(self, step: Step) -> bool:
        """Measure how far the policy is from the one that sampled, on the mini-batch of ``step``.

        It is measured with the weights of this moment, and not in the loss, which only knows those before its
        own update. So a resumed run decides alike, and no micro-batch waits for the device."""
        limit, session = self.config.early_stop_kl, self.session
        if limit is None or session is None:
            return False
        sums = session.gather(list(session.forward(self._distances, step, as_trained=True).values()))
        tokens = sum(count for _, count in sums)
        return math.fsum(distance for distance, _ in sums) / tokens > limit

    def _distances(self, model: PreTrainedModel, batch: Batch) -> list[tuple[float, int]]:
        """(sum of the KL divergence from the sampling policy, tokens) of each answer."""
        import torch

        from tunesmith.models.heads.log_probs import log_probs
        from tunesmith.rollout import kl

        logps = log_probs(model, batch, self.config.temperature)
        distances = kl.k3(batch["old_logps"].to(logps) - logps).cpu().double()
        parts = torch.split(distances, batch["lengths"])
        return [(float(part.sum()), len(part)) for part in parts]

    def state(self) -> JsonObject:
        return {"kl_coef": self.kl_coef, "scale": self.scale.state()}

    def load(self, state: Mapping[str, object]) -> None:
        kept: JsonObject = dict(state)
        self.kl_coef = kept["kl_coef"]
        self.scale.load(kept["scale"])


def _joined(answers: Sequence[SampledAnswer], name: str) -> Tensor:
    """The tokens of all answers, float64 (tokens,)."""
    import torch

    return torch.from_numpy(np.concatenate([answer.tokens[name] for answer in answers])).double()
