"""fp32 masters of the trained weights: gradients are summed in them, and the optimiser updates them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from tunesmith.json_types import JsonObject
from tunesmith.models.fast import kernels
from tunesmith.models.load.mapped_files import MappedFiles
from tunesmith.train import distributed
from tunesmith.train.lane_gradients import LaneGradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrainedWeights(Protocol):
    """The trained weights as ``train.update.Update`` sees them.

    Either every process holds them whole (:class:`Masters`), or each holds a part
    (``train.deepspeed_zero.Shards``).
    """

    parameters: dict[str, torch.nn.Parameter]
    """The network's parameters by name."""
    share: float
    """The part of the optimiser's state that this process keeps."""
    in_step: bool
    """True where backward is a collective, which all processes must call equally often."""

    @property
    def size(self) -> int:
        """Number of trained elements."""

    def sampled(self) -> Mapping[str, torch.Tensor]:
        """The fp32 weights of this process, for ``train.update_ratio``: ``share`` of all."""

    def backward(self, loss: torch.Tensor, last: bool, turn: int | None = None) -> None:
        """Add the gradient of ``loss``.

        ``last``: this is the last one of the step. ``turn``: see ``train.lane_gradients``."""

    def rehearse(self, loss: torch.Tensor, turn: int | None = None) -> None:
        """Do the work of ``backward`` for a gradient that ``clear`` discards."""

    def norm(self, scale: float) -> torch.Tensor:
        """Sum gradients over processes and divide them by the loss ``scale``.

        Returns their norm on the device; NaN or infinity if a gradient is not finite."""

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale gradients of norm ``norm`` down to ``max_norm``."""

    def step(self, optimizer: torch.optim.Optimizer, seed: int, step: int) -> None:
        """Update the masters and round them into the network, by ``seed`` and ``step``."""

    def clear(self) -> None:
        """Discard the gradients."""

    def whole(self) -> dict[str, torch.Tensor]:
        """The masters in fp32 by name. All processes call it."""

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """``master.NAME`` and ``optimizer.NAME.KEY``, whole, for a checkpoint. All processes call it."""

    def numbers(self, optimizer: torch.optim.Optimizer) -> dict[str, JsonObject]:
        """The optimiser's state that is not a tensor, by name."""

    def load(
        self,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, torch.Tensor],
        numbers: Mapping[str, JsonObject],
        rounding: tuple[int, int] | None,
    ) -> None:
        """Restore a checkpoint. ``rounding``: seed and step of the working copies."""


