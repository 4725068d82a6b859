"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021) as a tuner for peft, which has none.

y -> y + U act(D y + d) + u, for the output y of a sublayer's last linear layer: before dropout, residual and
norm, as in figure 2 of Houlsby et al. U and u start at zero, so a new adapter changes nothing. ``register``
adds the type to peft's tables, after which ``PeftConfig.from_pretrained``, ``get_peft_model``,
``PeftModel.from_pretrained`` and the rest know it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import RecipeError
from tunesmith.models.adapters import linear_layers
from tunesmith.models.fast import torch_compile
from tunesmith.models.load import module_patterns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
VARIANTS = {"houlsby": ("attention", "feed-forward"), "pfeiffer": ("feed-forward",)}
"""The sublayers of each layer that have an adapter on their output."""


class BottleneckType(enum.StrEnum):
    """peft's enum of types cannot be extended. A member of this one equals its name, which a config holds."""

    BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """``adapter_config.json``. ``target_modules``: None = the output projections that :func:`sublayers`
    finds.

    peft defines the rest: ``modules_to_save``, ``trainable_token_indices``, ``ensure_weight_tying``.
    """

    variant: str = "pfeiffer"
    bottleneck_size: int = 64
    non_linearity: str = "relu"
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: dict[str, list[int]] | list[int] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BottleneckType.BOTTLENECK
        checks = [
            ("variant", self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}"),
            ("non_linearity", self.non_linearity in NON_LINEARITIES, f"one of {', '.join(NON_LINEARITIES)}"),
            ("bottleneck_size", self.bottleneck_size >= 1, "at least 1"),
            ("dropout", 0 <= self.dropout < 1, "a share from 0 up to 1"),
        ]
        for name, valid, expected in checks:
            if not valid:
                raise ValueError(f"{name}: expected {expected}, got {vars(self)[name]!r}")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer with one or more adapters on its output, each (width, size) and back."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "non_linearity")
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    bottleneck_down: dict[str, nn.Linear]
    bottleneck_up: dict[str, nn.Linear]
    bottleneck_dropout: dict[str, nn.Dropout]

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_layers.widths(base_layer)
        for name in ("bottleneck_down", "bottleneck_up", "bottleneck_dropout"):
            setattr(self, name, nn.ModuleDict())
        self.non_linearity: dict[str, str] = {}
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter: D is drawn as torch draws a linear layer, all else is zero."""
        down = nn.Linear(self.out_features, config.bottleneck_size)
        up = nn.Linear(config.bottleneck_size, self.out_features)
        with torch.no_grad():
            for parameter in (down.bias, up.weight, up.bias):
                parameter.zero_()
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.non_linearity[adapter_name] = config.non_linearity
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y if self.disable_adapters else self.adapted(y)

    def adapted(self, y: Tensor) -> Tensor:
        """(..., width) -> (..., width): ``y`` plus the update of each active adapter."""
        out = y
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down = self.bottleneck_down[name]
                low = self.bottleneck_dropout[name](self.activation(name)(down(y.to(down.weight.dtype))))
                out = out + self.bottleneck_up[name](low)
        return out.to(y.dtype)

    def activation(self, adapter_name: str) -> Callable[[Tensor], Tensor]:
        return NON_LINEARITIES[self.non_linearity[adapter_name]]


class BottleneckModel(BaseTuner):
    """Puts a :class:`BottleneckLayer` around each target module."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(
        self, peft_config: BottleneckConfig, model_config: dict[str, object]
    ) -> BottleneckConfig:
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: PreTrainedModel) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = sublayers(model, peft_config.variant)

    def _post_injection_hook(self, model: nn.Module, config: BottleneckConfig, adapter_name: str) -> None:
        # peft shortens the list to a set, whose order differs from run to run
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Linear | BottleneckLayer,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
        else:
            layer = BottleneckLayer(target, adapter_name, peft_config)
            self._replace_module(parent, target_name, layer, target)

    def _add_modules_to_save_to_tie(self, peft_config: BottleneckConfig, tied_weight_keys: list[str]) -> None:
        """Train the embedding in place of a whole layer that is tied to it, as peft's LoRA does."""
        tied = sorted(tied_weight_keys)
        first = self.model.get_input_embeddings()
        embedding = next(name for name, module in self.model.named_modules() if module is first)
        saved = peft_config.modules_to_save or []
        kept = [
            name
            for name in saved
            if not any(module_patterns.matching_patterns([name], [key]) for key in tied)
        ]
        peft_config.modules_to_tie = tied
        peft_config.modules_to_save = list(dict.fromkeys([*kept, embedding]))

    def _check_merge_allowed(self) -> None:
        raise ValueError("a bottleneck adapter has a non-linearity: no weight of the base computes the same")


