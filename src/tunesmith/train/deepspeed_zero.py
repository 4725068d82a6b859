"""DeepSpeed ZeRO-2 (Rajbhandari et al. 2020): each process keeps a part of masters and optimiser state.

The result equals that of one process, except for the last bits of sums and, in bf16, the random bits of
rounding. The user's ``ds_config.json`` sets bucket sizes and communication. Keys that the recipe sets
(optimiser, rates, batch size, clipping, number format) must be ``"auto"`` there or left out. Checkpoints hold
whole tensors, so a run can continue with another number of processes or without DeepSpeed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.errors import MissingExtra, RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.models.fast import kernels
from tunesmith.train import distributed
from tunesmith.train.master_weights import moments, rounding_seed
from tunesmith.train.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIMIZERS = ("adamw", "sgd")
"""Optimisers that treat every element alike: a process has a range of elements, not matrices."""

RECIPE_KEYS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "optimizer": "train.optim, train.learning_rate and train.weight_decay",
    "scheduler": "train.lr_scheduler_type and train.warmup_ratio",
    "gradient_clipping": "train.max_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "zero_allow_untested_optimizer": "train.optim",
    "activation_checkpointing": "train.gradient_checkpointing",
    "tensorboard": "train.report_to",
    "wandb": "train.report_to",
}
"""Keys of DeepSpeed that the recipe sets."""

UNSUPPORTED = (
    "offload_optimizer",
    "offload_param",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "zero_hpz_partition_size",
)
"""Keys of ``zero_optimization`` that are refused because they are untested."""


@dataclass(frozen=True)
class Sharding:
    """The user's DeepSpeed configuration (``given``), and the ``complete`` one for DeepSpeed."""

    given: JsonObject
    complete: JsonObject


def read(path: Path, train: TrainConfig, compute: torch.dtype) -> Sharding:
    """Read the file of ``--deepspeed``, check it against the recipe and complete it.

    Raises RecipeError naming file and key, and MissingExtra when DeepSpeed is not installed.
    """
    where = f"--deepspeed {path}"
    try:
        given = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where} cannot be read: {error}. Expected a ds_config.json.") from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}:{error.lineno}: invalid JSON: {error.msg}") from None
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization"), dict):
        raise RecipeError(
            f'{where}: expected an object with a key "zero_optimization", such as {{"zero_optimization": {{"stage": 2}}}}'
        )
    zero = {key: value for key, value in given["zero_optimization"].items() if value != "auto"}
    _check_keys(where, given, zero)
    if train.optim_name not in OPTIMIZERS:
        raise RecipeError(
            f"train.optim={train.optim_name} conflicts with --deepspeed. Use one of {', '.join(OPTIMIZERS)}."
        )
    if compute is torch.float16:
        raise RecipeError("train.precision: fp16 conflicts with --deepspeed. Use bf16 or fp32.")
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtra("deepspeed", "deepspeed", "--deepspeed")
    rest = {key: value for key, value in given.items() if value != "auto" and key not in RECIPE_KEYS}
    complete = {
        "steps_per_print": 2**31,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        **rest,
        "zero_optimization": zero,
        "bf16": {"enabled": compute is torch.bfloat16},
        "gradient_clipping": train.max_grad_norm,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }
    return Sharding(given, complete)


def _check_keys(where: str, given: JsonObject, zero: JsonObject) -> None:
    """Raise RecipeError for a key that the recipe sets, or that is not supported."""
    for key, recipe_key in RECIPE_KEYS.items():
        value = given.get(key, "auto")
        if isinstance(value, dict) and set(value.values()) <= {"auto", False}:
            value = "auto"
        if value != "auto":
            raise RecipeError(
                f'{where}: "{key}" is set by the recipe ({recipe_key}). Take it out of the file, or write "auto".'
            )
    if zero.get("stage") != 2:
        raise RecipeError(
            f'{where}: "zero_optimization.stage" is {zero.get("stage")!r}; expected 2, the one that is supported.'
        )
    for key in UNSUPPORTED:
        if zero.get(key) and zero[key] != {"device": "none"}:
            raise RecipeError(
                f'{where}: "zero_optimization.{key}" is not supported. Take it out of the file.'
            )


