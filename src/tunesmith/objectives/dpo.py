"""Preferences straight into the policy: DPO (Rafailov et al. 2023) and the losses of its shape, a table of small functions.

The reference is the policy before its first step. Its log-probabilities of all answers are computed once, kept with the
checkpoints, and compared with the policy's own. Nothing is dropped at random: a log-probability is a fact of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith import objectives
from tunesmith.data.batch import preference_batch
from tunesmith.data.encode import rankings
from tunesmith.data.rows import Ranking
from tunesmith.metrics import token_mean as figures
from tunesmith.objectives import Batch, Example, Layout, Metrics, Traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo"] = Field(
        "sigmoid", description="sigmoid = DPO; simpo and orpo need no reference"
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="how strongly the policy is held to the reference; of orpo the weight of its ratio",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of pairs taken to be judged the wrong way round; with sigmoid and robust",
    )
    simpo_gamma: float = Field(0.5, ge=0, description="with simpo: by how much the better answer is to lead")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "truncate",
        description="truncate = cut the prompt from the left, never an answer; a pair goes whole or not at all",
    )

    @model_validator(mode="after")
    def _used(self) -> Config:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise ValueError(
                f"label_smoothing goes with sigmoid and robust, and loss_type is {self.loss_type}. Leave it out"
            )
        if self.simpo_gamma != 0.5 and self.loss_type != "simpo":
            raise ValueError(f"simpo_gamma goes with simpo, and loss_type is {self.loss_type}. Leave it out")
        return self


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities (n,) of the better and the worse answer of each pair, the reference's, and how many tokens they have.

    Where a loss needs no reference, its values are 0.
    """

    better: Any
    worse: Any
    better_reference: Any
    worse_reference: Any
    better_tokens: Any
    worse_tokens: Any

    @property
    def lead(self) -> Any:
        """log (pi(better) / ref(better)) - log (pi(worse) / ref(worse))."""
        return (self.better - self.better_reference) - (self.worse - self.worse_reference)

    @property
    def mean_lead(self) -> Any:
        """The same by token of each answer."""
        better = (self.better - self.better_reference) / self.better_tokens
        return better - (self.worse - self.worse_reference) / self.worse_tokens


def _log_sigmoid(x: Any) -> Any:
    import torch

    return torch.nn.functional.logsigmoid(x)


def sigmoid(pairs: Pairs, config: Config) -> Any:
    """-log sigmoid(beta lead), Rafailov et al. 2023, equation 7; with smoothing the conservative DPO of Mitchell 2023."""
    lead, flipped = config.beta * pairs.lead, config.label_smoothing
    return -(1 - flipped) * _log_sigmoid(lead) - flipped * _log_sigmoid(-lead)


def ipo(pairs: Pairs, config: Config) -> Any:
    """(lead - 1 / (2 beta))^2 with the lead by token, Azar et al. 2023, equation 17 (by token: as its authors computed it)."""
    return (pairs.mean_lead - 1 / (2 * config.beta)) ** 2


def hinge(pairs: Pairs, config: Config) -> Any:
    """max(0, 1 - beta lead), Zhao et al. 2023 (SLiC-HF), with the reference of DPO."""
    return (1 - config.beta * pairs.lead).clamp(min=0)


def robust(pairs: Pairs, config: Config) -> Any:
    """The unbiased estimate under a share of flipped pairs, Chowdhury et al. 2024, equation 8."""
    lead, flipped = config.beta * pairs.lead, config.label_smoothing
    return (-(1 - flipped) * _log_sigmoid(lead) + flipped * _log_sigmoid(-lead)) / (1 - 2 * flipped)


def simpo(pairs: Pairs, config: Config) -> Any:
    """-log sigmoid(beta (mean log p(better) - mean log p(worse)) - gamma), Meng et al. 2024, equation 6."""
    return -_log_sigmoid(config.beta * pairs.mean_lead - config.simpo_gamma)


def orpo(pairs: Pairs, config: Config) -> Any:
    """-mean log p(better) - beta log sigmoid(log odds ratio) by token, Hong et al. 2024, equations 6 and 7."""
    import torch

    better, worse = pairs.better / pairs.better_tokens, pairs.worse / pairs.worse_tokens
    odds = (better - worse) - (torch.log1p(-better.exp()) - torch.log1p(-worse.exp()))
    return -better - config.beta * _log_sigmoid(odds)