def register() -> None:
    """Add the type to peft's tables. Calling it again does no harm."""
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[BottleneckType.BOTTLENECK] = BottleneckConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[BottleneckType.BOTTLENECK] = BottleneckModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[BottleneckType.BOTTLENECK] = BottleneckModel.prefix


def sublayers(model: PreTrainedModel, variant: str) -> list[str]:
    """Return the names of the output projections that ``variant`` adapts, in the order of the network.

    They are found by structure: a layer is a ``GradientCheckpointingLayer``, the module of an ``...Attention``
    class in it is its attention, the rest its feed-forward, and the output projection is the linear layer that
    returns to the hidden width. Raises RecipeError for a network with a layer of another structure.
    """
    config = model.config.get_text_config()
    layers = torch_compile.named_layers(model)
    if len(layers) != config.num_hidden_layers:
        found = f"{len(layers)} of its {config.num_hidden_layers} layers are layers of transformers"
        raise _unrecognised(model, found)
    names: list[str] = []
    for name, layer in layers.items():
        outputs = _output_projections(model, name, layer, config.hidden_size)
        names += [outputs[sublayer] for sublayer in VARIANTS[variant]]
    return names


def _output_projections(model: PreTrainedModel, prefix: str, layer: nn.Module, width: int) -> dict[str, str]:
    """Return sublayer -> name of its output projection, in one layer of the network."""
    attentions = _attentions(layer)
    if len(attentions) != 1:
        raise _unrecognised(model, f"{prefix} has {len(attentions)} attentions")
    inside, linears = f"{attentions[0]}.", dict(_linears(layer))
    known = (inside, *(f"{linear}." for linear in linears))
    matrices = [name for name, weight in layer.named_parameters() if weight.dim() > 1]
    others = [name for name in matrices if not name.startswith(known)]
    if others:
        raise _unrecognised(model, f"{prefix} has a weight in no linear layer (experts?): {min(others)}")
    outputs = [name for name, (_, out) in linears.items() if out == width]
    attention = [name for name in outputs if name.startswith(inside)]
    forward = [name for name in outputs if not name.startswith(inside)]
    if not attention or len(forward) != 1:
        found = f"{len(attention)} linear layers of its attention and {len(forward)} of its feed-forward"
        raise _unrecognised(model, f"in {prefix} {found} have {width} outputs, expected at least 1 and 1")
    # queries, keys and values may have the hidden width too; the output projection is defined after them
    return {"attention": f"{prefix}.{attention[-1]}", "feed-forward": f"{prefix}.{forward[0]}"}


def _attentions(layer: nn.Module) -> list[str]:
    named = [name for name, part in layer.named_modules() if name and "Attention" in type(part).__name__]
    return [name for name in named if not any(name.startswith(f"{outer}.") for outer in named)]


def _linears(layer: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name and widths of each linear layer; one with an adapter counts as the layer itself."""
    wrapped = None
    for name, module in layer.named_modules():
        if wrapped is not None and name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped, module = f"{name}.", module.get_base_layer()
        if isinstance(module, nn.Linear | Conv1D):
            yield name, linear_layers.widths(module)


def _unrecognised(model: PreTrainedModel, why: str) -> RecipeError:
    return RecipeError(
        f"adaptation=bottleneck: the sublayers of {type(model).__name__} are not recognised: {why}.\n"
        "  Use adaptation=lora, which takes any linear layer."
    )
