"""Adaptations: which weights are trained, and how they are kept. One file each; the file's name is its key in the recipe.

An adaptation never knows what the loss is. A new one is one file here with a ``Config`` and an ``Adaptation`` class that
keeps this contract, and one row in ``tests/matrix``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Traits:
    """Facts about an adaptation that the rest of the program needs before there is an object of it, instead of its name.

    ``saved_as``  peft's type of the adapter that it saves (``models.adapters.adapter_types`` has what follows from it); None = it trains
    the model's own weights and saves a whole model.
    ``quantised_base``  the base is kept in 4 or 8 bits.
    ``dropout``  the key of its ``Config`` that draws at random while training; None = it draws nothing.
    ``peft_keys``  keys of peft's config that a user may look for -> the recipe's key that says the same, with an example.
    """

    saved_as: str | None
    quantised_base: bool = False
    dropout: str | None = None
    peft_keys: Mapping[str, str] = field(default_factory=dict)


class Adaptation(Protocol):
    """What the engine needs of an adaptation. ``learning_rate`` is its default rate.

    ``keys_of_learning``: keys of its ``Config`` that say how it learns, not what it is; they hold for one that is continued too.
    ``notes``: what ``apply`` decided that is not plain from the recipe, to be said once.

    Merging needs no adaptation object: it works on saved folders (``models.load.load.merge_into_base``), whoever trained them.
    """

    traits: Traits
    learning_rate: float
    keys_of_learning: frozenset[str]
    notes: Sequence[str]

    def load_kwargs(self) -> dict[str, Any]:
        """Extra arguments for ``from_pretrained`` (a quantisation config, say)."""
        ...

    def apply(
        self,
        model: PreTrainedModel,
        head: str,
        new_rows: Sequence[int] = (),
        tokenizer: PreTrainedTokenizerBase = None,
    ) -> Any:
        """Return the model with exactly the right parameters trainable. Raises RecipeError before touching it.

        ``new_rows``: rows of embedding and output layer that belong to new tokens; they are trained whatever else is.
        ``tokenizer``: the run's own, for an adaptation whose first values are words.
        """
        ...

    def learning_rates(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        """Name -> how many times the run's learning rate it learns at, of the trained ``parameters``; 1 for those left out."""
        ...

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write what was trained, as safetensors, in the Hub's or peft's own format."""
        ...


def names() -> list[str]:
    """The keys valid under ``adaptation:``."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """The file of one adaptation, imported when asked for."""
    return importlib.import_module(f"{__name__}.{name}")


def makers(saved_as: str, quantised_base: bool | None = None) -> list[str]:
    """The adaptations that save adapters of peft's type ``saved_as``; only those on such a base, where that is given."""
    traits = {name: module(name).Adaptation.traits for name in names()}
    return [
        name
        for name, found in traits.items()
        if found.saved_as == saved_as and quantised_base in (None, found.quantised_base)
    ]


def name_of(config: Any) -> str:
    """The key of the file that ``config`` belongs to."""
    return type(config).__module__.rpartition(".")[2]
