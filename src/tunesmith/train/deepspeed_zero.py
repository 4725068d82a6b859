"""DeepSpeed ZeRO-2 (Rajbhandari et al. 2020): each process keeps a part of masters, gradients and optimiser state.

It computes what one process computes, but for the last bits of sums, and in bf16 the random bits of rounding. The user's own
``ds_config.json`` says how: bucket sizes, communication. What the recipe says (optimiser, rates, batch size, clipping, number
format) is not said twice: ``"auto"``, or left out, there. Checkpoints hold whole tensors under their names, as without it, so
that a run goes on with another number of processes, or without DeepSpeed.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.errors import MissingExtra, RecipeError
from tunesmith.models.fast import kernels
from tunesmith.train import distributed
from tunesmith.train.master_weights import moments, rounding_seed
from tunesmith.train.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STALE_SECONDS = 300
"""A lock so old belongs to nobody: what it guards is compiled in less than one minute."""

OPTIMISERS = ("adamw", "sgd")
"""Those that treat every number alike: a process has a stretch of numbers, not matrices, and state in 32 bits."""

SAID_BY = {
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
"""Keys of DeepSpeed whose place is the recipe."""

UNTRIED = (
    "offload_optimizer",
    "offload_param",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "zero_hpz_partition_size",
)
"""Of ``zero_optimization``: what is refused, because nothing here shows that it is right."""


@dataclass(frozen=True)
class Sharding:
    """DeepSpeed's configuration: what the user's file holds, and what DeepSpeed is given."""

    given: dict[str, Any]
    complete: dict[str, Any]


def read(path: Path, train: TrainConfig, compute: torch.dtype) -> Sharding:
    """The configuration file of ``--deepspeed``, checked against the recipe and completed.

    Raises RecipeError naming file and key, MissingExtra without DeepSpeed. Nothing of it is imported.
    """
    where = f"--deepspeed {path}"
    try:
        given = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where} cannot be read: {error}. Expected a ds_config.json of yours.") from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}:{error.lineno}: this is no JSON: {error.msg}") from None
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization"), dict):
        raise RecipeError(
            f'{where}: expected an object with a key "zero_optimization", such as {{"zero_optimization": {{"stage": 2}}}}'
        )
    for key, said in SAID_BY.items():
        value = given.get(key, "auto")
        if isinstance(value, dict) and set(value.values()) <= {"auto", False}:
            value = "auto"
        if value != "auto":
            raise RecipeError(
                f'{where}: "{key}" is said by the recipe ({said}). Take it out of the file, or write "auto".'
            )
    zero = {key: value for key, value in given["zero_optimization"].items() if value != "auto"}
    if zero.get("stage") != 2:
        raise RecipeError(
            f'{where}: "zero_optimization.stage" is {zero.get("stage")!r}; expected 2, the one that is supported.'
        )
    for key in UNTRIED:
        if zero.get(key) and zero[key] != {"device": "none"}:
            raise RecipeError(
                f'{where}: "zero_optimization.{key}" is not supported. Take it out of the file.'
            )
    if train.optim_name not in OPTIMISERS:
        raise RecipeError(
            f"train.optim={train.optim_name} does not go with --deepspeed, which needs one of {', '.join(OPTIMISERS)}."
        )
    if compute is torch.float16:
        raise RecipeError("train.precision: fp16 does not go with --deepspeed. Use bf16 or fp32.")
    _installed()
    rest = {key: value for key, value in given.items() if value != "auto" and key not in SAID_BY}
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


def _installed() -> None:
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise MissingExtra("deepspeed", "deepspeed", "--deepspeed")


@contextmanager
def hushed() -> Iterator[None]:
    """DeepSpeed tells its whole configuration on standard output, which belongs to the result."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def unlock(extensions: Path) -> None:
    """Remove locks that a killed compilation of DeepSpeed's code left under ``extensions``: who finds one waits without end."""
    for lock in extensions.glob("**/deepspeed_*/lock"):
        if time.time() - lock.stat().st_mtime > STALE_SECONDS:
            lock.unlink(missing_ok=True)


