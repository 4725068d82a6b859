"""Properties of the types of saved adapters: the names that peft writes as ``peft_type`` into
adapter_config.json.

Which adaptation saves which type is not known here: see ``adaptations.Traits.saved_as``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """``switchable``: several can be on one base in memory, one in use at a time. Virtual tokens are not:
    there is one forward of the body. ``summable``: the weighted sum of several is an adapter of the same
    type. ``unmergeable``: why no weight of the base can replace it; None = it can be merged. ``prefix``: how
    the names of its parameters in a layer begin; None = it has none there.
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
        unmergeable="a layer with a non-linearity: no weight of the base computes the same, so it cannot be merged.\n"
        "  Use the adapter as it is: every verb opens its folder.",
        prefix="bottleneck_",
    ),
    "PREFIX_TUNING": Kind(),
    "PROMPT_TUNING": Kind(),
}
"""The types that our adaptations save. peft's config itself tells whether a type consists of virtual tokens."""

PREFIXES = tuple(kind.prefix for kind in KINDS.values() if kind.prefix)
"""How the names of an adapter's parameters in a layer begin."""


def type_of(config: Mapping[str, object]) -> str:
    """Return peft's name of an adapter's type from its adapter_config.json; "" where it names none."""
    return str(config.get("peft_type", "")).upper()


def kind_of(peft_type: str) -> Kind:
    """Return the properties of a type; for a type that is not ours only that peft may be able to merge it."""
    return KINDS.get(peft_type, Kind())
