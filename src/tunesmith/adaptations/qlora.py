"""QLoRA: LoRA beside a frozen base that is kept in 4 or 8 bits (Dettmers et al. 2023). Files are peft's, as LoRA's are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from tunesmith.adaptations import lora
from tunesmith.models.load import quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Config(lora.Config):
    quant_type: Literal["nf4", "fp4", "int8"] = Field(
        "nf4", description="how the base's linear layers are kept: nf4 | fp4 | int8"
    )
    use_double_quant: bool = Field(
        True, description="4 bits: the scales of blocks in 8 bits too, 0.37 bit less a parameter"
    )

    @field_validator("init_lora_weights")
    @classmethod
    def _needs_no_base(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "gaussian":
            raise ValueError(
                f"{value} starts from the base's weights, and a base of 4 or 8 bits has none to decompose. "
                "Expected true or gaussian, or use adaptation: lora"
            )
        return value

    @model_validator(mode="after")
    def _no_scales_of_blocks(self) -> Config:
        if (
            self.quant_type == "int8" and not self.use_double_quant
        ):  # the default does not count: a run's recipe.yaml holds it
            raise ValueError(
                "use_double_quant does nothing with quant_type: int8, which has a scale for each row. Leave it out"
            )
        return self


class Adaptation:
    traits = replace(lora.Adaptation.traits, quantised_base=True)
    learning_rate = lora.Adaptation.learning_rate
    keys_of_learning = lora.Adaptation.keys_of_learning
    notes: Sequence[str] = ()

    def __init__(self, config: Config) -> None:
        """Raises MissingExtra without bitsandbytes."""
        quantization.require("adaptation=qlora")
        self.config = config
        self.lora = lora.Adaptation(config)

    def load_kwargs(self) -> dict[str, Any]:
        """The quantisation. Whatever is trained whole (``modules_to_save``) is left out of it."""
        return quantization.load_kwargs(
            self.config.quant_type, self.config.use_double_quant, self.config.modules_to_save or ()
        )

    def apply(
        self,
        model: PreTrainedModel,
        head: str,
        new_rows: Sequence[int] = (),
        tokenizer: PreTrainedTokenizerBase = None,
    ) -> Any:
        """As LoRA's own; it is the base that differs."""
        return self.lora.apply(model, head, new_rows, tokenizer)

    def learning_rates(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        return self.lora.learning_rates(parameters)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors; how the base was quantised stands in tunesmith.json."""
        self.lora.save(model, folder)
