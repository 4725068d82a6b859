"""Quantise, record, measure and de-quantise a base model in 4 or 8 bits (Dettmers et al. 2023).

bitsandbytes rounds its linear layers while transformers loads them; embeddings, norms and output layers stay.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

from tunesmith.errors import MissingExtra, ModelError
from tunesmith.json_types import JsonObject
from tunesmith.models.network import attribute, quant_state

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from tunesmith.models.load.dequantized_linear import QuantizedLinear

LoadKwargs: TypeAlias = "dict[str, BitsAndBytesConfig]"

KINDS = ("nf4", "fp4", "int8")
BLOCK, NESTED_BLOCK = 64, 256
"""Numbers that share a scale in bitsandbytes; scales that share one under double quantisation."""

OUTPUTS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "pre_classifier", r"(?:.*\.)?pooler")
"""Patterns of the output layers, which are not quantised."""


def load_kwargs(quant_type: str, use_double_quant: bool, skip: Iterable[str] = ()) -> LoadKwargs:
    """Return the arguments of ``from_pretrained`` that quantise a base model.

    ``skip``: the ends of names of modules to leave out. Raises MissingExtra without bitsandbytes.
    """
    require(f"a base in {quant_type}")
    from transformers import BitsAndBytesConfig

    skipped = [*OUTPUTS, *(rf"(?:.*\.)?{re.escape(name)}" for name in skip)]
    four_bits = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": use_double_quant}
    options = {"load_in_8bit": True} if quant_type == "int8" else {"load_in_4bit": True, **four_bits}
    return {"quantization_config": BitsAndBytesConfig(**options, llm_int8_skip_modules=skipped)}


def require(purpose: str) -> None:
    """Raise MissingExtra without bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "bnb", purpose)


