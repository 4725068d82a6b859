"""LoRA: every chosen linear layer gets a trained update of low rank, W + (alpha / r) B A (Hu et al. 2021). Files are peft's."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.errors import RecipeError

TASK = {"lm": "CAUSAL_LM", "score": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}


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


class Adaptation:
    learning_rate = 2e-4

    def __init__(self, config: Config) -> None:
        self.config = config

    def load_kwargs(self) -> dict[str, Any]:
        return {}

    def apply(self, model: Any, head: str) -> Any:
        """A peft model with exactly the adapter (and ``modules_to_save``) trainable.

        Raises RecipeError, before the model is touched, when a pattern matches no module.
        """
        from peft import LoraConfig, get_peft_model

        wanted = self.config.target_modules
        names = [name for name, _ in model.named_modules() if name]
        if wanted != "all-linear":
            _require_matches("target_modules", wanted, names)
        _require_matches("modules_to_save", self.config.modules_to_save or [], names)
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
            fan_in_fan_out=_stores_weights_transposed(model),
            ensure_weight_tying=bool(self.config.modules_to_save) and bool(getattr(model.config, "tie_word_embeddings", False)),
        )
        return get_peft_model(model, config)

    def save(self, model: Any, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors, nothing of the base."""
        model.save_pretrained(folder, save_embedding_layers=False)


def _stores_weights_transposed(model: Any) -> bool:
    """gpt2 keeps its linear layers as Conv1D, (in, out)."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def _require_matches(key: str, patterns: str | list[str], names: list[str]) -> None:
    """Each pattern must name at least one module: whole name, end of a dotted name, or (a single string) a regular expression."""
    if isinstance(patterns, str):
        found = any(re.fullmatch(patterns, name) for name in names)
        unmatched = [] if found or any(name == patterns or name.endswith("." + patterns) for name in names) else [patterns]
    else:
        unmatched = [p for p in patterns if not any(name == p or name.endswith("." + p) for name in names)]
    if unmatched:
        ends = sorted({name.rpartition(".")[2] for name in names} - {str(number) for number in range(1000)})
        hints = [f"`{pattern}`{_nearest(pattern, ends)}" for pattern in unmatched]
        raise RecipeError(
            f"adaptation.{key} matches no module of this model: {'; '.join(hints)}.\n  Its modules are: {', '.join(ends)}"
        )


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f" (nearest: `{close[0]}`)" if close else ""
