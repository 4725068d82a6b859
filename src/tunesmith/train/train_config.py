"""The recipe's ``train:`` and ``samples:`` keys."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tunesmith.json_types import JsonObject
from tunesmith.suggestions import did_you_mean

Every = float | Literal["epoch"] | None
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
TRACKERS = get_args(Tracker)
OPTIMS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd", "lion")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrainConfig(Strict):
    """Settings of the training loop. ``*_steps`` take a number, a share of the run below 1, or ``epoch``."""

    learning_rate: float | None = Field(
        None, gt=0, description="default: the adaptation's own (LoRA 2e-4, full 2e-5)"
    )
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, gt=0, description="number of optimiser steps, instead of epochs")
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="take fewer steps where the run would take longer; measured once, at its start",
    )
    batch_size: int = Field(8, gt=0, description="rows per optimiser step, over all processes")
    micro_batch_tokens: int | Literal["auto"] | None = Field(
        None,
        description="memory knob: tokens per forward pass; never changes the result; auto = what fits the machine; "
        "default: 1792 on a CPU (1280 in fp32), 2048 on a GPU",
    )
    max_length: int | None = Field(
        None, gt=1, description="default: the longest row, at most the model's window"
    )
    shuffle: bool = True
    packing: Literal["auto", "off"] = Field(
        "auto", description="auto = rows in one sequence without padding, where that is exact"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = Field(
        False, description="keep no activations of a layer, compute them again: less memory"
    )
    torch_compile: bool = Field(
        False, description="compile the decoder layers; on a GPU only, worth its minute in long runs"
    )
    neftune_noise_alpha: float | None = Field(
        None, gt=0, description="noise on the embeddings, such as 5 (Jain et al. 2023)"
    )
    optim: str | JsonObject = Field(
        "adamw",
        description=f"{', '.join(OPTIMS)}; with arguments: {{type: adamw, betas: [0.9, 0.95], eps: 1.0e-8}}",
    )
    head_learning_rate: float | None = Field(
        None, gt=0, description="rate of the output layer, if it is trained; default: learning_rate"
    )
    lr_scheduler_type: str | JsonObject = Field(
        "linear",
        description="any schedule of transformers; with arguments: {type: cosine_with_restarts, num_cycles: 2}",
    )
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 = no clipping")
    logging_steps: Every = 1.0
    eval_steps: Every = Field("epoch", description="null = only before and after")
    save_steps: Every = Field("epoch", description="null = only at the end")
    save_total_limit: int = Field(
        2, gt=0, description="checkpoints kept in addition to that of the best evaluation"
    )
    metric_for_best_model: str | None = Field(
        None, description="figure that chooses the saved model, such as f1; default: the objective's own"
    )
    early_stopping_patience: int | None = Field(
        None, gt=0, description="stop after this many evaluations without improvement"
    )
    early_stopping_threshold: float = Field(0.0, ge=0)
    report_to: list[Tracker] = Field(
        default_factory=list, description="trackers that receive every figure; none by default"
    )

    @property
    def best_figure(self) -> str | None:
        """Name of ``metric_for_best_model`` in an evaluation's figures: ``eval_f1`` for ``f1``."""
        name = self.metric_for_best_model
        return name if name is None or name.startswith("eval_") or name == "perplexity" else f"eval_{name}"

    @property
    def optim_name(self) -> str:
        return _name(self.optim)

    @property
    def optim_args(self) -> JsonObject:
        return _arguments(self.optim)

    @property
    def scheduler_name(self) -> str:
        return _name(self.lr_scheduler_type)

    @property
    def scheduler_args(self) -> JsonObject:
        return _arguments(self.lr_scheduler_type)

    @field_validator("optim", "lr_scheduler_type")
    @classmethod
    def _check_type(cls, chosen: str | JsonObject) -> str | JsonObject:
        """Require ``type`` in a mapping; reduce a mapping without arguments to its name."""
        if isinstance(chosen, str):
            return chosen
        if not isinstance(chosen.get("type"), str):
            raise ValueError(
                "the key `type` is missing: expected a name, or a mapping of `type` and its arguments"
            )
        return chosen if len(chosen) > 1 else str(chosen["type"])

    @field_validator("optim")
    @classmethod
    def _check_optim(cls, chosen: str | JsonObject) -> str | JsonObject:
        if _name(chosen) not in OPTIMS:
            raise ValueError(f"unknown optimiser {_name(chosen)!r}. {did_you_mean(_name(chosen), OPTIMS)}")
        return chosen

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError("set warmup_ratio or warmup_steps, not both")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = dict(self)[name]
            if isinstance(value, float) and (value <= 0 or (value > 1 and value != int(value))):
                raise ValueError(f"{name} must be a whole number, a share of the run below 1, or `epoch`")
        if isinstance(self.micro_batch_tokens, int) and self.micro_batch_tokens < 1:
            raise ValueError("micro_batch_tokens must be a number of tokens above 0, or `auto`")
        if self.early_stopping_patience and self.eval_steps is None:
            raise ValueError("early_stopping_patience needs eval_steps")
        return self


def _name(chosen: str | JsonObject) -> str:
    return str(chosen["type"]) if isinstance(chosen, dict) else chosen


def _arguments(chosen: str | JsonObject) -> JsonObject:
    return {key: value for key, value in chosen.items() if key != "type"} if isinstance(chosen, dict) else {}


class SampleConfig(Strict):
    """Sample prompts, answered at every evaluation."""

    prompts: list[str] | None = Field(None, description="default: the prompts of the first held-out rows")
    count: int = Field(3, ge=0, description="number of held-out prompts when none are given; 0 = none")
    max_new_tokens: int = Field(64, gt=0)


def interval(every: float | str | None, steps: int, steps_per_epoch: int) -> int | None:
    """Return the number of steps between two times; None = never.

    ``every``: a number of steps, a share of all steps below 1, ``epoch`` or None."""
    if every is None or every == "epoch":
        return steps_per_epoch if every else None
    number = float(every)
    return int(number) if number >= 1 else max(1, round(number * steps))


def due(every: float | str | None, step: int, steps: int, steps_per_epoch: int) -> bool:
    """Return whether an action with the interval ``every`` is due after ``step``."""
    between = interval(every, steps, steps_per_epoch)
    return between is not None and step % between == 0


def times(every: float | str | None, steps: int, steps_per_epoch: int) -> int:
    """Return how often an action is due in a run of ``steps`` steps, the last step included."""
    between = interval(every, steps, steps_per_epoch) or steps
    return -(-steps // between)
