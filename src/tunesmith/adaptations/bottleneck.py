"""Bottleneck adapters: small layers with a non-linearity, after the sublayers of a frozen network. Files are
in peft's format.

Houlsby et al. 2019: one after attention and one after the feed-forward. Pfeiffer et al. 2021: after the
feed-forward only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from tunesmith import adaptations
from tunesmith.adaptations import Traits
from tunesmith.errors import RecipeError
from tunesmith.models.heads import head_types
from tunesmith.models.load import module_patterns, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

SIZE = 64
"""Default bottleneck size; the layers' width where that is smaller."""


class Config(adaptations.Config):
    variant: Literal["pfeiffer", "houlsby"] = Field(
        "pfeiffer",
        description="after the feed-forward of each layer (pfeiffer), or after its attention too (houlsby)",
    )
    bottleneck_size: int | None = Field(
        None, gt=0, description=f"width between the two layers of an adapter; default {SIZE}"
    )
    reduction_factor: int | None = Field(
        None, gt=0, description="instead of bottleneck_size: the layer's width divided by this"
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = Field(
        "relu", description="between the two layers of an adapter"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="between the two layers of an adapter")
    modules_to_save: list[str] | None = Field(
        None, description="modules trained and saved whole, such as [lm_head]"
    )

    @model_validator(mode="after")
    def _check_size(self) -> Config:
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ValueError("bottleneck_size and reduction_factor both set the size. Set one of them")
        return self


class Adaptation(adaptations.Adaptation):
    config: Config
    traits = Traits("BOTTLENECK", dropout="dropout")
    learning_rate = 5e-4

    def apply(
        self, model: PreTrainedModel, head: str, new_rows: Sequence[int] = (), tokenizer: Tokenizer = None
    ) -> PreTrainedModel:
        """Return a peft model with exactly the adapters, ``modules_to_save`` and the ``new_rows`` of the
        vocabulary trainable.

        Raises RecipeError, before the model is changed, for a network whose sublayers are not recognised, a
        size above the layers' width, a pattern that matches no module, and new rows that cannot be
        trained.
        """
        from peft import get_peft_model

        from tunesmith.models.adapters import bottleneck_tuner

        bottleneck_tuner.register()
        modules_to_save = self.config.modules_to_save or []
        names = [name for name, _ in model.named_modules() if name]
        module_patterns.require_matches("modules_to_save", modules_to_save, names)
        whole = [
            *module_patterns.matching_modules(modules_to_save, names),
            *head_types.new_parts(model, head),
        ]
        targets = bottleneck_tuner.sublayers(model, self.config.variant)
        module_patterns.require_disjoint("adaptation=bottleneck adds an adapter to", targets, whole)
        config = bottleneck_tuner.BottleneckConfig(
            task_type=head_types.TASK[head],
            variant=self.config.variant,
            bottleneck_size=self._size(model.config.get_text_config().hidden_size),
            non_linearity=self.config.non_linearity,
            dropout=self.config.dropout,
            target_modules=targets,
            modules_to_save=whole or None,
            trainable_token_indices=vocabulary.rows_to_train(model, new_rows, whole) or None,
            ensure_weight_tying=adaptations.keeps_weights_tied(model, modules_to_save),
        )
        return get_peft_model(model, config)

    def _size(self, width: int) -> int:
        factor = self.config.reduction_factor
        if factor is not None and factor > width:
            raise RecipeError(
                f"adaptation.reduction_factor={factor}: the layers of this model are {width} wide, so the bottleneck would have "
                f"width 0.\n  Take at most {width}."
            )
        size = width // factor if factor is not None else self.config.bottleneck_size or min(SIZE, width)
        if size > width:
            raise RecipeError(
                f"adaptation.bottleneck_size={size}: the layers of this model are {width} wide, and a bottleneck must not be "
                f"wider.\n  Take at most {width}; {SIZE} is common."
            )
        return size
