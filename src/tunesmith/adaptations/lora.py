"""LoRA: every chosen linear layer gets a trained update of low rank, W + (alpha / r) B A (Hu et al. 2021). Files are peft's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.errors import RecipeError
from tunesmith.models import patterns, vocabulary


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(8, gt=0, description="rank of the update")
    lora_alpha: float = Field(16, gt=0, description="the update is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field("all-linear", description="all-linear, or names of modules such as [q_proj, v_proj]")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) (Kalajdzievski 2023)")
    use_dora: bool = Field(False, description="magnitude and direction apart (Liu et al. 2024)")
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = Field(None, description="modules trained and saved whole, such as [lm_head]")
    loraplus_lr_ratio: float | None = Field(None, ge=1, description="B learns at so many times A's rate (Hayou et al. 2024)")


class Adaptation:
    learning_rate = 2e-4
    keys_of_learning = frozenset({"loraplus_lr_ratio"})

    def __init__(self, config: Config) -> None:
        self.config = config

    def load_kwargs(self) -> dict[str, Any]:
        return {}

    def apply(self, model: Any, head: str, new_rows: Sequence[int] = (), tokenizer: Any = None) -> Any:
        """A peft model with exactly the adapter, ``modules_to_save`` and the ``new_rows`` of the vocabulary trainable.

        Raises RecipeError, before the model is touched, when a pattern matches no module or new rows cannot be trained.
        """
        from peft import LoraConfig, get_peft_model

        from tunesmith.models.head import TASK

        wanted = self.config.target_modules
        names = [name for name, _ in model.named_modules() if name]
        if wanted != "all-linear":
            patterns.require("target_modules", wanted, names)
        patterns.require("modules_to_save", self.config.modules_to_save or [], names)
        rows = self._rows_of(model, new_rows)
        config = LoraConfig(
            task_type=TASK[head],
            r=self.config.r,
            lora_alpha=self.config.lora_alpha,
            lora_dropout=self.config.lora_dropout,
            target_modules=wanted,
            use_rslora=self.config.use_rslora,
            use_dora=self.config.use_dora,
            bias=self.config.bias,
            modules_to_save=self.config.modules_to_save,
            trainable_token_indices=rows or None,
            fan_in_fan_out=_stores_weights_transposed(model),
            ensure_weight_tying=bool(self.config.modules_to_save) and bool(getattr(model.config, "tie_word_embeddings", False)),
        )
        return get_peft_model(model, config)

    def _rows_of(self, model: Any, new_rows: Sequence[int]) -> dict[str, list[int]]:
        """Layer -> rows trained beside the adapter; a layer in ``modules_to_save`` is trained whole, new rows and all."""
        if not new_rows:
            return {}
        targets = self.config.target_modules
        aimed = [
            name
            for name in vocabulary.end_names(model, all_ends=True)
            if targets != "all-linear" and patterns.matched(targets, [name])
        ]
        if aimed:
            raise RecipeError(
                f"add_tokens trains rows of {aimed[0]}, which adaptation.target_modules names too: a layer takes only one."
                "\n  Put it under adaptation.modules_to_save instead, or leave it out."
            )
        return vocabulary.rows_to_train(model, new_rows, self.config.modules_to_save or [])

    def learning_rates(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        """LoRA+: B learns at a multiple of A's rate. So do vectors (biases, DoRA's magnitudes), as in peft and the authors' code.

        Where peft gives a LoRA on the embedding a fixed rate of 1e-6, here its B learns like any other B.
        """
        ratio = self.config.loraplus_lr_ratio
        if ratio is None:
            return {}
        parts = (".lora_B.", ".lora_embedding_B.")
        return {name: ratio for name, one in parameters.items() if one.dim() == 1 or any(part in f"{name}." for part in parts)}

    def save(self, model: Any, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors, nothing of the base."""
        model.save_pretrained(folder, save_embedding_layers=False)


def _stores_weights_transposed(model: Any) -> bool:
    """gpt2 keeps its linear layers as Conv1D, (in, out)."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())