class Shards:
    """What is trained of a network, each process with a part of it: ``train.master_weights.Trained`` by DeepSpeed's ZeRO-2.

    Built when the network is as it will be (adapted, cast, on its route), because DeepSpeed moves the trained parameters into one
    stretch of memory. ``masters``: their values in fp32, by name, which an fp32 checkpoint's full precision reaches.
    """

    in_step = True

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        masters: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self.world = distributed.state().num_processes
        self.share = 1 / self.world
        self.copies = config["bf16"]["enabled"]
        self._group = {
            id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]
        }
        whole = {name: masters[name].detach().clone() for name in self.parameters}
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with hushed():
            import deepspeed
            from torch.utils.cpp_extension import get_default_build_root

            _alone()
            if distributed.state().is_main_process:
                unlock(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))
            distributed.wait()
            self.engine = deepspeed.initialize(
                model=model, optimizer=optimizer, config=dict(config), dist_init_required=False
            )[0]
        for name, parameter in self.parameters.items():
            self._set(parameter, whole[name])

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def sampled(self) -> dict[str, torch.Tensor]:
        return {
            f"group {number}": group["params"][0] for number, group in enumerate(self.optimizer.param_groups)
        }

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        with distributed.together(and_more=True):
            self.engine.backward(
                loss * self.world, scale_wrt_gas=False
            )  # it takes the mean over processes; we want the sum

    def rehearse(self, loss: torch.Tensor) -> None:
        torch.autograd.grad(
            loss, list(self.parameters.values()), allow_unused=True
        )  # no hook of DeepSpeed's hears of these

    def norm(self, scale: float) -> torch.Tensor:
        with distributed.together(and_more=True):
            norm = float(self.engine.optimizer.scaled_global_norm())
        return torch.tensor(norm if norm >= 0 else math.nan)  # -1 stands for what is not finite

    def clip(self, norm: float, max_norm: float) -> None:
        """DeepSpeed clips in its step."""

    def step(self, optimizer: torch.optim.Optimizer, seed: int, step: int) -> None:
        with distributed.together(and_more=True):
            self.engine.step()
        self._round(seed, step)

    @torch.no_grad()
    def _round(self, seed: int, step: int) -> None:
        """Round the masters into bf16 copies anew, stochastically: see ``Masters.publish``. DeepSpeed rounds to nearest."""
        if not self.copies:
            return
        rank = distributed.state().process_index
        for number, parts in enumerate(self.engine.optimizer.parallel_partitioned_bit16_groups):
            master = self.optimizer.param_groups[number]["params"][0]
            kernels.stochastic_round(
                master.data, parts[rank], rounding_seed(seed, step, number * self.world + rank)
            )
            if self.world > 1:
                with distributed.together():
                    torch.distributed.all_gather(list(parts), parts[rank].clone())

    def clear(self) -> None:
        """Nothing is left of a step that ended; one that was refused ends the run."""

    def whole(self) -> dict[str, torch.Tensor]:
        return self._everywhere({name: None for name in self.parameters})

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        tensors = {f"master.{name}": value.cpu() for name, value in self.whole().items()}
        keys = {
            key
            for group in self.optimizer.param_groups
            for key in self.optimizer.state.get(group["params"][0], {})
        }
        for key in sorted(keys):
            found = self._everywhere(
                {name: key for name, p in self.parameters.items() if key in self._state_of(p)}
            )
            tensors |= {f"optimizer.{name}.{key}": value.cpu() for name, value in found.items()}
        return tensors

    def _everywhere(self, wanted: Mapping[str, str | None]) -> dict[str, torch.Tensor]:
        """{name: key of the optimiser's state, or None for the master} -> whole tensors, in the main process alone."""
        self._link()
        main = distributed.state().is_main_process
        found = {}
        for name, key in wanted.items():
            own = self._state_of(self.parameters[name]).get(key) if key else None
            whole = (
                own.clone() if own is not None and own.dim() == 0 else self._get(self.parameters[name], key)
            )
            if main:  # elsewhere it is freed at once
                found[name] = whole
        return found

    def numbers(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        return {}  # the optimisers that go with it keep tensors alone

    @torch.no_grad()
    def load(
        self,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, torch.Tensor],
        numbers: Mapping[str, Any],
        copies: tuple[int, int] | None,
    ) -> None:
        for name, parameter in self.parameters.items():
            self._set(parameter, tensors[f"master.{name}"])
            own, kept = self.optimizer.state[self._stretch(parameter)], moments(tensors, name)
            for key, value in kept.items():
                if key not in own:
                    own[key] = torch.zeros_like(self._stretch(parameter)) if value.dim() else value.clone()
        self._link()
        for name, parameter in self.parameters.items():
            for key, value in moments(tensors, name).items():
                if value.dim():
                    self._set(parameter, value, key)
        if copies is not None:
            self._round(*copies)

    def _stretch(self, parameter: torch.Tensor) -> torch.Tensor:
        """The numbers of this process, of which those of ``parameter`` may be a part; what the optimiser works on."""
        stretch: torch.Tensor = self.optimizer.param_groups[self._group[id(parameter)]]["params"][0]
        return stretch

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.optimizer.state.get(self._stretch(parameter), {})

    def _link(self) -> None:
        """Tell DeepSpeed where the optimiser's state lies. Itself it looks for it once, after the first group's first update."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for number, group in enumerate(self.optimizer.param_groups):
            stretch = group["params"][0]
            if stretch in self.optimizer.state:
                ours = [
                    parameter
                    for parameter in self.parameters.values()
                    if self._group[id(parameter)] == number
                ]
                lazy_init_hp_params_optimizer_state(ours, stretch, self.optimizer.state)

    def _get(self, parameter: torch.Tensor, key: str | None = None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        with distributed.together():
            whole = (
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


def _alone() -> None:
    """DeepSpeed wants a process group, also of one: this one needs no address."""
    if not torch.distributed.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # it asserts that a launcher has set it
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # public, but not in its __all__
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
