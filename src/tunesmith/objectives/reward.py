"""Reward models: score an answer; trained on preferences (Bradley and Terry 1952; Ouyang et al. 2022).

The reward is read at the last token of prompt and answer. Only differences between answers to one prompt are
trained; ``center_rewards_coefficient`` keeps the rewards near zero. Dropout is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from tunesmith import objectives
from tunesmith.data.batch import preference_batch
from tunesmith.data.encode import rankings
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Ranking
from tunesmith.errors import DataError, ModelError
from tunesmith.metrics import classes
from tunesmith.metrics.class_problems import calibration_terms
from tunesmith.metrics.intervals import RowFigure
from tunesmith.models import network
from tunesmith.objectives import Baseline, Batch, Example, JsonObject, Layout, Metrics, Overlong, Traits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

LENGTH_BUCKETS = 5
"""Accuracy is reported for this many groups of pairs, by how much longer the chosen answer is."""

LOSS_KEYS = {"margin", "center_rewards_coefficient"}
"""Saved with the model, so that a later evaluation computes the loss of its training."""


class Config(objectives.Config):
    margin: bool = Field(
        False, description="require the chosen answer to lead by the difference of the scores in the data"
    )
    center_rewards_coefficient: float = Field(
        0.0, ge=0, description="weight of (r_chosen + r_rejected)^2, such as 0.01: keeps rewards near zero"
    )
    overlong: Overlong = Field(
        "truncate",
        description="truncate = cut the prompt from the left, never an answer; a pair is dropped when an answer is too long",
    )


class Objective(objectives.TaskHead):
    config: Config
    traits = Traits(
        rows=(Ranking,),
        head="score",
        figures=("eval_loss", "eval_accuracy", "eval_margin", "eval_calibration_error"),
        fits_rows=True,
        deterministic=True,
        shares_prompts=True,
        starter={"path": "builtin:preference"},
        rewards=True,
    )

    def bind(self, config: PreTrainedConfig, tokenizer: Tokenizer, max_length: int | None) -> None:
        if not network.is_causal(config):
            raise ModelError(
                f"objective: reward needs a decoder, which reads an answer to its end; {config.model_type} is an encoder.\n"
                "  Choose a decoder such as smollm2-135m."
            )
        super().bind(config, tokenizer, max_length)
        self.has_head = self.has_head and config.num_labels == 1
        self.facts |= {"pad": self.pad}

    def restore_labels(self) -> None:
        """Take the keys of the loss from the model. Raises DataError without a head of one output."""
        super().restore_labels()
        saved = {name: value for name, value in self.saved.items() if name in LOSS_KEYS}
        self.config = self.config.model_copy(update=saved)

    def scan(self, rows: Iterable[object]) -> None:
        """Count the rows with scores, which margins need. Raises DataError when there are none."""
        if not self.config.margin:
            return
        scored = [isinstance(row, Ranking) and row.scores is not None for row in rows]
        if scored and not any(scored):
            raise DataError(
                "objective.margin=true takes the difference of scores, and no row has any.\n"
                "  Add the columns chosen_score and rejected_score (or scores), or leave margin out."
            )
        self.notes.append(
            f"margins: {sum(scored)} of {len(scored)} rows have scores; for the others the margin is 0"
        )

    def head_config(self) -> JsonObject:
        saved = self.config.model_dump(include=LOSS_KEYS)
        return self.label_config(
            ["LABEL_0"], saved, problem_type="regression"
        )  # transformers' name for a number

    def encode(self, rows: Sequence[Ranking], tokenizer: Tokenizer) -> list[list[Example]]:
        encoded = rankings.encode(rows, tokenizer, max_length=self.max_length, overlong=self.config.overlong)
        for index, examples in enumerate(encoded):
            for example in examples:
                last_tokens = example["input_ids"][np.cumsum(example["answers"])[1:] - 1]
                if self.pad is not None and self.pad in last_tokens:
                    expected = "answers that do not end in the padding token"
                    raise RowFault(index, expected, repr(tokenizer.pad_token), "Remove it.")
        return encoded

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        return preference_batch.with_last_tokens(examples, layout)

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over rows of the mean over pairs of -log sigmoid(r_chosen - r_rejected - margin), eq. 1."""
        return objectives.sum_over_pairs(*self._compare(_rewards(model, batch), batch), batch)

    def _compare(self, rewards: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures of each pair (n,)."""
        import torch

        chosen, rejected = (rewards[answers] for answers in batch["pairs"].to(rewards.device).unbind(1))
        lead = chosen - rejected
        surplus = lead - batch["margins"].to(lead) if self.config.margin else lead
        losses = -torch.nn.functional.logsigmoid(surplus)
        if self.config.center_rewards_coefficient:
            losses = losses + self.config.center_rewards_coefficient * (chosen + rejected) ** 2
        return losses, {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "margin": lead,
            "accuracy": (lead > 0).to(lead) + (lead == 0).to(lead) / 2,
        }

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> JsonObject:
        """For each row the rewards of its answers, and for each of its pairs loss, lead, weight, and by how
        many tokens the chosen answer is longer."""
        import torch

        with torch.no_grad():
            rewards = _rewards(model, batch)
            losses, figures = self._compare(rewards, batch)
        rows: list[JsonObject] = [
            {"row": row, "rewards": of_row.tolist(), "pairs": []}
            for row, of_row in zip(
                batch["rows"], torch.split(rewards.cpu().double(), batch["counts"]), strict=True
            )
        ]
        chosen_tokens, rejected_tokens = batch["tokens"].cpu()[batch["pairs"].cpu()].unbind(1)
        columns = {
            "loss": losses.cpu().double().tolist(),
            "lead": figures["margin"].cpu().double().tolist(),
            "weight": batch["weights"].tolist(),
            "longer": (chosen_tokens - rejected_tokens).tolist(),
        }
        for row_of_pair, *values in zip(batch["of"], *columns.values(), strict=True):
            rows[row_of_pair]["pairs"].append(dict(zip(columns, values, strict=True)))
        return {"rows": rows}

    def summarise(self, records: Sequence[JsonObject]) -> dict[str, float]:
        """eval_loss by row, with its standard error; accuracy, margin, calibration error over pairs."""
        losses = [(_mean_loss(row), 1) for record in records for row in record["rows"] if row["pairs"]]
        details = self.details(records)
        names = [name for name in ("accuracy", "margin", "calibration_error") if details[name] is not None]
        return objectives.mean_loss(losses) | {f"eval_{name}": details[name] for name in names}

    def details(self, records: Sequence[JsonObject]) -> JsonObject:
        """accuracy (share of pairs whose chosen answer has the higher reward; a tie is half), margin,
        calibration of sigmoid(lead), and the accuracy by length difference, which shows whether the model
        only rewards length."""
        pairs = [pair for row in _sorted_rows(records) for pair in row["pairs"]]
        if not pairs:
            empty = dict.fromkeys(("accuracy", "margin", "calibration_error"))
            return {**empty, "calibration": [], "by_length": {}, "pairs": 0}
        lead, longer = (np.array([pair[name] for pair in pairs], float) for name in ("lead", "longer"))
        confidence, right = _confidence(lead)
        bins = classes.calibration(confidence, right)
        edges = np.unique(np.quantile(longer, np.linspace(0, 1, LENGTH_BUCKETS + 1)))
        by_length = {}
        for low, high in pairwise(edges):
            inside = (longer >= low) & ((longer < high) | ((high == edges[-1]) & (longer <= high)))
            if inside.any():
                accuracy = float(right[inside].mean())
                by_length[f"{low:+.0f} to {high:+.0f} tokens"] = {
                    "pairs": int(inside.sum()),
                    "accuracy": accuracy,
                }
        return {
            "pairs": len(pairs),
            "accuracy": float(right.mean()),
            "margin": math.fsum(lead) / len(lead),
            "calibration_error": classes.calibration_error(bins),
            "calibration": bins,
            "longer_is_better": float(np.mean(np.where(longer == 0, 0.5, longer > 0))),
            "by_length": by_length,
        }

    def row_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        rows = [row for row in _sorted_rows(records) if row["pairs"]]

        def over_pairs(value: Callable[[JsonObject], float]) -> RowFigure:
            return RowFigure(
                {row["row"]: (math.fsum(map(value, row["pairs"])), float(len(row["pairs"]))) for row in rows}
            )

        if not rows:
            return {}
        number = np.repeat(np.arange(len(rows)), [len(row["pairs"]) for row in rows])
        lead = np.array([pair["lead"] for row in rows for pair in row["pairs"]], float)
        calibration = calibration_terms(*_confidence(lead), rows=number).at([row["row"] for row in rows])
        return {
            "eval_loss": RowFigure({row["row"]: (_mean_loss(row), 1.0) for row in rows}),
            "eval_accuracy": over_pairs(lambda pair: _side(pair["lead"])),
            "eval_margin": over_pairs(lambda pair: float(pair["lead"])),
            "eval_calibration_error": calibration,
        }

    def baselines(self, records: Sequence[JsonObject]) -> dict[str, Baseline]:
        """Return the accuracy of always choosing the longer, or the shorter, answer of a pair; of loss and margin,
        those of equal rewards."""
        longer = {
            row["row"]: (math.fsum(_side(pair["longer"]) for pair in row["pairs"]), float(len(row["pairs"])))
            for row in _sorted_rows(records)
            if row["pairs"]
        }
        if not longer:
            return {}
        equal = (
            RowFigure(dict.fromkeys(longer, (math.log(2), 1.0))),
            RowFigure(dict.fromkeys(longer, (0.0, 1.0))),
        )
        return {"eval_accuracy": objectives.always_longer(longer)} | {
            name: Baseline.of_rows("equal rewards", figure)
            for name, figure in zip(("eval_loss", "eval_margin"), equal)
        }

    def remarks(self, records: Sequence[JsonObject]) -> list[str]:
        rewards = {reward for row in _sorted_rows(records) for reward in row["rewards"]}
        return ["it gives every answer the same reward"] if len(rewards) == 1 else []

    def answers(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        """For each row its rewards, the loss of its pairs, and whether every pair is ranked correctly."""
        return [
            {
                "row": list(row["row"]),
                "prediction": row["rewards"],
                "gold": None,
                "right": all(pair["lead"] > 0 for pair in row["pairs"]),
                "loss": _mean_loss(row) if row["pairs"] else None,
            }
            for row in _sorted_rows(records)
        ]

    def present(self, row: Ranking, answer: JsonObject) -> JsonObject:
        """``reward`` of one answer; of several ``rewards``, and ``ranking``: indices, best first."""
        rewards = answer["prediction"]
        if len(rewards) == 1:
            return {"reward": rewards[0]}
        ranking = sorted(range(len(rewards)), key=lambda index: -rewards[index])
        return {"rewards": rewards, "ranking": ranking}


def _rewards(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The reward of each answer, (answers,)."""
    from tunesmith.models.heads import task_heads

    return task_heads.score_logits(model, batch)[:, 0]


def _confidence(lead: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of the preferred answer of each pair, and 1 if it is the chosen one (a tie: 1/2)."""
    return 1 / (1 + np.exp(-np.abs(lead))), np.where(lead == 0, 0.5, lead > 0)


def _side(difference: float) -> float:
    """Return 1 for a positive difference, 0 for a negative one, 1/2 for zero."""
    return 0.5 if difference == 0 else float(difference > 0)


def _sorted_rows(records: Sequence[JsonObject]) -> list[JsonObject]:
    return sorted((row for record in records for row in record["rows"]), key=lambda row: row["row"])


def _mean_loss(row: JsonObject) -> float:
    """The weighted mean loss of a row's pairs; their weights sum to 1."""
    return math.fsum(pair["weight"] * pair["loss"] for pair in row["pairs"])