def import_bitsandbytes() -> None:
    """Import bitsandbytes, if it is installed, without torch's compiler.

    peft imports it with every adapter. Its module body hands functions to ``torch.compile``, and that loads the
    compiler, which takes a second. Only devices without kernels in bitsandbytes use these functions, and they
    compute the same uncompiled.
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    switch = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with suppress(ImportError, OSError, RuntimeError):  # a broken package: who needs it reports it
            import bitsandbytes  # noqa: F401
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


@contextmanager
def one_tensor_at_a_time() -> Iterator[None]:
    """Let each tensor leave memory once it is quantised.

    transformers maps the file and quantises tensor by tensor, but the pages that it has read count as memory until
    the model is loaded: the unquantised model next to the quantised one."""
    from transformers.integrations import bitsandbytes as integration

    from tunesmith.models.load.mapped_files import MappedFiles

    operations = (integration.Bnb4bitQuantize, integration.Bnb8bitQuantize)
    before = [operation.convert for operation in operations]
    mapped: list[MappedFiles] = []

    def dropping(convert: Callable[..., JsonObject]) -> Callable[..., JsonObject]:
        def convert_and_drop(self: object, tensors: JsonObject, **options: object) -> JsonObject:
            result = convert(self, tensors, **options)
            if not mapped:  # the first tensor: all files are mapped now
                mapped.append(MappedFiles())
            for found in tensors.values():
                for tensor in found if isinstance(found, list) else [found]:
                    mapped[0].drop(tensor)
            return result

        return convert_and_drop

    for operation, convert in zip(operations, before, strict=True):
        operation.convert = dropping(convert)
    try:
        yield
    finally:
        for operation, convert in zip(operations, before, strict=True):
            operation.convert = convert


def kwargs_from_record(record: JsonObject | None) -> LoadKwargs:
    """Return the ``load_kwargs`` that quantise a base model as :func:`record` found it; {} for None."""
    if not record:
        return {}
    quant_type = record.get("quant_type")
    if quant_type not in KINDS:
        raise ModelError(
            f"tunesmith.json: quantization.quant_type: expected one of {', '.join(KINDS)}, "
            f"found {quant_type!r}.\n  Copy the folder again."
        )
    kwargs = load_kwargs(quant_type, bool(record.get("use_double_quant")))
    kwargs["quantization_config"].llm_int8_skip_modules = record.get("skipped")
    return kwargs


def record(model: PreTrainedModel) -> JsonObject | None:
    """Return how the base model was quantised, for :func:`kwargs_from_record`; None when it was not."""
    config = attribute(model.config, "quantization_config")
    layers = _quantized_layers(model)
    if config is None or not layers:
        return None
    four_bits = config.load_in_4bit
    return {
        "quant_type": config.bnb_4bit_quant_type if four_bits else "int8",
        "use_double_quant": config.bnb_4bit_use_double_quant if four_bits else None,
        "blocksize": layers[0].weight.quant_state.blocksize if four_bits else None,
        "compute_dtype": str(layers[0].compute_dtype).removeprefix("torch."),
        "skipped": config.llm_int8_skip_modules,
    }


@dataclass(frozen=True)
class Estimate:
    """Numbers to be quantised in a base model that is not loaded yet, and their bytes afterwards."""

    parameters: int
    bytes: int


def estimate(model: PreTrainedModel, kwargs: LoadKwargs) -> Estimate:
    """``model``: the network on the meta device, without adapter. ``kwargs``: of ``from_pretrained``."""
    config = kwargs.get("quantization_config")
    if config is None:
        return Estimate(0, 0)
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules)
    weights = [
        module.weight
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped)
    ]
    numbers = sum(weight.numel() for weight in weights)
    if config.load_in_8bit:
        return Estimate(numbers, numbers + sum(4 * max(weight.shape) for weight in weights))
    scale = 1 + 4 / NESTED_BLOCK if config.bnb_4bit_use_double_quant else 4
    return Estimate(numbers, int(numbers * (0.5 + scale / BLOCK)))


def measure(model: PreTrainedModel) -> JsonObject | None:
    """Return :func:`record` and the memory of a quantised base model, None for one that is not quantised.

    "parameters": numbers in the quantised layers. "bytes", "bits_per_parameter": their size with scales and
    tables. "base_bytes": everything frozen. "base_bytes_before": the same without quantisation.
    """
    recorded, layers = record(model), _quantized_layers(model)
    if recorded is None:
        return None
    weights = {id(layer.weight) for layer in layers}
    stored = {tensor.data_ptr(): tensor.nbytes for layer in layers for tensor in _weight_tensors(layer)}
    numbers, taken = sum(layer.in_features * layer.out_features for layer in layers), sum(stored.values())
    rest = sum(p.nbytes for p in model.parameters() if not p.requires_grad and id(p) not in weights)
    return {
        **recorded,
        "layers": len(layers),
        "parameters": numbers,
        "bytes": taken,
        "bits_per_parameter": 8 * taken / numbers,
        "base_bytes": rest + taken,
        "base_bytes_before": rest + layers[0].compute_dtype.itemsize * numbers,
    }


def lines(model: PreTrainedModel) -> list[str]:
    """Return the line that reports the memory of a quantised base model; [] for one that is not quantised."""
    facts = measure(model)
    if facts is None:
        return []
    twice = ", double quantisation" if facts["use_double_quant"] else ""
    after, before = facts["base_bytes"] / 2**20, facts["base_bytes_before"] / 2**20
    layers = f"{facts['layers']} layers in {facts['quant_type']}{twice}"
    bits = f"{facts['bits_per_parameter']:.3f} bits a parameter"
    return [f"the base takes {after:,.1f} MiB ({before:,.1f} MiB unquantised): {layers} at {bits}"]


def _quantized_layers(model: PreTrainedModel) -> list[QuantizedLinear]:
    from tunesmith.models.load import dequantized_linear  # imports torch

    return [module for module in model.modules() if dequantized_linear.is_layer(module)]


def _weight_tensors(layer: QuantizedLinear) -> list[torch.Tensor]:
    weight, state = layer.weight, quant_state(layer.weight)
    if state is None:
        return [weight.data, layer.state.SCB if layer.state.SCB is not None else weight.SCB]
    nested = [] if state.state2 is None else [state.state2.absmax, state.state2.code, state.offset]
    return [weight.data, state.absmax, state.code, *nested]


def write_dequantized(plain: nn.Module, base: nn.Module) -> None:
    """Write the de-quantised weights of ``base`` into ``plain``, the same network in fp32, unrounded."""
    import torch

    from tunesmith.models.load import dequantized_linear

    targets = dict(plain.named_modules())
    with torch.no_grad():
        for name, module in base.named_modules():
            if dequantized_linear.is_layer(module):
                target = targets[name]
                value = dequantized_linear.dequantize(module, target.weight.dtype)
                transposed = type(target).__name__ == "Conv1D"  # gpt2 keeps (in, out)
                target.weight.copy_(value.t() if transposed else value)
