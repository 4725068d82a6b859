"""What follows from the type of a saved adapter: the name that peft writes as ``peft_type`` into adapter_config.json.

Which of our adaptations saves which type is not known here: that is ``adaptations.Traits.saved_as``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """``switchable``: several stand on one base in memory, one in use at a time. Virtual tokens work through the body's forward,
    which has room for one.
    ``summable``: the weighted sum of several is an adapter of the same type.
    ``unmergeable``: why no weight of the base can stand for it; None = it can be merged.
    ``prefix``: how the names of its parameters in a layer begin; None = it has none there.
    """

    switchable: bool = False
    summable: bool = False
    unmergeable: str | None = None
    prefix: str | None = None


KINDS = {
    "LORA": Kind(switchable=True, summable=True, prefix="lora_"),
    "IA3": Kind(switchable=True, prefix="ia3_"),
    "BOTTLENECK": Kind(
        switchable=True,
        unmergeable="a layer with a non-linearity: no weight of the base does the same, so it cannot be merged.\n"
        "  Use the adapter as it is: every verb opens its folder.",
        prefix="bottleneck_",
    ),
    "PREFIX_TUNING": Kind(),
    "PROMPT_TUNING": Kind(),
}
"""The types that our adaptations save. Whether a type consists of virtual tokens, peft's config says itself."""

PREFIXES = tuple(kind.prefix for kind in KINDS.values() if kind.prefix)
"""How the names of an adapter's own parameters in a layer begin."""


def type_of(config: Mapping[str, Any]) -> str:
    """peft's name of the type of an adapter, from its adapter_config.json; "" where it names none."""
    return str(config.get("peft_type", "")).upper()


def kind_of(peft_type: str) -> Kind:
    """What is known of a type; of one that is not ours, nothing but that peft may be able to merge it."""
    return KINDS.get(peft_type, Kind())
