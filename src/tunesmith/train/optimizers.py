"""The optimisers that work on fp32 masters, and the learning-rate schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.errors import MissingExtra, RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.models.heads import lm_head
from tunesmith.suggestions import did_you_mean
from tunesmith.train.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESERVED = {
    "params": "`adaptation` decides what is trained",
    "lr": "use train.learning_rate",
    "weight_decay": "use train.weight_decay",
    "maximize": "it would raise the loss",
    **dict.fromkeys(
        ("fused", "foreach", "capturable", "differentiable", "args"), "tunesmith chooses the implementation"
    ),
}
"""Arguments that a recipe may give to no optimiser, with the reason."""


@dataclass(frozen=True)
class OptimizerKind:
    """An optimiser's class, its fixed arguments, and those that a recipe may not set, with the reason."""

    optimizer: Callable[..., torch.optim.Optimizer]
    fixed: dict[str, bool] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Every argument of the class, with its default."""
        return {name: one.default for name, one in inspect.signature(self.optimizer).parameters.items()}

    def why_not(self, argument: str) -> str | None:
        """Return why ``train.optim`` may not contain an argument of the class; None when it may."""
        fixed = dict.fromkeys(self.fixed, "tunesmith chooses it")
        return {**RESERVED, **fixed, **self.refused}.get(argument)


def _adamw() -> OptimizerKind:
    """Loshchilov and Hutter 2019."""
    return OptimizerKind(torch.optim.AdamW, {"fused": True})


def _adamw_8bit() -> OptimizerKind:
    """AdamW with moments in 8 bits, in blocks of 256 with a scale each (Dettmers et al. 2022)."""
    refused = {
        "amsgrad": "it has no 8-bit form",
        "optim_bits": "train.optim decides it",
        "is_paged": "the state must fit into a checkpoint",
    }
    return OptimizerKind(_bitsandbytes("adamw_8bit").AdamW8bit, refused=refused)


def _paged(name: str, unpaged: str, class_name: str) -> OptimizerKind:
    """AdamW whose state moves from a full GPU to the host, page by page (Dettmers et al. 2023, section 3).

    Weights below 100,000 elements and resumed runs keep it on the GPU. Raises RecipeError without CUDA.
    """
    optim = _bitsandbytes(name)
    if not torch.cuda.is_available():
        raise RecipeError(
            f"train.optim={name}: only a CUDA device moves pages, and this machine has none.\n"
            f"  Use train.optim={unpaged}, which makes the same updates."
        )
    refused = {"amsgrad": "it has no paged form", "optim_bits": "train.optim decides it"}
    return OptimizerKind(vars(optim)[class_name], refused=refused)


def _adafactor() -> OptimizerKind:
    """Shazeer and Stern 2018, one moment per row and column; transformers' own, at the given learning rate.

    torch's Adafactor multiplies the rate by the size of the weight: LoRA's B, which starts at zero, would
    move by 2e-7 per step at usual rates.
    """
    from transformers.optimization import Adafactor

    fixed = {"relative_step": False, "scale_parameter": False}
    return OptimizerKind(Adafactor, fixed, {"warmup_init": "use train.warmup_steps"})


def _lion() -> OptimizerKind:
    """Chen et al. 2023: the sign of a mean of gradients. It needs a rate three to ten times below AdamW's."""
    refused = dict.fromkeys(("optim_bits", "min_8bit_size", "is_paged"), "its state has 32 bits")
    return OptimizerKind(_bitsandbytes("lion").Lion, refused=refused)


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes
    except ModuleNotFoundError:
        raise MissingExtra("bitsandbytes", "bnb", f"train.optim={name}") from None
    return bitsandbytes.optim


OPTIMIZERS: dict[str, Callable[[], OptimizerKind]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw": partial(_paged, "paged_adamw", "adamw", "PagedAdamW32bit"),
    "paged_adamw_8bit": partial(_paged, "paged_adamw_8bit", "adamw_8bit", "PagedAdamW8bit"),
    "adafactor": _adafactor,
    "sgd": partial(OptimizerKind, torch.optim.SGD),
    "lion": _lion,
}


