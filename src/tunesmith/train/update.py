"""From gradients to new weights: the part of an optimiser step after its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

import torch

from tunesmith.errors import GradientOverflowError
from tunesmith.json_types import JsonObject
from tunesmith.train.master_weights import TrainedWeights
from tunesmith.train.precision import MAX_OVERFLOWS, LossScale
from tunesmith.train.update_ratio import UpdateRatio


class Update:
    """The trained weights with their optimiser and schedule.

    The loop calls ``backward`` for each micro-batch, then ``norm``, then ``apply`` or ``clear_gradients``.
    ``loss_scale`` is given when the network computes in fp16: then a gradient that overflows costs a step,
    not the run.
    """

    def __init__(
        self,
        masters: TrainedWeights,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        max_norm: float,
        seed: int,
        loss_scale: LossScale | None = None,
    ) -> None:
        sampled = masters.sampled()
        assert all(master.dtype is torch.float32 for master in sampled.values()), "masters must be fp32"
        self.masters = masters
        self.optimizer = optimizer
        self.schedule = schedule
        self.max_norm = max_norm
        self.seed = seed
        self.ratio = UpdateRatio(sampled, sharded=masters.share < 1)
        self.loss_scale = loss_scale
        self.published: int | None = None
        """The step whose random bits rounded the working copies; None = no step has rounded them yet."""
        self._overflowed = False

    @property
    def learning_rates(self) -> dict[str, float]:
        """Rates of the next update: ``learning_rate``, and one more key for each group with another rate."""
        groups = self.optimizer.param_groups
        rates = {group["logged"]: float(group["lr"]) for group in groups}
        return {"learning_rate": float(groups[0]["lr"]), **rates}

    @property
    def advice(self) -> str:
        """A possible remedy for a loss that is not finite, as part of a sentence."""
        return "use train.precision=bf16 (fp16 holds no activation above 65504), " if self.loss_scale else ""

    def backward(self, loss: torch.Tensor, last: bool = True, turn: int | None = None) -> None:
        """Add the gradient of ``loss`` (a sum, already divided by the loss units of the whole step).

        ``last``: this is the last micro-batch of the step. ``turn``: see ``train.lane_gradients``.
        """
        self.masters.backward(self._scaled(loss), last, turn)

    def rehearse(self, loss: torch.Tensor, last: bool = True, turn: int | None = None) -> None:
        """Do the work of ``backward`` for a gradient that ``clear_gradients`` discards."""
        self.masters.rehearse(self._scaled(loss), turn)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    def norm(self, loss: torch.Tensor) -> tuple[float, float]:
        """Sum gradients over processes and clip them. Returns (``loss``, norm before clipping) as numbers.

        Only here does the host wait for the device. Call ``apply`` only if the numbers are ``is_applicable``.
        """
        device_norm = self.masters.norm(self.loss_scale.scale if self.loss_scale else 1.0)
        message = torch.stack([loss.to(device_norm.device), device_norm.to(loss.dtype)])
        moved = self.ratio.moved_flags()
        if moved is not None:
            message = torch.cat([message, moved.to(message)])
        value, norm, *flags = message.tolist()
        if flags:
            self.ratio.receive_flags(flags)
        self.masters.clip(norm, self.max_norm)
        self._overflowed = self.loss_scale is not None and not math.isfinite(norm)
        return value, norm

    def is_applicable(self, loss: float, norm: float) -> bool:
        """Return whether ``apply`` may follow: both are finite, or only the fp16 gradient overflowed."""
        return math.isfinite(loss) and (math.isfinite(norm) or self.loss_scale is not None)

    def apply(self, step: int) -> None:
        """Update the weights as step ``step``, counted from 1, and clear the gradients.

        When the fp16 gradient overflowed, weights and schedule stay as they are and the loss scale is halved.
        Raises GradientOverflowError when that happened ``MAX_OVERFLOWS`` times in a row.
        """
        if self.loss_scale is not None:
            self.loss_scale.update(finite=not self._overflowed)
            if self._overflowed:
                self.ratio.record_no_update()
                self.clear_gradients()
                if self.loss_scale.in_a_row >= MAX_OVERFLOWS:
                    raise GradientOverflowError(
                        f"step {step}: the gradient overflowed fp16 in {self.loss_scale.in_a_row} steps in a row, at loss "
                        f"scales down to {2 * self.loss_scale.scale:g}; none of these steps changed a weight.\n"
                        "  Start again with train.precision=bf16 or fp32: this model needs larger numbers than fp16 has."
                    )
                return
        self.ratio.sample_before()
        self.masters.step(self.optimizer, self.seed, step)
        self.ratio.compare_after(self.learning_rates["learning_rate"])
        self.published = step
        self.skip(1)

    def skip(self, steps: int) -> None:
        """Advance the schedule by ``steps`` steps of the plan, unless it waits for an evaluation's figure."""
        if not isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            for _ in range(steps):
                self.schedule.step()

    def report_metric(self, figure: float) -> None:
        """Pass an evaluation's figure to a schedule that waits for it."""
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(figure)

    def clear_gradients(self) -> None:
        self.masters.clear()
        self._overflowed = False

    def figures(self) -> dict[str, float]:
        """Return the fp16 figures of a record: ``loss_scale`` of the next step, and ``skipped_steps``."""
        if self.loss_scale is None:
            return {}
        return {"loss_scale": self.loss_scale.scale, "skipped_steps": self.loss_scale.skipped}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return masters and optimiser moments by name. All processes call it."""
        return self.masters.tensors(self.optimizer)

    def state(self) -> JsonObject:
        """Return the numbers of a checkpoint that belong to ``tensors``."""
        return {
            "schedule": {key: value for key, value in self.schedule.state_dict().items() if _is_json(value)},
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "optimizer": self.masters.numbers(self.optimizer),
            "published": self.published,
            "loss_scale": asdict(self.loss_scale) if self.loss_scale else None,
        }

    def load(self, tensors: Mapping[str, torch.Tensor], state: JsonObject) -> None:
        """Restore what ``tensors`` and ``state`` returned."""
        self.published = state["published"]
        rounding = None if self.published is None else (self.seed, self.published)
        self.masters.load(self.optimizer, tensors, state["optimizer"], rounding)
        self.schedule.load_state_dict({**self.schedule.state_dict(), **state["schedule"]})
        for group, rate in zip(self.optimizer.param_groups, state["learning_rates"], strict=True):
            group["lr"] = rate
        # the number format of this run decides whether there is a loss scale, not that of the checkpoint
        if self.loss_scale is not None and state["loss_scale"]:
            self.loss_scale = LossScale(**state["loss_scale"])


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    return isinstance(value, bool | int | float | str | type(None))
