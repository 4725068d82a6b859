"""The optimisers that work on fp32 masters, and the learning-rate schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.errors import MissingExtra, RecipeError
from tunesmith.models.heads import lm_head
from tunesmith.suggestions import did_you_mean
from tunesmith.train.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Kind:
    """An optimiser: its class, the arguments it always gets, and those that a recipe may not give it, with the reason."""

    optimizer: Callable[..., torch.optim.Optimizer]
    fixed: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def signature(self) -> dict[str, Any]:
        """Every argument of the class, with its default."""
        return {one.name: one.default for one in inspect.signature(self.optimizer).parameters.values()}

    def why_not(self, argument: str) -> str | None:
        """Why ``train.optim`` may not hold an argument of the class; None when it may."""
        own = dict.fromkeys(self.fixed, "tunesmith chooses it")
        return {**OWNED, **own, **self.refused}.get(argument)


OWNED = {
    "params": "what is trained is said by `adaptation`",
    "lr": "use train.learning_rate",
    "weight_decay": "use train.weight_decay",
    "maximize": "it would raise the loss",
    **dict.fromkeys(
        ("fused", "foreach", "capturable", "differentiable", "args"), "tunesmith chooses how it is computed"
    ),
}
"""Arguments that belong to other keys, or to nobody."""


def _adamw() -> Kind:
    """Loshchilov and Hutter 2019."""
    return Kind(torch.optim.AdamW, {"fused": True})


def _adamw_8bit() -> Kind:
    """AdamW whose moments are kept in 8 bits, in blocks of 256 with a scale each (Dettmers et al. 2022)."""
    unsupported = {
        "amsgrad": "it has no 8-bit form",
        "optim_bits": "train.optim says so",
        "is_paged": "states must fit a checkpoint",
    }
    return Kind(_bitsandbytes("adamw_8bit").AdamW8bit, refused=unsupported)


def _paged_adamw(name: str = "paged_adamw", bits: str = "32bit") -> Kind:
    """AdamW whose state a full GPU hands to the machine's memory, page by page (Dettmers et al. 2023, section 3).

    Weights below 100,000 numbers keep theirs on the GPU, and so does a run that was resumed. Raises RecipeError without CUDA.
    """
    module = _bitsandbytes(name)
    if not torch.cuda.is_available():
        raise RecipeError(
            f"train.optim={name}: pages are moved by a CUDA device, and there is none here.\n"
            f"  Use train.optim={'adamw' if bits == '32bit' else 'adamw_8bit'}, which makes the same updates."
        )
    refused = {"amsgrad": "it has no paged form", "optim_bits": "train.optim says so"}
    return Kind(getattr(module, f"PagedAdamW{bits}"), refused=refused)


def _paged_adamw_8bit() -> Kind:
    return _paged_adamw("paged_adamw_8bit", "8bit")


def _adafactor() -> Kind:
    """Shazeer and Stern 2018, one moment for each row and column; with the rate as it is given, as transformers' Trainer has it.

    Not torch's: its rate is multiplied by the size of the weight, so that at our rates LoRA's B, which begins at zero, would move
    by 2e-7 a step.
    """
    from transformers.optimization import Adafactor

    fixed = {"relative_step": False, "scale_parameter": False}
    return Kind(Adafactor, fixed, {"warmup_init": "use train.warmup_steps"})


def _sgd() -> Kind:
    return Kind(torch.optim.SGD)


def _lion() -> Kind:
    """Chen et al. 2023: the sign of a mean of gradients. It wants a rate three to ten times below AdamW's."""
    eight = dict.fromkeys(("optim_bits", "min_8bit_size", "is_paged"), "its state is kept in 32 bits")
    return Kind(_bitsandbytes("lion").Lion, refused=eight)


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes
    except ModuleNotFoundError:
        raise MissingExtra("bitsandbytes", "bnb", f"train.optim={name}") from None
    return bitsandbytes.optim


OPTIMISERS: dict[str, Callable[[], Kind]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw": _paged_adamw,
    "paged_adamw_8bit": _paged_adamw_8bit,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "lion": _lion,
}


def check(config: TrainConfig) -> None:
    """Try the optimiser on four numbers. Raises RecipeError for arguments it does not take, MissingExtra without its package."""
    kind = OPTIMISERS[config.optim_name]()
    valid = [name for name in kind.signature if kind.why_not(name) is None]
    for name in config.optim_args:
        if name not in kind.signature:
            raise RecipeError(
                f"train.optim.{name}: {config.optim_name} has no such argument. {did_you_mean(name, valid)}"
            )
        if name not in valid:
            raise RecipeError(
                f"train.optim.{name} is not given here: {kind.why_not(name)}. Valid: {', '.join(valid)}"
            )
    why = _fault(kind, config.weight_decay, config.optim_args)
    if why is None:
        return
    for name, value in config.optim_args.items():
        if (
            _fault(
                kind,
                config.weight_decay,
                {key: other for key, other in config.optim_args.items() if key != name},
            )
            is None
        ):
            default = (
                list(kind.signature[name])
                if isinstance(kind.signature[name], tuple)
                else kind.signature[name]
            )
            raise RecipeError(
                f"train.optim.{name}: {config.optim_name} does not take {value!r}: expected a value such as {default!r}, "
                f"its default ({why})"
            )
    raise RecipeError(f"train.optim={config.optim}: {why}")


