"""Adaptations: which weights are trained, and how they are saved. One file each; the file's name is its key
in the recipe.

An adaptation never knows what the loss is. A new one is one file here with a ``Config`` and an ``Adaptation``
class that keeps this contract, and one row in ``tests/matrix``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Config(BaseModel):
    """Base of the keys of an adaptation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Traits:
    """Facts about an adaptation that other code may ask for without knowing which adaptation it is."""

    saved_as: str | None
    """peft's type of the saved adapter (``models.adapters.adapter_types`` lists its consequences); None = the
    model's own weights are trained and a whole model is saved."""
    quantised_base: bool = False
    """The base model is loaded in 4 or 8 bits."""
    freezes_body: bool = False
    """The body stays as it is, or most of its blocks do: only the top of the network is trained."""
    dropout: str | None = None
    """The key of its ``Config`` for a dropout rate; None = it has no dropout."""


class Adaptation:
    """The contract. Every adaptation writes ``apply``; the other methods have a default for an adapter in
    peft's format.

    Merging works on saved folders (``models.load.load.merged``) and needs no adaptation object.
    """

    config: Config
    traits: Traits
    learning_rate: float
    """Default learning rate."""
    keys_of_learning: frozenset[str] = frozenset()
    """Keys of its ``Config`` for the optimiser alone; they also apply to an adapter that is continued."""
    notes: Sequence[str] = ()
    """Decisions of ``apply`` that the recipe does not show; printed once."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def load_kwargs(self) -> dict[str, Any]:
        """Extra arguments for ``from_pretrained``, such as a quantisation config."""
        return {}

    def apply(
        self, model: PreTrainedModel, head: str, new_rows: Sequence[int] = (), tokenizer: Tokenizer = None
    ) -> PreTrainedModel:
        """Return the model with exactly the right parameters trainable. Raises RecipeError before changing
        the model.

        ``new_rows``: rows of embedding and output layer that belong to new tokens, which every adaptation
        must train. ``tokenizer``: that of the run, for an adaptation whose initial values come from words.
        """
        raise NotImplementedError

    def learning_rates(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Name -> factor on the run's learning rate, for the trained ``parameters`` whose factor is not 1."""
        return {}

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors; nothing of the base model."""
        # a reward model may be a second adapter of the same network
        active = [model.active_adapter]
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=active)


def names() -> list[str]:
    """The keys valid under ``adaptation:``."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """Import the file of one adaptation."""
    return importlib.import_module(f"{__name__}.{name}")


def makers(saved_as: str, quantised_base: bool | None = None) -> list[str]:
    """The adaptations that save adapters of peft's type ``saved_as``, by default on any base model."""
    traits: dict[str, Traits] = {name: module(name).Adaptation.traits for name in names()}
    bases = (True, False) if quantised_base is None else (quantised_base,)
    return [
        name for name, kept in traits.items() if kept.saved_as == saved_as and kept.quantised_base in bases
    ]


def keeps_weights_tied(model: PreTrainedModel, modules_to_save: Sequence[str]) -> bool:
    """peft's ``ensure_weight_tying``: a module trained whole may share its weights."""
    return bool(modules_to_save) and bool(getattr(model.config, "tie_word_embeddings", False))


def name_of(config: Config) -> str:
    """The key of the file that ``config`` belongs to."""
    return type(config).__module__.rpartition(".")[2]
