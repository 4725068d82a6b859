"""KTO: learn from single responses labelled desirable or not (Ethayarajh et al. 2024, arXiv:2402.01306).

A response's reward is beta times log (policy / reference). It is compared with a baseline z_0, the KL
divergence of policy and reference, estimated once a step from responses to other prompts, over all rows of
the step and all processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from tunesmith import objectives
from tunesmith.data.batch import other_response, preference_batch
from tunesmith.data.batch.pack import to_device
from tunesmith.data.check import balance
from tunesmith.data.encode import judgements
from tunesmith.data.encode.templates import special_ends
from tunesmith.data.rows import Judged
from tunesmith.metrics.intervals import RowFigure
from tunesmith.objectives import (
    Baseline,
    Batch,
    Example,
    JsonObject,
    Layout,
    Metrics,
    Overlong,
    Session,
    Source,
    Step,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from tunesmith.data.batch.step import Plan
    from tunesmith.data.store.encoded_rows import Encoded


class Config(objectives.Config):
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto",
        description="kto = compare rewards with the KL baseline; apo_zero_unpaired = with 0 (D'Oosterlinck et al. 2024)",
    )
    beta: float = Field(0.1, gt=0, description="how closely the policy is kept to the reference")
    desirable_weight: float = Field(1.0, gt=0, description="weight of the loss of desirable responses")
    undesirable_weight: float = Field(1.0, gt=0, description="weight of the loss of undesirable responses")
    overlong: Overlong = Field("truncate", description="truncate = cut the prompt's left, never a response")

    @model_validator(mode="after")
    def _check_weights(self) -> Config:
        if self.desirable_weight != 1 and self.undesirable_weight != 1:
            raise ValueError(
                "set desirable_weight or undesirable_weight, not both: a factor common to both only scales the learning rate. "
                f"For the same balance set desirable_weight to {self.desirable_weight / self.undesirable_weight:g}"
            )
        return self


class Objective(objectives.Objective):
    config: Config
    traits = objectives.preference_traits(Judged, "builtin:judged", ("eval_loss", "eval_rewards/margins"))

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.estimates_kl = config.loss_type == "kto"
        self.prefix = np.zeros(0, np.int32)
        """Tokens that the tokenizer puts before a text; a prompt keeps them when its left is cut."""

    def bind(self, config: PreTrainedConfig, tokenizer: Tokenizer, max_length: int | None) -> None:
        super().bind(config, tokenizer, max_length)
        self.prefix = np.array(special_ends(tokenizer)[0], np.int32)

    def scan(self, rows: Iterable[object]) -> None:
        """Count desirable and undesirable rows. Raises DataError when one kind is missing."""
        counts = balance.balance(rows)
        counts.check()
        if advice := counts.advice(self.config.desirable_weight, self.config.undesirable_weight):
            self.notes.append(advice)

    def encode(self, rows: Sequence[Judged], tokenizer: Tokenizer) -> list[list[Example]]:
        return judgements.encode(rows, tokenizer, max_length=self.max_length, overlong=self.config.overlong)

    def extend(self, data: Encoded) -> Encoded:
        """Give each example the response to another prompt, from which the KL baseline is estimated."""
        return (
            other_response.attach_other_response(data, self.max_length, self.prefix)
            if self.estimates_kl
            else data
        )

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        """``desirable`` bool (n,); ``kl`` () in a step of the run; in a batch from which the baseline is
        still to be computed, ``other``: the batch of prompts with responses to other prompts."""
        import torch

        batch = preference_batch.with_targets(examples, layout)
        batch["desirable"] = torch.tensor([bool(example["desirable"][0]) for example in examples])
        if "kl" in examples[0]:
            batch["kl"] = examples[0]["kl"]
        elif self.estimates_kl and "other_ids" in examples[0]:
            others = [other_response.mismatched_pair(example) for example in examples]
            batch["other"] = preference_batch.with_targets(others, layout)
        return batch

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over rows of lambda_y - v(x, y), equation 8. The reported rewards exclude the baseline."""
        policy = _response_logps(model, batch)
        log_ratio = policy - self._reference(policy, batch)[:, 0]
        # without a baseline this is step 0, where the policy is its reference
        kl = batch["kl"].to(policy) if "kl" in batch else policy.new_zeros(())
        desirable = batch["desirable"].to(policy.device)
        rewards, logps = self.config.beta * log_ratio.detach(), policy.detach()
        metrics: Metrics = {
            f"{name}/{kind}": ((values * mask).sum(), mask.sum())
            for name, values in (("rewards", rewards), ("logps", logps))
            for kind, mask in (("chosen", desirable), ("rejected", ~desirable))
        }
        if self.estimates_kl:
            metrics["kl"] = (kl * len(policy), len(policy))
        return self._losses(log_ratio, kl, desirable).sum(), metrics

    def _losses(self, log_ratio: Tensor, kl: Tensor | float, desirable: Tensor) -> Tensor:
        """(n,): lambda_D (1 - sigmoid(beta (r - kl))) or lambda_U (1 - sigmoid(beta (kl - r)))."""
        import torch

        chosen = desirable.to(log_ratio)  # 0 or 1 in the precision of the log-probabilities
        weight = self.config.desirable_weight * chosen + self.config.undesirable_weight * (1 - chosen)
        return weight * (1 - torch.sigmoid(self.config.beta * (2 * chosen - 1) * (log_ratio - kl)))

    def _reference(self, policy: Tensor, batch: Batch) -> Tensor:
        """float64 (n, k): the reference's log p of the response and, where the KL is estimated, of the other
        response. Before the first step the policy is its own reference."""
        if "reference_logps" not in batch:
            return policy.detach()[:, None]
        reference: Tensor = batch["reference_logps"].to(policy)
        return reference.view(len(policy), -1)

    def reference_logps(self, model: PreTrainedModel, batch: Batch) -> list[Tensor]:
        """float64 (k,) of each row: log p of the response and, to estimate the KL, of the other one."""
        import torch

        logps = [_response_logps(model, batch)]
        if "other" in batch:
            logps.append(_response_logps(model, to_device(batch["other"], logps[0].device)))
        return list(torch.stack(logps, dim=1).cpu().double().unbind())

    def source(self, session: Session) -> Source:
        return BaselineSource(session.epochs, session, self) if self.estimates_kl else session.epochs

    def kl_terms(self, model: PreTrainedModel, batch: Batch) -> list[Tensor]:
        """log (policy / reference) of the response to another prompt, a scalar on the device for each row."""
        policy = _response_logps(model, to_device(batch["other"], batch["input_ids"].device))
        reference = self._reference(policy, batch)[:, 1] if "reference_logps" in batch else policy
        return list((policy - reference).unbind())

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> JsonObject:
        """For each row its log p, its log ratio, and the log ratio of the response to another prompt."""
        import torch

        with torch.no_grad():
            policy = _response_logps(model, batch)
            log_ratio = policy - self._reference(policy, batch)[:, 0]
            others = (
                torch.stack(self.kl_terms(model, batch)) if "other" in batch else torch.zeros_like(policy)
            )
        columns = [values.tolist() for values in (policy, log_ratio, batch["desirable"], others)]
        names = ("row", "logp", "ratio", "desirable", "other")
        return {"rows": [dict(zip(names, values)) for values in zip(batch["rows"], *columns, strict=True)]}

    def summarise(self, records: Sequence[JsonObject]) -> dict[str, float]:
        """``eval_loss`` with its standard error, ``eval_kl``, and means of rewards and log p."""
        rows = [row for record in records for row in record["rows"]]
        means = {}
        for kind, label in (("chosen", True), ("rejected", False)):
            if of_kind := [row for row in rows if row["desirable"] is label]:
                reward = self.config.beta * math.fsum(row["ratio"] for row in of_kind) / len(of_kind)
                means[f"eval_rewards/{kind}"] = reward
                means[f"eval_logps/{kind}"] = math.fsum(row["logp"] for row in of_kind) / len(of_kind)
        if len(means) == 4:
            means["eval_rewards/margins"] = means["eval_rewards/chosen"] - means["eval_rewards/rejected"]
        losses = [(loss, 1) for loss in self._row_losses(rows)]
        return objectives.mean_loss(losses) | means | ({"eval_kl": _kl(rows)} if self.estimates_kl else {})

    def _row_losses(self, rows: Sequence[JsonObject], ratio: float | None = None) -> list[float]:
        """Return the loss of each row of an evaluation; ``ratio``: as if this were each log ratio, without KL."""
        import torch

        ratios = [row["ratio"] if ratio is None else ratio for row in rows]
        desirable = torch.tensor([row["desirable"] for row in rows], dtype=torch.bool)
        kl = _kl(rows) if ratio is None else 0.0
        losses: list[float] = self._losses(torch.tensor(ratios, dtype=torch.float64), kl, desirable).tolist()
        return losses

    def baselines(self, records: Sequence[JsonObject]) -> dict[str, Baseline]:
        """Return the loss of the reference policy itself: every log ratio is 0."""
        rows = [row for record in records for row in record["rows"]]
        unchanged = {
            row["row"]: (loss, 1.0) for row, loss in zip(rows, self._row_losses(rows, 0.0), strict=True)
        }
        return {"eval_loss": Baseline.of_rows("the reference policy, unchanged", RowFigure(unchanged))}

    def row_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        """Return the loss, and rewards and log p of the chosen and the rejected answers.

        The KL term of the loss is one number for all rows. Its own sampling error is not in the interval."""
        rows = [row for record in records for row in record["rows"]]
        losses = {row["row"]: (loss, 1.0) for row, loss in zip(rows, self._row_losses(rows), strict=True)}
        values = {"rewards": ("ratio", self.config.beta), "logps": ("logp", 1.0)}
        return {"eval_loss": RowFigure(losses)} | {
            f"eval_{name}/{kind}": RowFigure(
                {row["row"]: (scale * row[key], 1.0) for row in rows if row["desirable"] is label}
            )
            for name, (key, scale) in values.items()
            for kind, label in (("chosen", True), ("rejected", False))
        }


