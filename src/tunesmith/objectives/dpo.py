"""Preference optimisation without a reward model: DPO (Rafailov et al. 2023) and related losses, a table of
small functions.

The reference is the policy before its first step. Its log-probabilities of all answers are computed once,
kept with the checkpoints, and compared with the policy's. Dropout is off: a log-probability must depend on
the weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from tunesmith import objectives
from tunesmith.data.batch import preference_batch
from tunesmith.data.encode import rankings
from tunesmith.data.rows import Ranking
from tunesmith.metrics.intervals import RowFigure
from tunesmith.objectives import Baseline, Batch, Example, JsonObject, Layout, Metrics, Overlong

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Config(objectives.Config):
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo"] = Field(
        "sigmoid", description="sigmoid = DPO; simpo and orpo need no reference"
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="how closely the policy is kept to the reference; for orpo the weight of the odds ratio",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="assumed share of pairs with swapped labels; sigmoid and robust only"
    )
    simpo_gamma: float = Field(0.5, ge=0, description="target margin between the two answers; simpo only")
    overlong: Overlong = Field(
        "truncate",
        description="truncate = cut the prompt from the left, never an answer; a pair is dropped when an answer is too long",
    )

    @model_validator(mode="after")
    def _check_loss_keys(self) -> Config:
        for key, default, losses in (
            ("label_smoothing", 0.0, ("sigmoid", "robust")),
            ("simpo_gamma", 0.5, ("simpo",)),
        ):
            if dict(self)[key] != default and self.loss_type not in losses:
                raise ValueError(
                    f"{key} applies to loss_type {' and '.join(losses)} only, and loss_type is {self.loss_type}. Leave it out"
                )
        return self


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities (n,) of the chosen and the rejected answer of each pair under policy and reference,
    and the number of tokens of each answer. For a loss without a reference, the reference's are 0."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def margin(self) -> Tensor:
        """log (pi(chosen) / ref(chosen)) - log (pi(rejected) / ref(rejected))."""
        return (self.chosen - self.reference_chosen) - (self.rejected - self.reference_rejected)

    @property
    def mean_margin(self) -> Tensor:
        """:attr:`margin`, with each log-ratio divided by the tokens of its answer."""
        chosen = (self.chosen - self.reference_chosen) / self.chosen_tokens
        return chosen - (self.rejected - self.reference_rejected) / self.rejected_tokens


def _log_sigmoid(x: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.logsigmoid(x)


def sigmoid(pairs: Pairs, config: Config) -> Tensor:
    """-log sigmoid(beta margin), Rafailov et al. 2023, eq. 7; smoothed: conservative DPO, Mitchell 2023."""
    margin, flipped = config.beta * pairs.margin, config.label_smoothing
    return -(1 - flipped) * _log_sigmoid(margin) - flipped * _log_sigmoid(-margin)


def ipo(pairs: Pairs, config: Config) -> Tensor:
    """(mean margin - 1 / (2 beta))^2, Azar et al. 2023, eq. 17 (divided by tokens in their code)."""
    return (pairs.mean_margin - 1 / (2 * config.beta)) ** 2


def hinge(pairs: Pairs, config: Config) -> Tensor:
    """max(0, 1 - beta margin), Zhao et al. 2023 (SLiC-HF), with the reference of DPO."""
    return (1 - config.beta * pairs.margin).clamp(min=0)


def robust(pairs: Pairs, config: Config) -> Tensor:
    """The unbiased estimate when a share of pairs is flipped, Chowdhury et al. 2024, equation 8."""
    margin, flipped = config.beta * pairs.margin, config.label_smoothing
    return (-(1 - flipped) * _log_sigmoid(margin) + flipped * _log_sigmoid(-margin)) / (1 - 2 * flipped)


def simpo(pairs: Pairs, config: Config) -> Tensor:
    """-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma), Meng et al. 2024, eq. 6."""
    return -_log_sigmoid(config.beta * pairs.mean_margin - config.simpo_gamma)


def orpo(pairs: Pairs, config: Config) -> Tensor:
    """-mean log p(chosen) - beta log sigmoid(log odds ratio), Hong et al. 2024, eq. 6 and 7."""
    import torch

    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen - config.beta * _log_sigmoid(log_odds)


LOSSES: dict[str, Callable[[Pairs, Config], Tensor]] = {
    loss.__name__: loss for loss in (sigmoid, ipo, hinge, robust, simpo, orpo)
}
"""(pairs, config) -> the loss of each pair (n,)."""

REFERENCE_FREE = ("simpo", "orpo")


NO_FIGURES = ("row", "longer", "answers")
"""Entries of a row's record that are not figures."""


