"""QLoRA: LoRA on a frozen base model in 4 or 8 bits (Dettmers et al. 2023). Files are those of LoRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tunesmith.adaptations import lora
from tunesmith.models.load import quantization


class Config(lora.Config):
    quant_type: Literal["nf4", "fp4", "int8"] = Field(
        "nf4", description="number format of the base model's linear layers: nf4 | fp4 | int8"
    )
    use_double_quant: bool = Field(
        True, description="4 bits: quantise the block scales to 8 bits, which saves 0.37 bit a parameter"
    )

    @field_validator("init_lora_weights")
    @classmethod
    def _check_quantised_init(cls, value: bool | str) -> bool | str:
        if isinstance(value, str) and value != "gaussian":
            raise ValueError(
                f"{value} decomposes the base model's weights, which a 4-bit or 8-bit base model does not have. "
                "Expected true or gaussian, or use adaptation: lora"
            )
        return value

    @model_validator(mode="after")
    def _check_double_quant(self) -> Config:
        # the default true is accepted with int8, because the resolved recipe of a run contains it
        if self.quant_type == "int8" and not self.use_double_quant:
            raise ValueError(
                "use_double_quant does nothing with quant_type: int8, which has a scale for each row. Leave it out"
            )
        return self


class Adaptation(lora.Adaptation):
    config: Config
    traits = replace(lora.Adaptation.traits, quantised_base=True)

    def __init__(self, config: Config) -> None:
        """Raises MissingExtra without bitsandbytes."""
        quantization.require("adaptation=qlora")
        super().__init__(config)

    def load_kwargs(self) -> dict[str, Any]:
        """The quantisation config. ``modules_to_save`` are trained, so they are not quantised."""
        config = self.config
        whole = config.modules_to_save or ()
        return quantization.load_kwargs(config.quant_type, config.use_double_quant, whole)
