"""fp32 masters of what is trained, AdamW on them, clipping, and the learning-rate schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tunesmith.engine import distributed
from tunesmith.engine.config import TrainConfig
from tunesmith.errors import RecipeError
from tunesmith.models import kernels


class Masters:
    """The trained parameters in fp32, by name.

    Where the network computes in fp32 they are its own parameters. Where it computes in bf16 each is a copy: gradients are added
    to the copy in fp32 as soon as backward has made them, and ``publish`` casts the copies into the network after an update.
    Built before the network is cast, so that an fp32 checkpoint's full precision reaches the copies.
    """

    def __init__(self, model: Any, compute: torch.dtype) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.copies = compute is not torch.float32
        self.masters: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            if not self.copies and parameter.dtype is torch.float32:
                self.masters[name] = parameter
            elif not self.copies:
                parameter.data = parameter.data.float()
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().float().clone().requires_grad_()

    def listen(self) -> None:
        """From now on move each gradient to its master during backward."""
        if self.copies:
            for name, parameter in self.parameters.items():
                parameter.register_post_accumulate_grad_hook(_Move(self.masters[name]))

    @torch.no_grad()
    def publish(self, seed: int, step: int) -> None:
        """Round the masters into the network, stochastically: the copies of step ``step`` depend on it and ``seed`` alone.

        Rounded to nearest, the copies would stand still while the masters move by less than half a unit in the last place, as
        most of them do in full fine-tuning (SmolLM2-135M, 12 steps at 2e-5: two thirds of what the loss gained were lost).
        """
        if self.copies:
            for number, (name, parameter) in enumerate(self.parameters.items()):
                key = hashlib.blake2b(repr((seed, step, number)).encode(), digest_size=4).digest()
                kernels.stochastic_round(self.masters[name].data, parameter.data, int.from_bytes(key, "little"))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network holds the masters themselves, to be saved: a bf16 copy has lost most updates of a small rate."""
        working = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = self.masters[name].data
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = working[name]

    def all_of(self, model: Any) -> bool:
        """Whether every parameter of ``model`` is trained."""
        return all(parameter.requires_grad for parameter in model.parameters())

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by name; a parameter that got none this step (no row reached it) has zeros."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return {name: master.grad for name, master in self.masters.items() if master.grad is not None}

    def clear(self) -> None:
        for master in self.masters.values():
            master.grad = None


class _Move:
    """Adds a parameter's gradient to its master's and frees it."""

    def __init__(self, master: torch.Tensor) -> None:
        self.master = master

    def __call__(self, parameter: torch.Tensor) -> None:
        if parameter.grad is None:
            return
        if self.master.grad is None:
            self.master.grad = parameter.grad.float()
        else:
            self.master.grad.add_(parameter.grad)
        parameter.grad = None


def gather_and_clip(masters: Masters, max_norm: float) -> torch.Tensor:
    """Sum gradients over processes, scale them to a norm of at most ``max_norm`` (0 = leave them), return the norm before."""
    gradients = list(masters.gradients().values())
    distributed.add_gradients(gradients)
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(list(masters.masters.values()), max_norm, norm)
    return norm


def adamw(masters: Masters, config: TrainConfig, learning_rate: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019). Norms and biases (one-dimensional weights) do not decay."""
    decayed = [p for p in masters.masters.values() if p.dim() > 1]
    kept = [p for p in masters.masters.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    """Any schedule of ``transformers.get_scheduler`` over ``steps`` optimiser steps. Raises RecipeError for an unknown one."""
    from transformers import SchedulerType, get_scheduler

    warmup = config.warmup_steps or int(config.warmup_ratio * steps + 0.5)
    if config.lr_scheduler_type not in (valid := [kind.value for kind in SchedulerType]):
        raise RecipeError(f"train.lr_scheduler_type: unknown schedule {config.lr_scheduler_type!r}. Valid: {', '.join(valid)}")
    if warmup >= steps > 1:
        raise RecipeError(
            f"the warm-up takes {warmup} steps and the whole run has {steps}. Lower train.warmup_steps or warmup_ratio."
        )
    try:
        return get_scheduler(
            config.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs)
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"train.lr_scheduler_type={config.lr_scheduler_type} with "
            f"train.lr_scheduler_kwargs={dict(config.lr_scheduler_kwargs)}: {error}"
        ) from None