LOSSES: dict[str, Callable[[Pairs, Config], Any]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "simpo": simpo,
    "orpo": orpo,
}
"""(pairs, config) -> the loss of each pair (n,)."""

ALONE = ("simpo", "orpo")
"""Losses that compare with no reference."""

FIGURES = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)


class Objective(objectives.Objective):
    traits = Traits(
        rows=(Ranking,),
        fits_rows=True,
        deterministic=True,
        shares_prompts=True,
        needs_reference=True,
        starter={"path": "builtin:preference"},
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.traits = replace(
            self.traits, overlong=config.overlong, needs_reference=config.loss_type not in ALONE
        )

    def bind(self, config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        super().bind(config, tokenizer, max_length)
        self.facts |= {"max_length": max_length, "overlong": self.config.overlong}

    def encode(self, rows: Sequence[Ranking], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
        return rankings.encode(rows, tokenizer, max_length=self.max_length, overlong=self.config.overlong)

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        return preference_batch.with_targets(examples, layout)

    def count(self, batch: Batch) -> int:
        """Rows: all pairs of a row together count as one (Ouyang et al. 2022, equation 1)."""
        return len(batch["rows"])

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, Metrics]:
        """Sum over rows of the mean loss of their pairs; the figures that the field watches, likewise."""
        losses, found = self._pairs(model, batch)
        weights = batch["weights"].to(losses)
        count = len(batch["rows"])
        metrics = {name: ((weights * value.detach()).sum(), count) for name, value in found.items()}
        return (weights * losses).sum(), metrics

    def _pairs(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, dict[str, Any]]:
        """Loss and figures of each pair (n,)."""
        import torch

        from tunesmith.models.heads.log_probs import answer_logps

        policy = answer_logps(model, batch)
        if not self.traits.needs_reference:
            reference = torch.zeros_like(policy)
        elif "reference_logps" in batch:
            reference = batch["reference_logps"].to(policy)
        else:  # before its first step the policy is its own reference
            reference = policy.detach()
        tokens = batch["tokens"].to(policy).clamp(min=1)
        better, worse = batch["pairs"].to(policy.device).unbind(1)
        pairs = Pairs(
            policy[better], policy[worse], reference[better], reference[worse], tokens[better], tokens[worse]
        )
        by_token = tokens if self.config.loss_type in ALONE else 1.0  # as these losses compare
        rewards = self.config.beta * (policy - reference) / by_token
        figures = {
            "rewards/chosen": rewards[better],
            "rewards/rejected": rewards[worse],
            "rewards/margins": rewards[better] - rewards[worse],
            "rewards/accuracies": (rewards[better] > rewards[worse]).to(policy)
            + (rewards[better] == rewards[worse]).to(policy) / 2,
            "logps/chosen": pairs.better,
            "logps/rejected": pairs.worse,
        }
        if self.traits.needs_reference:
            figures["kl"] = (
                (pairs.better - pairs.better_reference) ** 2 + (pairs.worse - pairs.worse_reference) ** 2
            ) / 4
        return LOSSES[self.config.loss_type](pairs, self.config), figures

    def reference_logps(self, model: PreTrainedModel, batch: Batch) -> list[Any]:
        """For each row, log p(answer | prompt) of its answers, float64 (answers,)."""
        from tunesmith.models.heads.log_probs import answer_logps

        return list(answer_logps(model, batch).cpu().double().split(batch["counts"]))

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        """Of each row: the means over its pairs of the loss and the figures."""
        import torch

        with torch.no_grad():
            losses, found = self._pairs(model, batch)
            weights = batch["weights"].to(losses)
            of = torch.tensor(batch["of"], device=losses.device)
            sums = {
                name: losses.new_zeros(len(batch["rows"]))
                .index_add(0, of, weights * value)
                .cpu()
                .double()
                .tolist()
                for name, value in {"loss": losses, **found}.items()
            }
        return {"judged": [
            {"row": row, **{name: values[number] for name, values in sums.items()}} for number, row in enumerate(batch["rows"])
        ]}  # fmt: skip

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Means over rows: eval_loss with its standard error, and eval_ before each figure."""
        rows = [row for record in records for row in record["judged"]]
        loss = figures.token_mean([{"rows": [(row["loss"], 1) for row in rows]}])
        names = [name for name in (*FIGURES, "kl") if rows and name in rows[0]]
        means = {f"eval_{name}": math.fsum(row[name] for row in rows) / len(rows) for name in names}
        return {name: value for name, value in loss.items() if name != "perplexity"} | means
