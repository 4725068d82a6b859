"""KTO: learn from single responses that were judged desirable or not (Ethayarajh et al. 2024, arXiv:2402.01306).

A response's reward is beta times log (policy / reference). It is compared with a baseline z_0, the KL divergence of policy and
reference, estimated once a step from responses to other prompts, over all rows of the step and all processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith import objectives
from tunesmith.data.batch import other_response, preference_batch
from tunesmith.data.batch.pack import to_device
from tunesmith.data.check import balance
from tunesmith.data.encode import judgements
from tunesmith.data.encode.templates import special_ends
from tunesmith.data.rows import Judged
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.metrics import token_mean
from tunesmith.objectives import Batch, Example, Layout, Metrics, Session, Source, Step, Traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto",
        description="kto = rewards are compared with the KL baseline; apo_zero_unpaired = with 0 (D'Oosterlinck et al. 2024)",
    )
    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")
    desirable_weight: float = Field(1.0, gt=0, description="weight of the loss of desirable responses")
    undesirable_weight: float = Field(1.0, gt=0, description="weight of the loss of undesirable responses")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "truncate", description="truncate = cut the prompt from the left, never a response"
    )

    @model_validator(mode="after")
    def _one_weight(self) -> Config:
        if self.desirable_weight != 1 and self.undesirable_weight != 1:
            raise ValueError(
                "set desirable_weight or undesirable_weight, not both: a factor common to both scales the learning rate alone. "
                f"For the same balance set desirable_weight to {self.desirable_weight / self.undesirable_weight:g}"
            )
        return self


class Objective(objectives.Objective):
    traits = Traits(
        rows=(Judged,),
        fits_rows=True,
        deterministic=True,
        shares_prompts=True,
        needs_reference=True,
        starter={"path": "builtin:judged"},
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.traits = replace(self.traits, overlong=config.overlong)
        self.estimates_kl = config.loss_type == "kto"
        self.prefix = np.zeros(0, np.int32)
        """Tokens that the tokenizer puts before a text; a prompt keeps them when its left is cut."""

    def bind(self, config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        super().bind(config, tokenizer, max_length)
        self.facts |= {"max_length": max_length, "overlong": self.config.overlong}
        self.prefix = np.array(special_ends(tokenizer)[0], np.int32)

    def scan(self, rows: Iterable[Any]) -> None:
        """Count both kinds. Raises DataError when one of them is missing."""
        found = balance.balance(rows)
        found.check()
        if advice := found.advice(self.config.desirable_weight, self.config.undesirable_weight):
            self.notes.append(advice)

    def encode(self, rows: Sequence[Judged], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
        return judgements.encode(rows, tokenizer, max_length=self.max_length, overlong=self.config.overlong)

    def extend(self, data: Encoded) -> Encoded:
        """Give each example the response to another prompt, from which the KL baseline is estimated."""
        return (
            other_response.attach_other_response(data, self.max_length, self.prefix)
            if self.estimates_kl
            else data
        )

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        """``desirable`` bool (n,); ``kl`` () in a step of the run; before it has a baseline, ``other``: the batch of prompts
        with responses to other prompts."""
        import torch

        batch = preference_batch.with_targets(examples, layout)
        batch["desirable"] = torch.tensor([bool(example["desirable"][0]) for example in examples])
        if "kl" in examples[0]:
            batch["kl"] = examples[0]["kl"]
        elif self.estimates_kl and "other_ids" in examples[0]:
            batch["other"] = preference_batch.with_targets(
                [other_response.mismatched_pair(example) for example in examples], layout
            )
        return batch

    def count(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["rows"])

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, Metrics]:
        """Sum over rows of lambda_y - v(x, y), equation 8. Rewards are given without the baseline."""
        policy = _logps(model, batch)
        log_ratio = policy - self._reference(policy, batch)[:, 0]
        kl = (
            batch["kl"].to(policy) if "kl" in batch else policy.new_zeros(())
        )  # at step 0 the policy is its reference
        good = batch["desirable"].to(policy.device)
        rewards, logps = self.config.beta * log_ratio.detach(), policy.detach()
        metrics: Metrics = {
            f"{name}/{kind}": ((values * mask).sum(), mask.sum())
            for name, values in (("rewards", rewards), ("logps", logps))
            for kind, mask in (("chosen", good), ("rejected", ~good))
        }
        if self.estimates_kl:
            metrics["kl"] = (kl * len(policy), len(policy))
        return self._losses(log_ratio, kl, good).sum(), metrics

    def _losses(self, log_ratio: Any, kl: Any, good: Any) -> Any:
        """(n,): desirable lambda_D (1 - sigmoid(beta (r - kl))), undesirable lambda_U (1 - sigmoid(beta (kl - r)))."""
        import torch

        chosen = good.to(log_ratio)  # 0 or 1 in the precision of the log-probabilities
        weight = self.config.desirable_weight * chosen + self.config.undesirable_weight * (1 - chosen)
        return weight * (1 - torch.sigmoid(self.config.beta * (2 * chosen - 1) * (log_ratio - kl)))

    def _reference(self, policy: PreTrainedModel, batch: Batch) -> Any:
        """float64 (n, k): the reference's log p of the response and, where the KL is estimated, of the other one. Before its
        first step the policy is its own reference."""
        if "reference_logps" not in batch:
            return policy.detach()[:, None]
        return batch["reference_logps"].to(policy).view(len(policy), -1)

    def reference_logps(self, model: PreTrainedModel, batch: Batch) -> list[Any]:
        """For each row float64 (k,): log p of the response and, where the KL is estimated, of the other one."""
        import torch

        found = [_logps(model, batch)]
        if "other" in batch:
            found.append(_logps(model, to_device(batch["other"], found[0].device)))
        return list(torch.stack(found, dim=1).cpu().double().unbind())

    def source(self, session: Session) -> Source:
        return WithBaseline(session.epochs, session, self) if self.estimates_kl else session.epochs

    def kl_terms(self, model: PreTrainedModel, batch: Batch) -> list[Any]:
        """For each row log (policy / reference) of the response to another prompt, on the device."""
        policy = _logps(model, to_device(batch["other"], batch["input_ids"].device))
        if "reference_logps" not in batch:
            return list((policy - policy).unbind())
        return list((policy - self._reference(policy, batch)[:, 1]).unbind())

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        """For each row its log-probability, log ratio, and that of the response to another prompt."""
        import torch

        with torch.no_grad():
            policy = _logps(model, batch)
            log_ratio = policy - self._reference(policy, batch)[:, 0]
            others = (
                torch.stack(self.kl_terms(model, batch)) if "other" in batch else torch.zeros_like(policy)
            )
        found = [values.tolist() for values in (policy, log_ratio, batch["desirable"], others)]
        return {
            "judged": [
                {"row": row, "logp": logp, "ratio": ratio, "desirable": good, "other": other}
                for row, logp, ratio, good, other in zip(batch["rows"], *found, strict=True)
            ]
        }

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """eval_loss with its standard error, the baseline of all rows as eval_kl, and means of rewards and log-probabilities."""
        import torch

        rows = [row for record in records for row in record["judged"]]
        kl = max(0.0, math.fsum(row["other"] for row in rows) / max(1, len(rows)))
        ratios = torch.tensor([row["ratio"] for row in rows], dtype=torch.float64)
        losses = self._losses(
            ratios, kl, torch.tensor([row["desirable"] for row in rows], dtype=torch.bool)
        ).tolist()
        found = token_mean.token_mean([{"rows": [(loss, 1) for loss in losses]}])
        figures = {name: value for name, value in found.items() if name != "perplexity"}
        means = {}
        for kind, good in (("chosen", True), ("rejected", False)):
            some = [row for row in rows if row["desirable"] is good]
            if some:
                means[f"eval_rewards/{kind}"] = (
                    self.config.beta * math.fsum(row["ratio"] for row in some) / len(some)
                )
                means[f"eval_logps/{kind}"] = math.fsum(row["logp"] for row in some) / len(some)
        if len(means) == 4:
            means["eval_rewards/margins"] = means["eval_rewards/chosen"] - means["eval_rewards/rejected"]
        return figures | means | ({"eval_kl": kl} if self.estimates_kl else {})


@dataclass(frozen=True)
class WithBaseline:
    """Rows in their order, each step with its KL baseline: z_0 = max(0, mean of log (policy / reference) over responses to
    other prompts), below equation 8. It is computed before the step, without gradients, and travels in the examples."""

    rows: Source
    session: Session
    objective: Objective

    @property
    def plan(self) -> Any:
        return self.rows.plan

    def steps(self, start: int) -> Iterator[Step]:
        for step in self.rows.steps(start):
            yield step.with_arrays([{"kl": self.baseline(step)}] * len(step))

    def baseline(self, step: Step) -> Any:
        """() on the device: the estimate over all rows of the step and all processes."""
        import torch

        terms = list(self.session.forward(self.objective.kl_terms, step).values())
        here = (
            torch.stack(terms).sum()
            if terms
            else torch.zeros((), dtype=torch.float64, device=self.session.device)
        )
        return (self.session.all_reduce(here) / len(step)).clamp(min=0)

    def preview(self, most: int) -> Sequence[Step]:
        return self.rows.preview(most)

    def distinct(self) -> Step | None:
        return self.rows.distinct()

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.rows.state()

    def load(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self.rows.load(tensors, state)


def _logps(model: PreTrainedModel, batch: Batch) -> Any:
    """log p(response | prompt) of each row, float64 (n,)."""
    from tunesmith.models.heads.log_probs import answer_logps

    return answer_logps(model, batch)
