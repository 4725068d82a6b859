"""Properties of the types of saved adapters (``peft_type`` in adapter_config.json).

``adaptations.Traits.saved_as`` tells which adaptation saves which type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """Properties of a type of adapter."""

    switchable: bool = False
    """Several can be on one base in memory, one in use. Virtual tokens cannot: the body has one forward."""
    summable: bool = False
    """The weighted sum of several is an adapter of the same type."""
    unmergeable: str | None = None
    """Why no weight of the base can replace it; None = it can be merged."""
    prefix: str | None = None
    """First part of the names of its parameters in a layer; None = it has none there."""


KINDS = {
    "LORA": Kind(switchable=True, summable=True, prefix="lora_"),
    "IA3": Kind(switchable=True, prefix="ia3_"),
    "BOTTLENECK": Kind(
        switchable=True,
        unmergeable="a layer with a non-linearity, which no weight can replace, so it cannot be merged.\n"
        "  Use the adapter as it is: every verb opens its folder.",
        prefix="bottleneck_",
    ),
    "PREFIX_TUNING": Kind(),
    "PROMPT_TUNING": Kind(),
}
"""The types that our adaptations save. Whether a type has virtual tokens is in peft's config."""

PREFIXES = tuple(kind.prefix for kind in KINDS.values() if kind.prefix)
"""First part of the names of an adapter's parameters in a layer."""


def type_of(config: Mapping[str, object]) -> str:
    """Return peft's name of an adapter's type from its adapter_config.json; "" where it names none."""
    return str(config.get("peft_type", "")).upper()


def kind_of(peft_type: str) -> Kind:
    """Return the properties of a type. For a type that is not ours: peft may be able to merge it, no more."""
    return KINDS.get(peft_type, Kind())


def layers_of(names: Iterable[str]) -> list[str]:
    """Return the layers of the base, sorted, in which these tensors of an adapter are factors, vectors or
    bottlenecks."""
    inside = re.compile(rf"base_model\.model\.(.+?)\.(?:{'|'.join(PREFIXES)})")
    return sorted({match[1] for name in names if (match := inside.match(name))})
