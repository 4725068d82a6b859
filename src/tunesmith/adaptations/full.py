"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from tunesmith.adaptations import Traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Adaptation:
    traits = Traits(None)
    learning_rate = 2e-5
    keys_of_learning: frozenset[str] = frozenset()
    notes: Sequence[str] = ()

    def __init__(self, config: Config) -> None:
        self.config = config

    def load_kwargs(self) -> dict[str, Any]:
        return {}

    def apply(
        self,
        model: PreTrainedModel,
        head: str,
        new_rows: Sequence[int] = (),
        tokenizer: PreTrainedTokenizerBase = None,
    ) -> Any:
        model.requires_grad_(True)
        return model

    def learning_rates(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """A plain transformers folder, in the dtype of the weights as they are now."""
        model.config.dtype = model.dtype
        model.save_pretrained(folder)