class Masters:
    """The trained parameters in fp32 by name.

    Where the network computes in fp32, they are its own parameters. In bf16 and fp16 each is a copy: backward
    adds every gradient to the copy in fp32 at once, and ``publish`` rounds the copies into the network after
    an update. Made before the network is cast, so that the copies keep the full precision of an fp32
    checkpoint.
    """

    share = 1.0
    in_step = False

    def __init__(self, model: PreTrainedModel, compute: torch.dtype) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.copies = compute is not torch.float32
        self.masters: dict[str, torch.Tensor] = {}
        self._norm = torch.zeros(())
        files = MappedFiles()
        for name, parameter in self.parameters.items():
            if self.copies:
                self.masters[name] = parameter.detach().to(torch.float32, copy=True).requires_grad_()
            elif parameter.dtype is not torch.float32:
                stored = parameter.data
                parameter.data = stored.float()
                files.drop(stored)
            self.masters.setdefault(name, parameter)
        self.lanes = LaneGradients(self.parameters, self.masters)

    @property
    def size(self) -> int:
        return sum(master.numel() for master in self.masters.values())

    def sampled(self) -> Mapping[str, torch.Tensor]:
        return self.masters

    def install_hooks(self) -> None:
        """Add each gradient to its master's during backward from now on."""
        self.lanes.install_hooks()
        if self.copies:
            for name, parameter in self.parameters.items():
                parameter.register_post_accumulate_grad_hook(_MoveGradient(self.masters[name]))

    def backward(self, loss: torch.Tensor, last: bool, turn: int | None = None) -> None:
        if turn is None:
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        else:
            self.lanes.backward(loss, turn)

    def rehearse(self, loss: torch.Tensor, turn: int | None = None) -> None:
        self.backward(loss, last=True, turn=turn)

    def norm(self, scale: float) -> torch.Tensor:
        gradients = list(self.gradients().values())
        distributed.add_gradients(gradients)
        if scale != 1.0:  # a power of two changes only the exponents
            for gradient in gradients:
                gradient.div_(scale)
        self._norm = torch.nn.utils.get_total_norm(gradients)
        return self._norm

    def clip(self, norm: float, max_norm: float) -> None:
        if max_norm and not norm + 1e-6 < max_norm:  # multiplying by 1 would take as long; NaN is passed on
            torch.nn.utils.clip_grads_with_norm_(list(self.masters.values()), max_norm, self._norm)

    def step(self, optimizer: torch.optim.Optimizer, seed: int, step: int) -> None:
        optimizer.step()
        self.publish(seed, step)
        self.clear()

    @torch.no_grad()
    def publish(self, seed: int, step: int) -> None:
        """Round the masters into the network stochastically, as a function of ``seed`` and ``step``.

        Rounding to nearest loses updates smaller than half a unit in the last place, which most updates of
        full fine-tuning are (SmolLM2-135M, 12 steps at 2e-5: two thirds of the gain in loss were lost).
        """
        if self.copies:
            for number, (name, parameter) in enumerate(self.parameters.items()):
                bits = rounding_seed(seed, step, number)
                kernels.stochastic_round(self.masters[name].data, parameter.data, bits)

    def whole(self) -> dict[str, torch.Tensor]:
        return self.masters

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by name; zeros for a parameter that got none in this step because no row reached it."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return {name: master.grad for name, master in self.masters.items() if master.grad is not None}

    def clear(self) -> None:
        self.lanes.clear()
        for master in self.masters.values():
            master.grad = None

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {f"master.{name}": master for name, master in self.masters.items()}
        seen: set[int] = set()
        for name, master in self.masters.items():
            for key, value in optimizer.state[master].items():
                if isinstance(value, torch.Tensor):
                    # bitsandbytes shares one table of 8-bit values; safetensors stores no tensor twice
                    tensors[f"optimizer.{name}.{key}"] = value.clone() if value.data_ptr() in seen else value
                    seen.add(value.data_ptr())
        return tensors

    def numbers(self, optimizer: torch.optim.Optimizer) -> dict[str, JsonObject]:
        numbers: dict[str, JsonObject] = {}
        for name, master in self.masters.items():
            for key, value in optimizer.state[master].items():
                if not isinstance(value, torch.Tensor):
                    numbers.setdefault(name, {})[key] = value
        return numbers

    @torch.no_grad()
    def load(
        self,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, torch.Tensor],
        numbers: Mapping[str, JsonObject],
        rounding: tuple[int, int] | None,
    ) -> None:
        saved: dict[int, JsonObject] = {}
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            saved[id(master)] = {**moments(tensors, name), **numbers.get(name, {})}
        order = [id(master) for group in optimizer.param_groups for master in group["params"]]
        # the optimiser's own loading moves each tensor to its device and keeps the dtype of 8-bit state
        state = {number: saved[key] for number, key in enumerate(order) if saved[key]}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        if rounding is not None:
            self.publish(*rounding)


def rounding_seed(seed: int, step: int, number: int) -> int:
    """Return the 32-bit seed of the bits that round tensor ``number`` in step ``step``."""
    key = hashlib.blake2b(repr((seed, step, number)).encode(), digest_size=4).digest()
    return int.from_bytes(key, "little")


@contextmanager
def swapped_weights(
    parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Give each parameter the value of its name inside the block."""
    working = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name].data
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = working[name]


def moments(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return the optimiser's state of one weight from the ``tensors`` of a checkpoint."""
    prefix = f"optimizer.{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


class _MoveGradient:
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
