"""Bottleneck adapters: small layers with a non-linearity, after the sublayers of a frozen network. Files are peft's.

Houlsby et al. 2019: one after attention and one after the feed-forward. Pfeiffer et al. 2021: after the feed-forward only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith.adaptations import Traits
from tunesmith.errors import RecipeError
from tunesmith.models.heads import head_types
from tunesmith.models.load import module_patterns, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIZE = 64


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    variant: Literal["pfeiffer", "houlsby"] = Field(
        "pfeiffer",
        description="after the feed-forward of each layer (pfeiffer), or after its attention too (houlsby)",
    )
    bottleneck_size: int | None = Field(
        None, gt=0, description=f"numbers in the middle of an adapter; default {SIZE}"
    )
    reduction_factor: int | None = Field(
        None, gt=0, description="instead of a size: the layer's width divided by this"
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = Field(
        "relu", description="between the two layers of an adapter"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the numbers in the middle")
    modules_to_save: list[str] | None = Field(
        None, description="modules trained and saved whole, such as [lm_head]"
    )

    @model_validator(mode="after")
    def _one_size(self) -> Config:
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ValueError(
                "bottleneck_size and reduction_factor both say how large an adapter is. Set one of them"
            )
        return self


class Adaptation:
    traits = Traits("BOTTLENECK", dropout="dropout")
    learning_rate = 5e-4
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
        """A peft model with exactly the adapters, ``modules_to_save`` and the ``new_rows`` of the vocabulary trainable.

        Raises RecipeError, before the model is touched, for a network whose sublayers are not recognised, a size above the
        layers' width, a pattern that matches no module, and new rows that cannot be trained.
        """
        from peft import get_peft_model

        from tunesmith.models.adapters import bottleneck_tuner

        bottleneck_tuner.register()
        names = [name for name, _ in model.named_modules() if name]
        module_patterns.require_matches("modules_to_save", self.config.modules_to_save or [], names)
        whole = [
            *module_patterns.matching_modules(self.config.modules_to_save or [], names),
            *head_types.new_parts(model, head),
        ]
        targets = bottleneck_tuner.sublayers(model, self.config.variant)
        module_patterns.require_disjoint("adaptation=bottleneck stands on", targets, whole)
        config = bottleneck_tuner.BottleneckConfig(
            task_type=head_types.TASK[head],
            variant=self.config.variant,
            bottleneck_size=self._size(model.config.get_text_config().hidden_size),
            non_linearity=self.config.non_linearity,
            dropout=self.config.dropout,
            target_modules=targets,
            modules_to_save=whole or None,
            trainable_token_indices=vocabulary.rows_to_train(model, new_rows, whole) or None,
            ensure_weight_tying=bool(self.config.modules_to_save)
            and bool(getattr(model.config, "tie_word_embeddings", False)),
        )
        return get_peft_model(model, config)

    def _size(self, width: int) -> int:
        factor = self.config.reduction_factor
        if factor is not None and factor > width:
            raise RecipeError(
                f"adaptation.reduction_factor={factor}: the layers of this model are {width} wide, which leaves an adapter of "
                f"nothing.\n  Take at most {width}."
            )
        size = width // factor if factor is not None else self.config.bottleneck_size or min(SIZE, width)
        if size > width:
            raise RecipeError(
                f"adaptation.bottleneck_size={size}: the layers of this model are {width} wide, and an adapter is narrower than "
                f"they are.\n  Take at most {width}; {SIZE} is common."
            )
        return size

    def learning_rates(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors, nothing of the base."""
        model.save_pretrained(folder, save_embedding_layers=False)
