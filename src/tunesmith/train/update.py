"""From gradients to new weights: what one optimiser step does after its micro-batches, and what of it a checkpoint keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from tunesmith.errors import GradientOverflowError
from tunesmith.train.master_weights import Trained
from tunesmith.train.precision import MOST_SKIPPED, LossScale
from tunesmith.train.update_ratio import Ratio


class Update:
    """What is trained, with its optimiser and schedule. The loop calls ``backward`` for each micro-batch, then ``norm``, then
    either ``apply`` or ``drop``; it knows nothing of what lies behind them.

    ``loss_scale`` is given when the network computes in fp16: then a gradient that overflowed costs a step, not the run.
    """

    def __init__(
        self,
        masters: Trained,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        max_norm: float,
        seed: int,
        loss_scale: LossScale | None = None,
    ) -> None:
        sampled = masters.sampled()
        assert all(master.dtype is torch.float32 for master in sampled.values()), (
            "what is trained is kept in fp32"
        )
        self.masters = masters
        self.optimizer = optimizer
        self.schedule = schedule
        self.max_norm = max_norm
        self.seed = seed
        self.ratio = Ratio(sampled, shared=masters.share < 1)
        self.loss_scale = loss_scale
        self.published: int | None = None
        """The step whose random bits rounded the working copies; None = they are as they were loaded."""
        self._overflowed = False

    @property
    def learning_rates(self) -> dict[str, float]:
        """Of the update that comes next: ``learning_rate``, and one key more for each group that learns at another rate."""
        groups = self.optimizer.param_groups
        return {
            "learning_rate": float(groups[0]["lr"]),
            **{group["logged"]: float(group["lr"]) for group in groups},
        }

    @property
    def waits_for_metric(self) -> bool:
        """Whether the schedule moves with an evaluation's figure instead of with each step."""
        return isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)

    @property
    def advice(self) -> str:
        """What else may be wrong when a loss is not finite, as part of a sentence."""
        return "use train.precision=bf16 (fp16 holds no activation above 65504), " if self.loss_scale else ""

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Add the gradient of ``loss`` (a sum, already divided by the loss units of the whole step); ``last`` of the step."""
        self.masters.backward(self._scaled(loss), last)

    def rehearse(self, loss: torch.Tensor, last: bool = True) -> None:
        """The work of ``backward``, whose gradient nobody wants."""
        self.masters.rehearse(self._scaled(loss))

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    def norm(self, loss: torch.Tensor) -> tuple[float, float]:
        """Sum the gradients over processes and clip them. Returns (``loss``, the norm before that) as numbers: the one time in
        a step that the host waits for the device. ``apply`` only when they ``may_go_on``."""
        on_device = self.masters.norm(self.loss_scale.scale if self.loss_scale else 1.0)
        pending = self.ratio.pending()
        message = torch.stack([loss.to(on_device.device), on_device.to(loss.dtype)])
        if pending is not None:
            message = torch.cat([message, pending.to(message)])
        value, norm, *flags = message.tolist()
        if flags:
            self.ratio.settle(flags)
        self.masters.clip(norm, self.max_norm)
        self._overflowed = self.loss_scale is not None and not math.isfinite(norm)
        return value, norm

    def may_go_on(self, loss: float, norm: float) -> bool:
        """Whether a step may end with ``apply``: it is finite, or fp16 overflowed where the loss itself did not."""
        return math.isfinite(loss) and (math.isfinite(norm) or self.loss_scale is not None)

    def apply(self, step: int) -> None:
        """Update the weights as step ``step``, counted from 1, and forget the gradients.

        A gradient that overflowed in fp16 is forgotten alone: weights and schedule stay as they are, the loss scale is halved.
        Raises GradientOverflowError when that happened too often in a row.
        """
        if self.loss_scale is not None:
            self.loss_scale.after(finite=not self._overflowed)
        if self._overflowed:
            self.ratio.stood_still()
            self.drop()
            self._stop_when_hopeless(step)
            return
        self.ratio.before()
        self.masters.step(self.optimizer, self.seed, step)
        self.ratio.after(self.learning_rates["learning_rate"])
        self.published = step
        if not self.waits_for_metric:
            self.schedule.step()

    def skip(self, steps: int) -> None:
        """Move the schedule past steps of the plan that its source leaves out."""
        for _ in range(0 if self.waits_for_metric else steps):
            self.schedule.step()

    def _stop_when_hopeless(self, step: int) -> None:
        assert self.loss_scale is not None  # only fp16 overflows
        if self.loss_scale.in_a_row >= MOST_SKIPPED:
            raise GradientOverflowError(
                f"step {step}: the gradient overflowed fp16 in {self.loss_scale.in_a_row} steps in a row, at loss scales down to "
                f"{2 * self.loss_scale.scale:g}; none of them changed a weight.\n"
                "  Start again with train.precision=bf16 or fp32: this model needs larger numbers than fp16 has."
            )

    def drop(self) -> None:
        """Forget the gradients."""
        self.masters.clear()
        self._overflowed = False

    def figures(self) -> dict[str, float]:
        """What a record holds of the updates so far: in fp16 ``loss_scale`` (of the next step) and ``skipped_steps``."""
        if self.loss_scale is None:
            return {}
        return {"loss_scale": self.loss_scale.scale, "skipped_steps": self.loss_scale.skipped}

    def judge(self, figure: float) -> None:
        """Tell the schedule an evaluation's figure."""
        if self.waits_for_metric:
            self.schedule.step(figure)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Masters and optimiser moments, by name. All processes call it; only the main one needs what it returns."""
        return self.masters.tensors(self.optimizer)

    def state(self) -> dict[str, Any]:
        """The plain numbers that belong to ``tensors``."""
        return {
            "schedule": {key: value for key, value in self.schedule.state_dict().items() if _is_plain(value)},
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "optimizer": self.masters.numbers(self.optimizer),
            "published": self.published,
            "loss_scale": asdict(self.loss_scale) if self.loss_scale else None,
        }

    def load(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Stand where ``tensors`` and ``state`` were taken."""
        self.published = state["published"]
        copies = None if self.published is None else (self.seed, self.published)
        self.masters.load(self.optimizer, tensors, state["optimizer"], copies)
        self.schedule.load_state_dict({**self.schedule.state_dict(), **state["schedule"]})
        for group, rate in zip(self.optimizer.param_groups, state["learning_rates"], strict=True):
            group["lr"] = rate
        if (
            self.loss_scale is not None and state["loss_scale"]
        ):  # which of them there is, is said by what this run computes in
            self.loss_scale = LossScale(**state["loss_scale"])


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | type(None)) or (
        isinstance(value, list) and all(map(_is_plain, value))
    )
