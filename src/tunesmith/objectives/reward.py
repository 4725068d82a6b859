"""Reward models: one number for an answer, learnt from which was preferred (Bradley and Terry 1952; Ouyang et al. 2022).

It is read at the last token of prompt and answer. Only differences between answers to one prompt are learnt;
``center_rewards_coefficient`` holds the numbers near zero. Nothing is dropped at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tunesmith import objectives
from tunesmith.data.batch import preference_batch
from tunesmith.data.encode import rankings, texts
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Ranking
from tunesmith.errors import DataError, ModelError
from tunesmith.metrics import token_mean
from tunesmith.models import network
from tunesmith.models.heads import head_types
from tunesmith.objectives import Batch, Example, Layout, Metrics, Traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUCKETS = 5
"""Of pairs by how much longer the better answer is: accuracy is given for each."""


OF_THE_LOSS = ("margin", "center_rewards_coefficient")
"""Keys that an evaluation of the saved model takes over."""


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    margin: bool = Field(
        False, description="the better answer is to lead by the difference of the scores in the data"
    )
    center_rewards_coefficient: float = Field(
        0.0, ge=0, description="weight of (r_chosen + r_rejected)^2, such as 0.01: holds rewards near zero"
    )
    overlong: Literal["error", "drop", "truncate"] = Field(
        "truncate",
        description="truncate = cut the prompt from the left, never an answer; a pair goes whole or not at all",
    )


class Objective(objectives.TaskHead):
    traits = Traits(
        rows=(Ranking,),
        head="score",
        fits_rows=True,
        deterministic=True,
        shares_prompts=True,
        starter={"path": "builtin:preference"},
        rewards=True,
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.traits = replace(self.traits, overlong=config.overlong)
        self._pad: int | None = None
        self._saved = False
        self._ours: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------------------ before encoding

    def bind(self, config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        if not network.is_causal(config):
            raise ModelError(
                f"{config.model_type} is an encoder: it has no turns and no end of an answer, where a reward is read.\n"
                "  Take a decoder such as smollm2-135m."
            )
        self.max_length = max_length
        ours = self._ours = getattr(config, "tunesmith", None) or {}
        texts.set_padding_token(tokenizer, getattr(config.get_text_config(), "vocab_size", None))
        self._pad = tokenizer.pad_token_id
        self._saved = ours.get("objective") == "reward" or (
            head_types.kind_of((config.architectures or [""])[0]) == "score" and config.num_labels == 1
        )
        self.facts |= {"pad": self._pad, "max_length": max_length, "overlong": self.config.overlong}

    def restore_labels(self) -> None:
        """The loss is that of its training. Raises DataError for a model without one number to give."""
        if not self._saved:
            raise DataError("this model has no head that gives a reward: train one with objective: reward")
        self.config = self.config.model_copy(
            update={name: self._ours[name] for name in OF_THE_LOSS if name in self._ours}
        )

    def scan(self, rows: Iterable[Any]) -> None:
        """Margins need scores."""
        if not self.config.margin:
            return
        several = with_scores = 0
        for row in rows:
            several += 1
            with_scores += isinstance(row, Ranking) and row.scores is not None
        if several and not with_scores:
            raise DataError(
                "objective.margin=true takes the difference of scores, and no row has any.\n"
                "  Add the columns chosen_score and rejected_score (or scores), or leave margin out."
            )
        self.notes.append(
            f"margins: {with_scores} of {several} rows have scores; of the others the margin is 0"
        )

    def head_config(self) -> dict[str, Any]:
        pad = {} if self._pad is None else {"pad_token_id": self._pad}
        return {
            "num_labels": 1,
            "id2label": {0: "LABEL_0"},  # as transformers names a single number
            "label2id": {"LABEL_0": 0},
            "problem_type": "regression",
            "tunesmith": {
                "objective": "reward",
                **{name: getattr(self.config, name) for name in OF_THE_LOSS},
            },
            **pad,
        }

    # ------------------------------------------------------------------------------------------------------- examples

    def encode(self, rows: Sequence[Ranking], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
        made = rankings.encode(rows, tokenizer, max_length=self.max_length, overlong=self.config.overlong)
        for index, examples in enumerate(made):
            for example in examples:
                last = example["input_ids"][np.cumsum(example["answers"])[1:] - 1]
                if self._pad is not None and self._pad in last:
                    raise RowFault(
                        index,
                        "answers that do not end in the padding token",
                        repr(tokenizer.pad_token),
                        "Remove it.",
                    )
        return made

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        return preference_batch.with_last_tokens(examples, layout)

    # ----------------------------------------------------------------------------------------------------------- loss

    def count(self, batch: Batch) -> int:
        """Rows: all pairs of a row together count as one."""
        return len(batch["rows"])

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, Metrics]:
        """Sum over rows of the mean over their pairs of -log sigmoid(r_better - r_worse - margin), equation 1."""
        losses, found = self._pairs(self._rewards(model, batch), batch)
        weights, count = batch["weights"].to(losses), len(batch["rows"])
        return (weights * losses).sum(), {
            name: ((weights * value.detach()).sum(), count) for name, value in found.items()
        }

    def _rewards(self, model: PreTrainedModel, batch: Batch) -> Any:
        """The number that each answer gets, (answers,)."""
        from tunesmith.models.heads import task_heads

        return task_heads.score_logits(model, batch)[:, 0]

    def _pairs(self, rewards: Any, batch: Batch) -> tuple[Any, dict[str, Any]]:
        """Loss and figures of each pair (n,)."""
        import torch

        better, worse = (rewards[places] for places in batch["pairs"].to(rewards.device).unbind(1))
        lead = better - worse
        due = lead - batch["margins"].to(lead) if self.config.margin else lead
        losses = -torch.nn.functional.logsigmoid(due)
        if self.config.center_rewards_coefficient:
            losses = losses + self.config.center_rewards_coefficient * (better + worse) ** 2
        return losses, {
            "rewards/chosen": better,
            "rewards/rejected": worse,
            "margin": lead,
            "accuracy": (lead > 0).to(lead) + (lead == 0).to(lead) / 2,
        }

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        """Of each row the rewards of its answers; of each of its pairs loss, lead, weight, and how many tokens apart they are."""
        import torch

        with torch.no_grad():
            rewards = self._rewards(model, batch)
            losses, found = self._pairs(rewards, batch)
        rows: list[dict[str, Any]] = [
            {"row": row, "rewards": some.tolist(), "pairs": []}
            for row, some in zip(batch["rows"], rewards.cpu().double().split(batch["counts"]), strict=True)
        ]
        longer = batch["tokens"].cpu()[batch["pairs"].cpu()]
        columns = (
            losses.cpu().double(),
            found["margin"].cpu().double(),
            batch["weights"].cpu(),
            longer[:, 0] - longer[:, 1],
        )
        for number, *values in zip(batch["of"], *(column.tolist() for column in columns), strict=True):
            rows[number]["pairs"].append(dict(zip(("loss", "lead", "weight", "longer"), values, strict=True)))
        return {"judged": rows}

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """eval_loss with its standard error, by row; eval_accuracy, eval_margin, eval_calibration_error over pairs."""
        rows = [row for record in records for row in record["judged"] if row["pairs"]]
        loss = token_mean.token_mean([{"rows": [(_mean(row, "loss"), 1) for row in rows]}])
        found = self.details(records)
        means = {
            f"eval_{name}": found[name]
            for name in ("accuracy", "margin", "calibration_error")
            if found[name] is not None
        }
        return {name: value for name, value in loss.items() if name != "perplexity"} | means

    def details(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """accuracy (share of pairs whose better answer gets more; a tie is half), margin, calibration of sigmoid(lead), and the
        accuracy by how many tokens the better answer is longer: does it only measure length?"""
        from tunesmith.metrics import classes

        rows = sorted((row for record in records for row in record["judged"]), key=lambda row: row["row"])
        pairs = [pair for row in rows for pair in row["pairs"]]
        if not pairs:
            return {
                "accuracy": None,
                "margin": None,
                "calibration_error": None,
                "calibration": [],
                "by_length": {},
                "pairs": 0,
            }
        lead, longer = (np.array([pair[name] for pair in pairs], float) for name in ("lead", "longer"))
        right = np.where(lead == 0, 0.5, lead > 0)
        sure = 1 / (1 + np.exp(-np.abs(lead)))
        bins = classes.calibration(sure, right)
        edges = np.unique(np.quantile(longer, np.linspace(0, 1, BUCKETS + 1)))
        by_length = {}
        for number, (low, high) in enumerate(pairwise(edges)):
            inside = (longer >= low) & ((longer < high) | ((number == len(edges) - 2) & (longer <= high)))
            if inside.any():
                by_length[f"{low:+.0f} to {high:+.0f} tokens"] = {
                    "pairs": int(inside.sum()), "accuracy": float(right[inside].mean()),
                }  # fmt: skip
        return {
            "pairs": len(pairs),
            "accuracy": float(right.mean()),
            "margin": math.fsum(lead) / len(lead),
            "calibration_error": classes.calibration_error(bins),
            "calibration": bins,
            "longer_is_better": float(np.mean(np.where(longer == 0, 0.5, longer > 0))),
            "by_length": by_length,
        }

    def answers(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of each row its rewards; the loss of its pairs, and whether all are in order."""
        rows = sorted((row for record in records for row in record["judged"]), key=lambda row: row["row"])
        return [
            {
                "row": list(row["row"]),
                "prediction": row["rewards"],
                "gold": None,
                "right": all(pair["lead"] > 0 for pair in row["pairs"]),
                "loss": _mean(row, "loss") if row["pairs"] else None,
            }
            for row in rows
        ]

    def present(self, row: Ranking, answer: dict[str, Any]) -> dict[str, Any]:
        """``reward`` of one answer; of several ``rewards`` in their order, ``ranking``: their numbers from 0, best first."""
        rewards = answer["prediction"]
        if len(rewards) == 1:
            return {"reward": rewards[0]}
        return {
            "rewards": rewards,
            "ranking": sorted(range(len(rewards)), key=lambda number: -rewards[number]),
        }


def _mean(row: dict[str, Any], name: str) -> float:
    return math.fsum(pair["weight"] * pair[name] for pair in row["pairs"])
