"""fp32 masters of what is trained: where gradients are summed, and what the optimiser works on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tunesmith.models.fast import kernels
from tunesmith.train import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Trained(Protocol):
    """The trained weights as ``train.update.Update`` sees them: whole in every process (:class:`Masters`), or each process
    with a part of its own (``train.deepspeed_zero.Shards``).
    """

    parameters: dict[str, torch.nn.Parameter]
    """Those of the network, by name."""
    share: float
    """Of the optimiser's state, what this process keeps."""
    in_step: bool
    """Whether each backward talks to the other processes: then all must call it equally often, and none can begin a step anew."""

    @property
    def size(self) -> int:
        """How many numbers are trained."""

    def sampled(self) -> Mapping[str, torch.Tensor]:
        """What ``train.update_ratio`` measures: fp32 weights of this process, ``share`` of all."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of ``loss``; ``last``: it is the last of this step."""

    def rehearse(self, loss: torch.Tensor) -> None:
        """The work of a backward, whose gradient nobody wants."""

    def norm(self, scale: float) -> torch.Tensor:
        """Sum gradients over processes and divide them by the loss's ``scale``. Returns their norm on the device; NaN or
        infinity where one of them is not finite."""

    def clip(self, norm: float, max_norm: float) -> None:
        """Shorten gradients of norm ``norm`` to ``max_norm``."""

    def step(self, optimizer: torch.optim.Optimizer, seed: int, step: int) -> None:
        """Update the masters and the network's working copies; the rounding of those is a function of ``seed`` and ``step``."""

    def clear(self) -> None:
        """Forget the gradients."""

    def whole(self) -> dict[str, torch.Tensor]:
        """The masters in fp32, by name. All processes call it; only the main one needs what it returns."""

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """``master.NAME`` and ``optimizer.NAME.KEY``, whole. All processes call it; only the main one needs what it returns."""

    def numbers(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """By name, what the optimiser keeps that is no tensor."""

    def load(
        self,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, torch.Tensor],
        numbers: Mapping[str, Any],
        copies: tuple[int, int] | None,
    ) -> None:
        """Stand where ``tensors`` and ``numbers`` were taken. ``copies``: seed and step that rounded the working copies."""


class Masters:
    """The trained parameters in fp32, by name.

    Where the network computes in fp32 they are its own parameters. Where it computes in bf16 each is a copy: gradients are added
    to the copy in fp32 as soon as backward has made them, and ``publish`` casts the copies into the network after an update.
    Built before the network is cast, so that an fp32 checkpoint's full precision reaches the copies.
    """

    share = 1.0
    in_step = False

    def __init__(self, model: PreTrainedModel, compute: torch.dtype) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.copies = compute is not torch.float32
        self.masters: dict[str, torch.Tensor] = {}
        self._norm = torch.zeros(())
        for name, parameter in self.parameters.items():
            if not self.copies and parameter.dtype is torch.float32:
                self.masters[name] = parameter
            elif not self.copies:
                parameter.data = parameter.data.float()
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().float().clone().requires_grad_()

    @property
    def size(self) -> int:
        return sum(master.numel() for master in self.masters.values())

    def sampled(self) -> Mapping[str, torch.Tensor]:
        return self.masters

    def listen(self) -> None:
        """From now on move each gradient to its master during backward."""
        if self.copies:
            for name, parameter in self.parameters.items():
                parameter.register_post_accumulate_grad_hook(_Move(self.masters[name]))

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def rehearse(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.clear()

    def norm(self, scale: float) -> torch.Tensor:
        gradients = list(self.gradients().values())
        distributed.add_gradients(gradients)
        if scale != 1.0:  # a power of two: no bit changes but the exponent
            for gradient in gradients:
                gradient.div_(scale)
        self._norm = torch.nn.utils.get_total_norm(gradients)
        return self._norm

    def clip(self, norm: float, max_norm: float) -> None:
        if max_norm and not norm + 1e-6 < max_norm:  # to multiply by 1 takes as long; NaN is passed on
            torch.nn.utils.clip_grads_with_norm_(list(self.masters.values()), max_norm, self._norm)

    def step(self, optimizer: torch.optim.Optimizer, seed: int, step: int) -> None:
        optimizer.step()
        self.publish(seed, step)
        self.clear()

    @torch.no_grad()
    def publish(self, seed: int, step: int) -> None:
        """Round the masters into the network, stochastically: the copies of step ``step`` depend on it and ``seed`` alone.

        Rounded to nearest, the copies would stand still while the masters move by less than half a unit in the last place, as
        most of them do in full fine-tuning (SmolLM2-135M, 12 steps at 2e-5: two thirds of what the loss gained were lost).
        """
        if self.copies:
            for number, (name, parameter) in enumerate(self.parameters.items()):
                kernels.stochastic_round(
                    self.masters[name].data, parameter.data, rounding_seed(seed, step, number)
                )

    def whole(self) -> dict[str, torch.Tensor]:
        return self.masters

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by name; a parameter that got none this step (no row reached it) has zeros."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return {name: master.grad for name, master in self.masters.items() if master.grad is not None}

    def clear(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {f"master.{name}": master for name, master in self.masters.items()}
        seen: set[int] = set()
        for name, master in self.masters.items():
            for key, value in optimizer.state[master].items():
                if isinstance(value, torch.Tensor):
                    # bitsandbytes gives every weight the same table of 8-bit values, and a file holds no tensor twice
                    tensors[f"optimizer.{name}.{key}"] = value.clone() if value.data_ptr() in seen else value
                    seen.add(value.data_ptr())
        return tensors

    def numbers(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        kept = {
            name: {
                key: value
                for key, value in optimizer.state[master].items()
                if not isinstance(value, torch.Tensor)
            }
            for name, master in self.masters.items()
        }
        return {name: values for name, values in kept.items() if values}

    @torch.no_grad()
    def load(
        self,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, torch.Tensor],
        numbers: Mapping[str, Any],
        copies: tuple[int, int] | None,
    ) -> None:
        kept: dict[int, dict[str, Any]] = {}
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            kept[id(master)] = {**moments(tensors, name), **numbers.get(name, {})}
        order = [id(master) for group in optimizer.param_groups for master in group["params"]]
        # the optimiser's own loading brings each tensor to its device and keeps the dtype of what is not a moment in fp32
        state = {number: kept[key] for number, key in enumerate(order) if kept[key]}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        if copies is not None:
            self.publish(*copies)


def rounding_seed(seed: int, step: int, number: int) -> int:
    """Of the random bits that round weight ``number`` (of any counting) as step ``step`` left it."""
    key = hashlib.blake2b(repr((seed, step, number)).encode(), digest_size=4).digest()
    return int.from_bytes(key, "little")


@contextmanager
def holding(
    parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """For as long, each parameter is the value of its name."""
    working = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name].data
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = working[name]


def moments(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """What ``tensors`` hold of the optimiser's state for one weight."""
    prefix = f"optimizer.{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


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
