"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith import adaptations
from tunesmith.adaptations import Traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Config(adaptations.Config):
    pass


class Adaptation(adaptations.Adaptation):
    traits = Traits(None)
    learning_rate = 2e-5

    def apply(
        self, model: PreTrainedModel, head: str, new_rows: Sequence[int] = (), tokenizer: Tokenizer = None
    ) -> PreTrainedModel:
        model.requires_grad_(True)
        return model

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write a plain transformers folder, in the dtype that the weights have now."""
        model.config.dtype = model.dtype
        model.save_pretrained(folder)