def _kl(rows: Sequence[JsonObject]) -> float:
    """The KL baseline over the rows of an evaluation."""
    return max(0.0, math.fsum(row["other"] for row in rows) / max(1, len(rows)))


@dataclass(frozen=True)
class BaselineSource:
    """The recipe's rows in their order, with the KL baseline of each step in its examples: z_0 = max(0, mean
    of log (policy / reference) over responses to other prompts), below equation 8. Computed without gradients
    before the step."""

    rows: Source
    session: Session
    objective: Objective

    @property
    def plan(self) -> Plan:
        return self.rows.plan

    def steps(self, start: int) -> Iterator[Step]:
        for step in self.rows.steps(start):
            shared = [{"kl": self.baseline(step)}] * len(step)
            yield step.with_arrays(shared)  # type: ignore[arg-type]  # a tensor, so that it stays on the device

    def baseline(self, step: Step) -> Tensor:
        """() on the device: the estimate over all rows of the step and all processes."""
        import torch

        terms = list(self.session.forward(self.objective.kl_terms, step).values())
        zero = torch.zeros((), dtype=torch.float64, device=self.session.device)
        local = torch.stack(terms).sum() if terms else zero
        return (self.session.all_reduce(local) / len(step)).clamp(min=0)

    def preview(self, most: int) -> Sequence[Step]:
        return self.rows.preview(most)

    def distinct(self) -> Step | None:
        return self.rows.distinct()

    def state(self) -> tuple[dict[str, Tensor], JsonObject]:
        return self.rows.state()

    def load(self, tensors: Mapping[str, Tensor], state: JsonObject) -> None:
        self.rows.load(tensors, state)


def _response_logps(model: PreTrainedModel, batch: Batch) -> Tensor:
    """log p(response | prompt) of each row, float64 (n,)."""
    from tunesmith.models.heads.log_probs import answer_logps

    return answer_logps(model, batch)
