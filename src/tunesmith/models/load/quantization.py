"""A base whose linear layers are kept in 4 or 8 bits (Dettmers et al. 2023): how it is asked for, recorded, counted, and undone.

bitsandbytes does the rounding, transformers calls it while it loads. Embeddings, norms and the output layer keep their format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tunesmith.errors import MissingExtra, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("nf4", "fp4", "int8")
BLOCK, NESTED_BLOCK = 64, 256
"""Numbers that share a scale, and scales that share one under double quantisation: bitsandbytes' own."""

OUTPUTS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "pre_classifier", r"(?:.*\.)?pooler")
"""Names of output layers, which stay as they are."""


def load_kwargs(quant_type: str, use_double_quant: bool, whole: Iterable[str] = ()) -> dict[str, Any]:
    """What ``from_pretrained`` needs to quantise a base. ``whole``: modules, by the end of their names, that are left out.

    Raises MissingExtra without bitsandbytes.
    """
    require(f"a base in {quant_type}")
    from transformers import BitsAndBytesConfig

    names = list(whole)
    skipped = [*OUTPUTS, *(rf"(?:.*\.)?{re.escape(name)}" for name in names)]
    if quant_type == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=use_double_quant,
            llm_int8_skip_modules=skipped,
        )
    }


def require(purpose: str) -> None:
    """Raise MissingExtra without bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "bnb", purpose)


def of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """``load_kwargs`` of what :func:`record` wrote."""
    if record.get("quant_type") not in KINDS:
        raise ModelError(
            f"tunesmith.json: unknown quantisation {record.get('quant_type')!r}; expected one of {', '.join(KINDS)}"
        )
    kwargs = load_kwargs(record["quant_type"], bool(record.get("use_double_quant")))
    kwargs["quantization_config"].llm_int8_skip_modules = record.get("skipped")
    return kwargs


def record(model: PreTrainedModel) -> dict[str, Any] | None:
    """How the base of ``model`` was quantised, so that :func:`of_record` does it again; None for one that was not."""
    from tunesmith.models.load import dequantized_linear

    config = getattr(model.config, "quantization_config", None)
    if config is None or not any(map(dequantized_linear.is_layer, model.modules())):
        return None
    four = config.load_in_4bit
    layer = next(filter(dequantized_linear.is_layer, model.modules()))
    return {
        "quant_type": config.bnb_4bit_quant_type if four else "int8",
        "use_double_quant": config.bnb_4bit_use_double_quant if four else None,
        "blocksize": layer.weight.quant_state.blocksize if four else None,
        "compute_dtype": str(layer.compute_dtype).removeprefix("torch."),
        "skipped": config.llm_int8_skip_modules,
    }


# ------------------------------------------------------------------------------------------------------------ memory


@dataclass(frozen=True)
class Estimate:
    """Of a base that is not loaded yet: how many numbers will be quantised, and the bytes that they will take."""

    parameters: int
    bytes: int


def estimate(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> Estimate:
    """``model``: the network on the meta device, not adapted yet. ``kwargs``: those of :func:`load_kwargs`, or others."""
    config = kwargs.get("quantization_config")
    if config is None:
        return Estimate(0, 0)
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules)
    layers = [
        module.weight
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, left)
    ]
    numbers = sum(weight.numel() for weight in layers)
    if config.load_in_8bit:
        return Estimate(numbers, numbers + sum(4 * max(weight.shape) for weight in layers))
    scale = 1 + 4 / NESTED_BLOCK if config.bnb_4bit_use_double_quant else 4
    return Estimate(numbers, int(numbers * (0.5 + scale / BLOCK)))


def measured(model: PreTrainedModel) -> dict[str, Any] | None:
    """What a quantised base takes, scales and tables included; None for one that is not quantised.

    "parameters": numbers in the quantised layers, "bytes": what they take, "bits_per_parameter"; "base_bytes": everything that is
    frozen, and "base_bytes_before": the same, had the layers the format of the rest.
    """
    import torch

    from tunesmith.models.load import dequantized_linear

    layers = [module for module in model.modules() if dequantized_linear.is_layer(module)]
    kept = record(model)
    if kept is None:
        return None
    inside = {id(layer.weight) for layer in layers}
    held = {tensor.data_ptr(): tensor.nbytes for layer in layers for tensor in _tensors(layer)}
    numbers, taken = sum(layer.in_features * layer.out_features for layer in layers), sum(held.values())
    rest = sum(p.nbytes for p in model.parameters() if not p.requires_grad and id(p) not in inside)
    each = getattr(torch, kept["compute_dtype"]).itemsize
    return {
        **kept,
        "layers": len(layers),
        "parameters": numbers,
        "bytes": taken,
        "bits_per_parameter": 8 * taken / numbers,
        "base_bytes": rest + taken,
        "base_bytes_before": rest + each * numbers,
    }


def lines(model: PreTrainedModel) -> list[str]:
    """What is to be said of a quantised base: its bytes, after and before."""
    facts = measured(model)
    if facts is None:
        return []
    twice = ", double quantisation" if facts["use_double_quant"] else ""
    return [
        f"the base takes {facts['base_bytes'] / 2**20:,.1f} MiB, {facts['base_bytes_before'] / 2**20:,.1f} MiB before: "
        f"{facts['layers']} layers in {facts['quant_type']}{twice} at {facts['bits_per_parameter']:.3f} bits a parameter"
    ]


def _tensors(layer: Any) -> list[Any]:
    """Everything that a layer's weight is made of."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return [weight.data, layer.state.SCB if layer.state.SCB is not None else weight.SCB]
    inner = [] if state.state2 is None else [state.state2.absmax, state.state2.code, state.offset]
    return [weight.data, state.absmax, state.code, *inner]


# ------------------------------------------------------------------------------------------------------------ undoing


def write_values(plain: Any, base: Any) -> None:
    """Write into the linear layers of ``plain`` the numbers that the bits of ``base``, the same network quantised, stand for.

    ``plain`` is in fp32, and ``base`` computes in it: nothing is rounded.
    """
    import torch

    from tunesmith.models.load import dequantized_linear

    layers = dict(plain.named_modules())
    with torch.no_grad():
        for name, module in base.named_modules():
            if dequantized_linear.is_layer(module):
                target = layers[name].weight
                value = dequantized_linear.weight(module, target.dtype)
                target.copy_(
                    value.t() if type(layers[name]).__name__ == "Conv1D" else value
                )  # gpt2 keeps (in, out)