def check(config: TrainConfig) -> None:
    """Try the optimiser on four numbers. Raises RecipeError or MissingExtra."""
    kind = OPTIMIZERS[config.optim_name]()
    defaults, arguments = kind.defaults, config.optim_args
    valid = [name for name in defaults if kind.why_not(name) is None]
    for name in arguments:
        where = f"train.optim.{name}"
        if name not in defaults:
            raise RecipeError(
                f"{where}: {config.optim_name} has no such argument. {did_you_mean(name, valid)}"
            )
        if name not in valid:
            raise RecipeError(f"{where} cannot be set here: {kind.why_not(name)}. Valid: {', '.join(valid)}")
    why = _try(kind, config.weight_decay, arguments)
    if why is None:
        return
    for name, value in arguments.items():
        others = {key: other for key, other in arguments.items() if key != name}
        if _try(kind, config.weight_decay, others) is None:
            default = list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name]
            raise RecipeError(
                f"train.optim.{name}: {config.optim_name} does not take {value!r}: expected a value such as {default!r}, "
                f"its default ({why})"
            )
    raise RecipeError(f"train.optim={config.optim}: {why}")


def _try(kind: OptimizerKind, weight_decay: float, arguments: Mapping[str, Any]) -> str | None:
    """Take a step on four numbers with these arguments; return the error's message, or None."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    try:
        kind.optimizer([weight], lr=1e-3, weight_decay=weight_decay, **kind.fixed, **arguments).step()
    except (TypeError, ValueError, IndexError) as error:
        return str(error)
    return None


def check_model(config: TrainConfig, model: PreTrainedModel) -> None:
    """Raise RecipeError for keys that have no effect on ``model`` (adapted, possibly on the meta device)."""
    name = config.optim_name
    if name.endswith("adamw_8bit"):
        smallest = config.optim_args.get("min_8bit_size", OPTIMIZERS[name]().defaults["min_8bit_size"])
        if max(p.numel() for p in model.parameters() if p.requires_grad) < smallest:
            raise RecipeError(
                f"train.optim={name} has no effect: weights below {smallest} elements keep their moments in 32 bits, and "
                "no trained weight is larger.\n"
                f"  Use train.optim={name.removesuffix('_8bit')}, or lower train.optim.min_8bit_size."
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
    """Make the optimiser over groups of the ``trained`` weights (by name) that share a rate and a decay.

    ``heads``: names of the output layer's parameters. ``factors``: multiples of the learning rate by name; 1
    for names left out. Norms and biases (one-dimensional weights) do not decay. A group's ``logged`` is the
    key of its rate in a record; the groups at ``train.learning_rate`` come first.
    """
    kind = OPTIMIZERS[config.optim_name]()
    groups: dict[tuple[bool, float, bool], JsonObject] = {}
    for name, weight in trained.items():
        own = name in heads and config.head_learning_rate is not None
        factor, decays = factors.get(name, 1.0), weight.dim() > 1
        rate = (config.head_learning_rate if own else config.learning_rate) or 0.0
        logged = ("head_" if own else "") + "learning_rate" + (f"_x{factor:g}" if factor != 1 else "")
        decay = config.weight_decay if decays else 0.0
        group = {"params": [], "lr": rate * factor, "weight_decay": decay, "logged": logged}
        groups.setdefault((own, factor, decays), group)["params"].append(weight)
    ordered = sorted(groups.values(), key=lambda group: (group["logged"] != "learning_rate", group["logged"]))
    return kind.optimizer(ordered, lr=float(config.learning_rate or 0), **kind.fixed, **config.optim_args)


def check_schedule(config: TrainConfig, steps: int) -> None:
    """Raise RecipeError for a schedule that cannot be made over ``steps``, by making one."""
    schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), config, steps)


def schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int, best: str = "min"
) -> torch.optim.lr_scheduler.LRScheduler:
    """Make the schedule with ``transformers.get_scheduler``. Raises RecipeError.

    ``best``: min or max, the direction of better values of the figure that a plateau schedule follows."""
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
    on_plateau = config.scheduler_name == SchedulerType.REDUCE_ON_PLATEAU.value
    arguments = ({"mode": best} if on_plateau else {}) | config.scheduler_args
    try:
        made: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            config.scheduler_name, optimizer, warmup, steps, scheduler_specific_kwargs=arguments
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train.lr_scheduler_type={config.lr_scheduler_type}: {error}") from None
    return made
