"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021) as a tuner of peft's, which has none.

y -> y + U act(D y + d) + u, for the output y of a sublayer's last linear layer: before dropout, residual and norm, as in figure 2
of Houlsby et al. U and u start at zero, so a fresh adapter changes nothing. ``register`` writes the kind into peft's tables;
from then on ``PeftConfig.from_pretrained``, ``get_peft_model``, ``PeftModel.from_pretrained`` and the rest know it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import RecipeError
from tunesmith.models.adapters import linear_layers
from tunesmith.models.fast import torch_compile
from tunesmith.models.load import module_patterns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NON_LINEARITIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
VARIANTS = {"houlsby": ("attention", "feed-forward"), "pfeiffer": ("feed-forward",)}
"""After which sublayers of each layer an adapter stands."""


class Kind(enum.StrEnum):
    """peft's own list of kinds is closed; a member of this one is equal to its name, which is what stands in a config."""

    BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """``adapter_config.json``. ``target_modules``: None = the output projections found by :func:`sublayers`.

    The rest are peft's own fields: ``modules_to_save``, ``trainable_token_indices``, ``ensure_weight_tying``.
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
        self.peft_type: Any = Kind.BOTTLENECK
        if self.variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(
                f"non_linearity: expected one of {', '.join(NON_LINEARITIES)}, got {self.non_linearity!r}"
            )
        if self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size: expected at least 1, got {self.bottleneck_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share from 0 up to 1, got {self.dropout}")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer with one or more adapters on its output. ``bottleneck_down`` (width, size), ``bottleneck_up`` back."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "non_linearity")
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_layers.widths(base_layer)
        self.bottleneck_down: Any = nn.ModuleDict()
        self.bottleneck_up: Any = nn.ModuleDict()
        self.bottleneck_dropout: Any = nn.ModuleDict()
        self.non_linearity: dict[str, str] = {}
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter: D drawn as torch draws a linear layer, all else zero."""
        down = nn.Linear(self.out_features, config.bottleneck_size)
        up = nn.Linear(config.bottleneck_size, self.out_features)
        with torch.no_grad():
            for start in (down.bias, up.weight, up.bias):
                start.zero_()
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.non_linearity[adapter_name] = config.non_linearity
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return y if self.disable_adapters else self.adapted(y)

    def adapted(self, y: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width): ``y`` plus what each active adapter makes of it."""
        out = y
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down = self.bottleneck_down[name]
                low = self.bottleneck_dropout[name](self.activation(name)(down(y.to(down.weight.dtype))))
                out = out + self.bottleneck_up[name](low)
        return out.to(y.dtype)

    def activation(self, adapter_name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return NON_LINEARITIES[self.non_linearity[adapter_name]]


class BottleneckModel(BaseTuner):
    """Puts a :class:`BottleneckLayer` around each target module."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = sublayers(model, peft_config.variant)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if isinstance(
            config.target_modules, set
        ):  # peft shortens the list to a set, whose order differs from run to run
            config.target_modules = sorted(config.target_modules)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
        else:
            self._replace_module(
                parent, target_name, BottleneckLayer(target, adapter_name, peft_config), target
            )

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: Any) -> None:
        """A layer that is trained whole and tied stays one with the embedding, as under peft's own LoRA."""
        tied = sorted(tied_weight_keys)
        first = self.model.get_input_embeddings()
        embedding = next(name for name, module in self.model.named_modules() if module is first)
        kept = [
            name
            for name in peft_config.modules_to_save
            if not any(module_patterns.matching_patterns([name], [key]) for key in tied)
        ]
        peft_config.modules_to_tie = tied
        peft_config.modules_to_save = list(dict.fromkeys([*kept, embedding]))

    def _check_merge_allowed(self) -> None:
        raise ValueError("a bottleneck adapter holds a non-linearity: no weight of the base does the same")


def register() -> None:
    """Make the kind known to peft. May be called again and again."""
    tables: Any = mapping
    tables.PEFT_TYPE_TO_CONFIG_MAPPING[Kind.BOTTLENECK] = BottleneckConfig
    tables.PEFT_TYPE_TO_TUNER_MAPPING[Kind.BOTTLENECK] = BottleneckModel
    tables.PEFT_TYPE_TO_PREFIX_MAPPING[Kind.BOTTLENECK] = BottleneckModel.prefix


def sublayers(model: PreTrainedModel, variant: str) -> list[str]:
    """The names of the output projections that ``variant`` adapts, in the order of the network.

    They are known by where they stand, not by what they are called. A layer of transformers is a ``GradientCheckpointingLayer``;
    what is of an ``...Attention`` class in it is its attention, the rest its feed-forward; the output projection is the linear
    layer that gives back the hidden width. Raises RecipeError for a network of which any layer is otherwise.
    """
    config = model.config.get_text_config()
    found: list[str] = []
    layers = torch_compile.named_layers(model)
    if len(layers) != config.num_hidden_layers:
        raise _unknown(
            model, f"{len(layers)} of its {config.num_hidden_layers} layers are layers of transformers"
        )
    for name, layer in layers.items():
        parts = _outputs(model, name, layer, config.hidden_size)
        found += [parts[sublayer] for sublayer in VARIANTS[variant]]
    return found


def _outputs(model: PreTrainedModel, prefix: str, layer: nn.Module, width: int) -> dict[str, str]:
    """Sublayer -> name of its output projection, in one layer of the network."""
    attentions = [name for name, part in layer.named_modules() if name and "Attention" in type(part).__name__]
    attentions = [
        name for name in attentions if not any(name.startswith(f"{other}.") for other in attentions)
    ]
    if len(attentions) != 1:
        raise _unknown(model, f"{prefix} has {len(attentions)} attentions")
    inside = f"{attentions[0]}."
    linears = dict(_linears(layer))
    attention = [name for name in linears if name.startswith(inside) and linears[name][1] == width]
    forward = [name for name in linears if not name.startswith(inside) and linears[name][1] == width]
    others = {
        name
        for name, weight in layer.named_parameters()
        if weight.dim() > 1
        and not name.startswith(inside)
        and not any(name.startswith(f"{linear}.") for linear in linears)
    }
    if others:
        raise _unknown(
            model, f"{prefix} has a weight that is in no linear layer, {min(others)}: experts, say"
        )
    if not attention or len(forward) != 1:
        counts = f"{len(attention)} of its attention and {len(forward)} of its feed-forward"
        raise _unknown(model, f"of the linear layers in {prefix}, {counts} give out {width} numbers")
    # queries, keys and values may give out the hidden width too; the output projection is made after them
    return {"attention": f"{prefix}.{attention[-1]}", "feed-forward": f"{prefix}.{forward[0]}"}


def _linears(layer: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and widths of each linear layer; one that an adapter stands on counts as itself."""
    wrapped = None
    for name, module in layer.named_modules():
        if wrapped is not None and name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped, module = f"{name}.", module.get_base_layer()
        if isinstance(module, nn.Linear | Conv1D):
            yield name, linear_layers.widths(module)


def _unknown(model: PreTrainedModel, why: str) -> RecipeError:
    return RecipeError(
        f"adaptation=bottleneck: the sublayers of {type(model).__name__} are not recognised: {why}.\n"
        "  Use adaptation=lora, which takes any linear layer."
    )