class Objective(objectives.Objective):
    config: Config
    traits = objectives.preference_traits(
        Ranking,
        "builtin:preference",
        ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.traits = replace(self.traits, needs_reference=config.loss_type not in REFERENCE_FREE)

    def encode(self, rows: Sequence[Ranking], tokenizer: Tokenizer) -> list[list[Example]]:
        return rankings.encode(rows, tokenizer, max_length=self.max_length, overlong=self.config.overlong)

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        return preference_batch.with_targets(examples, layout)

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over rows of the mean loss of their pairs, and the same of the figures."""
        losses, figures, _ = self._compare(model, batch)
        return objectives.sum_over_pairs(losses, figures, batch)

    def _compare(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the loss and the figures of each pair (n,), and the reward of each answer."""
        import torch

        from tunesmith.models.heads.log_probs import answer_logps

        policy = answer_logps(model, batch)
        if not self.traits.needs_reference:
            reference = torch.zeros_like(policy)
        elif "reference_logps" in batch:
            reference = batch["reference_logps"].to(policy)
        else:  # before the first step the policy is its own reference
            reference = policy.detach()
        tokens = batch["tokens"].to(policy).clamp(min=1)
        chosen, rejected = batch["pairs"].to(policy.device).unbind(1)
        pairs = Pairs(
            *(values[side] for values in (policy, reference, tokens) for side in (chosen, rejected))
        )
        divisor = 1.0 if self.traits.needs_reference else tokens  # simpo and orpo compare means over tokens
        rewards = self.config.beta * (policy - reference) / divisor
        better, worse = rewards[chosen], rewards[rejected]
        figures = {
            "rewards/accuracies": (better > worse).to(policy) + (better == worse).to(policy) / 2,
            "rewards/margins": better - worse,
            "rewards/chosen": better,
            "rewards/rejected": worse,
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
        }
        if self.traits.needs_reference:
            chosen_kl, rejected_kl = (
                pairs.chosen - pairs.reference_chosen,
                pairs.rejected - pairs.reference_rejected,
            )
            figures["kl"] = (chosen_kl**2 + rejected_kl**2) / 4
        return LOSSES[self.config.loss_type](pairs, self.config), figures, rewards

    def reference_logps(self, model: PreTrainedModel, batch: Batch) -> list[Tensor]:
        """log p(answer | prompt) of the answers of each row, float64 (answers,)."""
        import torch

        from tunesmith.models.heads.log_probs import answer_logps

        return list(torch.split(answer_logps(model, batch).cpu().double(), batch["counts"]))

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> JsonObject:
        """Return, for each row, the means of loss and figures over its pairs, and the rewards of its answers.

        ``longer``: share of its pairs whose chosen answer is the longer one; a tie counts half."""
        import torch

        with torch.no_grad():
            losses, figures, rewards = self._compare(model, batch)
            weights = batch["weights"].to(losses)
            row_of_pair = torch.tensor(batch["of"], device=losses.device)
            zeros = losses.new_zeros(len(batch["rows"]))
            means = {
                name: zeros.index_add(0, row_of_pair, weights * value).cpu().double().tolist()
                for name, value in {"loss": losses, **figures}.items()
            }
            chosen_tokens, rejected_tokens = (
                batch["tokens"].to(losses)[batch["pairs"].to(losses.device)].unbind(1)
            )
            longer = ((chosen_tokens > rejected_tokens) + 0.5 * (chosen_tokens == rejected_tokens)).to(losses)
            means["longer"] = zeros.index_add(0, row_of_pair, weights * longer).cpu().double().tolist()
        of_answers = [part.tolist() for part in torch.split(rewards.cpu().double(), batch["counts"])]
        columns = dict(means, row=batch["rows"], answers=of_answers)
        return {
            "rows": [
                dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
            ]
        }

    def summarise(self, records: Sequence[JsonObject]) -> dict[str, float]:
        """Means over rows: ``eval_loss`` with its standard error, and ``eval_`` before each figure."""
        rows = [row for record in records for row in record["rows"]]
        names = [name for name in (rows[0] if rows else ()) if name not in ("loss", *NO_FIGURES)]
        means = {f"eval_{name}": math.fsum(row[name] for row in rows) / len(rows) for name in names}
        return objectives.mean_loss([(row["loss"], 1) for row in rows]) | means

    def row_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        rows = [row for record in records for row in record["rows"]]
        names = [name for name in (rows[0] if rows else ()) if name not in NO_FIGURES]
        return {f"eval_{name}": RowFigure({row["row"]: (row[name], 1.0) for row in rows}) for name in names}

    def baselines(self, records: Sequence[JsonObject]) -> dict[str, Baseline]:
        """Return the accuracy of always choosing the longer, or the shorter, answer of a pair; of loss and
        margin, those of the reference policy."""
        longer = {row["row"]: (row["longer"], 1.0) for record in records for row in record["rows"]}
        found = {"eval_rewards/accuracies": objectives.always_longer(longer)}
        if not self.traits.needs_reference:
            return found
        values = {"eval_loss": self._loss_without_change(), "eval_rewards/margins": 0.0}
        return found | {
            name: Baseline.of_rows(
                "the reference policy, unchanged", RowFigure(dict.fromkeys(longer, (value, 1.0)))
            )
            for name, value in values.items()
        }

    def _loss_without_change(self) -> float:
        """Return the loss of a pair whose log-probabilities are those of the reference policy."""
        import torch

        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        return float(LOSSES[self.config.loss_type](Pairs(zero, zero, zero, zero, one, one), self.config))

    def answers(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        """Return for each row the rewards of its answers, its loss, and whether all pairs rank correctly."""
        rows = sorted((row for record in records for row in record["rows"]), key=lambda row: row["row"])
        return [
            {
                "row": list(row["row"]),
                "prediction": row["answers"],
                "gold": None,
                "right": row["rewards/accuracies"] > 1 - 1e-6,
                "loss": row["loss"],
            }
            for row in rows
        ]