def _fault(kind: Kind, weight_decay: float, arguments: Mapping[str, Any]) -> str | None:
    """What an optimiser with these arguments says against a step on four numbers; None for nothing."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    try:
        kind.optimizer([weight], lr=1e-3, weight_decay=weight_decay, **kind.fixed, **arguments).step()
    except (TypeError, ValueError, IndexError) as error:
        return str(error)
    return None


def check_model(config: TrainConfig, model: PreTrainedModel) -> None:
    """Whether ``model`` (adapted; on the meta device, say) has what the keys speak of. Raises RecipeError."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optim_name.endswith("adamw_8bit"):
        smallest = config.optim_args.get(
            "min_8bit_size", OPTIMISERS[config.optim_name]().signature["min_8bit_size"]
        )
        if max(map(torch.Tensor.numel, trained)) < smallest:
            raise RecipeError(
                f"train.optim={config.optim_name} does nothing: weights below {smallest} numbers keep their moments in 32 bits; "
                f"no trained weight is larger.\n  Use train.optim={config.optim_name.removesuffix('_8bit')}, or lower "
                "train.optim.min_8bit_size."
            )
    if config.head_learning_rate is not None and not lm_head.own_parameters(model):
        raise RecipeError(
            "train.head_learning_rate: this run trains no output layer of its own. It is frozen, or tied to the embedding.\n"
            "  Leave the key out; or train the layer: adaptation full, or lora with modules_to_save, of a model that is not tied."
        )


def build(
    trained: Mapping[str, torch.Tensor],
    config: TrainConfig,
    heads: Collection[str],
    factors: Mapping[str, float],
) -> torch.optim.Optimizer:
    """The optimiser of ``config.optim_name`` over groups of what is ``trained`` (by name) that share a rate and a decay.

    ``heads``: names of the output layer's parameters. ``factors``: how many times the rate a parameter learns at, by name; 1 for
    those left out. Norms and biases (one-dimensional weights) do not decay. A group's ``logged`` is the key of its rate in a
    record; the groups at ``train.learning_rate`` come first.
    """
    kind = OPTIMISERS[config.optim_name]()
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, weight in trained.items():
        own, factor, decays = (
            name in heads and config.head_learning_rate is not None,
            factors.get(name, 1.0),
            weight.dim() > 1,
        )
        rate = (config.head_learning_rate if own else config.learning_rate) or 0.0
        logged = ("head_" if own else "") + "learning_rate" + (f"_x{factor:g}" if factor != 1 else "")
        made = {
            "params": [],
            "lr": rate * factor,
            "weight_decay": config.weight_decay if decays else 0.0,
            "logged": logged,
        }
        groups.setdefault((own, factor, decays), made)["params"].append(weight)
    ordered = sorted(groups.values(), key=lambda group: (group["logged"] != "learning_rate", group["logged"]))
    return kind.optimizer(ordered, lr=float(config.learning_rate or 0), **kind.fixed, **config.optim_args)


def check_schedule(config: TrainConfig, steps: int) -> None:
    """Raise RecipeError for a schedule that cannot be made over ``steps``: transformers tells only when it is asked for one."""
    schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), config, steps)


def schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    """Any schedule of ``transformers.get_scheduler`` over ``steps`` optimiser steps. Raises RecipeError for an unknown one."""
    from transformers import SchedulerType, get_scheduler

    warmup = config.warmup_steps or int(config.warmup_ratio * steps + 0.5)
    if config.scheduler_name not in (valid := [kind.value for kind in SchedulerType]):
        raise RecipeError(
            f"train.lr_scheduler_type: unknown schedule {config.scheduler_name!r}. Valid: {', '.join(valid)}"
        )
    if warmup >= steps > 1:
        raise RecipeError(
            f"the warm-up takes {warmup} steps and the whole run has {steps}. Lower train.warmup_steps or warmup_ratio."
        )
    try:
        return get_scheduler(
            config.scheduler_name, optimizer, warmup, steps, scheduler_specific_kwargs=config.scheduler_args
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train.lr_scheduler_type={config.lr_scheduler_type}: {error}") from None