@contextmanager
def silence_stdout() -> Iterator[None]:
    """Discard DeepSpeed's output: it would print its configuration in front of the result."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class Shards:
    """The ``train.master_weights.TrainedWeights`` of DeepSpeed's ZeRO-2, a part in each process.

    Made when the network is complete (adapted, cast, on its fast path), because DeepSpeed moves its
    parameters. ``masters``: their values in fp32 by name, with the full precision of the checkpoint.
    """

    in_step = True

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        masters: Mapping[str, torch.Tensor],
        config: JsonObject,
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self.world = distributed.state().num_processes
        self.share = 1 / self.world
        self.copies = config["bf16"]["enabled"]
        groups = enumerate(optimizer.param_groups)
        self._group = {id(p): number for number, group in groups for p in group["params"]}
        whole = {name: masters[name].detach().clone() for name in self.parameters}
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with silence_stdout():
            import deepspeed.ops

            # DeepSpeed would compile an extension that only its inference uses. That takes a minute in each
            # new home folder, and a killed compilation leaves a lock that blocks all later runs.
            deepspeed.ops.__compatible_ops__ = {}
            _init_process_group()
            self.engine = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )[0]
        for name, parameter in self.parameters.items():
            self._set(parameter, whole[name])

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def sampled(self) -> dict[str, torch.Tensor]:
        groups = enumerate(self.optimizer.param_groups)
        return {f"group {number}": group["params"][0] for number, group in groups}

    def backward(self, loss: torch.Tensor, last: bool, turn: int | None = None) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        with distributed.collective(other_work=True):
            # DeepSpeed takes the mean over processes; the loop needs the sum
            self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def rehearse(self, loss: torch.Tensor, turn: int | None = None) -> None:
        # without .grad, which DeepSpeed's hooks would see
        torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)

    def norm(self, scale: float) -> torch.Tensor:
        with distributed.collective(other_work=True):
            norm = float(self.engine.optimizer.scaled_global_norm())
        return torch.tensor(
            norm if norm >= 0 else math.nan
        )  # DeepSpeed returns -1 for a norm that is not finite

    def clip(self, norm: float, max_norm: float) -> None:
        """DeepSpeed clips in its step."""

    def step(self, optimizer: torch.optim.Optimizer, seed: int, step: int) -> None:
        with distributed.collective(other_work=True):
            self.engine.step()
        self._round(seed, step)

    @torch.no_grad()
    def _round(self, seed: int, step: int) -> None:
        """Round the masters into the bf16 copies as ``Masters.publish`` does; DeepSpeed rounds to nearest."""
        if not self.copies:
            return
        rank = distributed.state().process_index
        for number, parts in enumerate(self.engine.optimizer.parallel_partitioned_bit16_groups):
            master, bits = self._masters(number), rounding_seed(seed, step, number * self.world + rank)
            kernels.stochastic_round(master.data, parts[rank], bits)
            if self.world > 1:
                with distributed.collective():
                    torch.distributed.all_gather(list(parts), parts[rank].clone())

    def clear(self) -> None:
        """Nothing is left after a step, and a step that is refused ends the run."""

    def whole(self) -> dict[str, torch.Tensor]:
        return self._collect(dict.fromkeys(self.parameters))

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        tensors = {f"master.{name}": value.cpu() for name, value in self.whole().items()}
        groups = range(len(self.optimizer.param_groups))
        keys = {key for number in groups for key in self.optimizer.state.get(self._masters(number), {})}
        for key in sorted(keys):
            names = [name for name, p in self.parameters.items() if key in self._state_of(p)]
            for name, value in self._collect(dict.fromkeys(names, key)).items():
                tensors[f"optimizer.{name}.{key}"] = value.cpu()
        return tensors

    def _collect(self, wanted: Mapping[str, str | None]) -> dict[str, torch.Tensor]:
        """Return whole tensors by name in the main process; ``wanted``: key of the state, None = master."""
        self._link_state()
        main = distributed.state().is_main_process
        tensors = {}
        for name, key in wanted.items():
            own = self._state_of(self.parameters[name]).get(key) if key else None
            scalar = own is not None and own.dim() == 0
            whole = own.clone() if own is not None and scalar else self._get(self.parameters[name], key)
            if main:  # the other processes free it at once
                tensors[name] = whole
        return tensors

    def numbers(self, optimizer: torch.optim.Optimizer) -> dict[str, JsonObject]:
        return {}  # the state of these optimisers contains tensors alone

    @torch.no_grad()
    def load(
        self,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, torch.Tensor],
        numbers: Mapping[str, JsonObject],
        rounding: tuple[int, int] | None,
    ) -> None:
        for name, parameter in self.parameters.items():
            self._set(parameter, tensors[f"master.{name}"])
            masters = self._masters(self._group[id(parameter)])
            state = self.optimizer.state[masters]
            for key, value in moments(tensors, name).items():
                if key not in state:
                    state[key] = torch.zeros_like(masters) if value.dim() else value.clone()
        self._link_state()
        for name, parameter in self.parameters.items():
            for key, value in moments(tensors, name).items():
                if value.dim():
                    self._set(parameter, value, key)
        if rounding is not None:
            self._round(*rounding)

    def _masters(self, group: int) -> torch.Tensor:
        """Return this process's range of a group's masters, one flat tensor; the optimiser works on it."""
        masters: torch.Tensor = self.optimizer.param_groups[group]["params"][0]
        return masters

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        masters = self._masters(self._group[id(parameter)])
        state: dict[str, torch.Tensor] = self.optimizer.state.get(masters, {})
        return state

    def _link_state(self) -> None:
        """Tell DeepSpeed where the optimiser's state is: it looks only once, after the first update."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for number in range(len(self.optimizer.param_groups)):
            masters = self._masters(number)
            if masters in self.optimizer.state:
                members = [p for p in self.parameters.values() if self._group[id(p)] == number]
                lazy_init_hp_params_optimizer_state(members, masters, self.optimizer.state)

    def _get(self, parameter: torch.Tensor, key: str | None = None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        with distributed.collective():
            whole: torch.Tensor | None = (
                safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)
            )
        assert whole is not None, "DeepSpeed lost a parameter"
        return whole.detach()

    @torch.no_grad()
    def _set(self, parameter: torch.Tensor, value: torch.Tensor, key: str | None = None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(parameter.device, torch.float32)
        if key:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)


def _init_process_group() -> None:
    """Make the process group that DeepSpeed needs, for a single process too; that one needs no address."""
    if not torch.distributed.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asserts that a launcher has set it
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # public, but not in its __all__
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
