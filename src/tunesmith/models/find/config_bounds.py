"""Refuse a config whose numbers are far larger than the weights next to it.

transformers and peft build the network of a config before they read a weight. With ten million layers or
labels, that takes hours and all memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.json_types import JsonObject
from tunesmith.models.find.headers import TensorHeader

LAYERS = frozenset((
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers",
))  # fmt: skip
"""Keys that count layers. A config with more layers than the weights have tensors is refused."""

WIDTHS = frozenset((
    "num_labels", "num_experts", "num_local_experts", "n_routed_experts", "extra_ids",  # full models
    "r", "num_virtual_tokens", "bottleneck_size", "token_dim", "encoder_hidden_size", "num_attention_heads",  # adapters
))  # fmt: skip
"""Keys that are a dimension of a tensor, or a number of tensors. A value larger than both is refused."""

LEAST = 64
"""Values up to this one are never refused: tiny models have few tensors."""

SPARE, LEAST_PARAMETERS = 1.25, 2**24
"""A network may have SPARE times the stored parameters, and LEAST_PARAMETERS more for an unsaved head."""

PACKED = 16
"""Parameters that a quantised checkpoint may pack into one stored number."""


def check_counts(config: JsonObject, tensors: Iterable[TensorHeader], file: Path) -> None:
    """Raise ModelError when ``config``, read from ``file``, counts more layers or rows than ``tensors`` have."""
    shapes = [tensor.shape for tensor in tensors]
    widest = max((size for shape in shapes for size in shape), default=0)
    most = {"layers": max(LEAST, len(shapes)), "rows": max(LEAST, len(shapes), widest)}
    for key, number in _numbers(config):
        limit = most["layers"] if key in LAYERS else most["rows"] if key in WIDTHS else None
        if limit is not None and number > limit:
            raise ModelError(
                f"{file}: `{key}` is {number:,}, and the weights have {len(shapes):,} tensors of at most {widest:,} rows. "
                "The config belongs to other weights, or is damaged.\n  Copy or download the folder again."
            )


def check_parameters(parameters: int, tensors: Iterable[TensorHeader], quantised: bool, folder: Path) -> None:
    """Raise ModelError when a network of ``parameters`` numbers is far larger than the weights in ``folder``."""
    stored = sum(tensor.count for tensor in tensors)
    if parameters > LEAST_PARAMETERS + stored * (PACKED if quantised else SPARE):
        raise ModelError(
            f"{folder}: config.json describes a network of {parameters:,} parameters, and the weights have {stored:,}. "
            "The config belongs to other weights, or is damaged.\n  Copy or download the folder again."
        )


def _numbers(config: object) -> Iterator[tuple[str, int]]:
    """Yield (key, value) of every integer, also in nested mappings.

    Values of ``rank_pattern`` have the key r.
    """
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, int) and not isinstance(value, bool):
            yield str(key), value
        elif key == "rank_pattern" and isinstance(value, dict):
            yield from (("r", number) for number in value.values() if isinstance(number, int))
        else:
            yield from _numbers(value)
