"""LoRA: every chosen linear layer gets a trained update of low rank, W + (alpha / r) B A (Hu et al. 2021). Files are peft's.

Where A and B start from the base's own weights, the base is left as it is all the same: see ``models.adapters.lora_factors``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from tunesmith.adaptations import Traits
from tunesmith.errors import RecipeError
from tunesmith.models.adapters import linear_layers
from tunesmith.models.heads import head_types
from tunesmith.models.load import module_patterns, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOT_HERE = {
    "loftq": "it changes the base to fit its own quantisation, on a GPU; adaptation: qlora trains beside a 4-bit base",
    "eva": "it reads the training rows before the first step",
    "corda": "it reads the training rows before the first step",
    "lora_ga": "it reads the training rows before the first step",
    "mica": "it freezes B, so it is no LoRA that others could train on",
    "orthogonal": "its update starts at zero too, and peft alone knows it",
    "false": "it makes an update of random numbers, for peft's own tests",
}
"""First values of peft's that are refused, and why."""


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    r: int | dict[str, Any] = Field(
        8,
        description="rank of the update; by the end of a layer's name (peft's rank_pattern): {default: 8, down_proj: 16}",
    )
    lora_alpha: float | dict[str, Any] = Field(
        16.0,
        description="the update is scaled by lora_alpha / r; by name (peft's alpha_pattern): {default: 16, down_proj: 32}",
    )
    init_lora_weights: Literal[True] | str = Field(
        True,
        description="where A and B start: true (A random, B zero), gaussian, pissa, pissa_niter_N or olora",
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear, or names of modules such as [q_proj, v_proj]"
    )
    layers_to_transform: int | list[int] | None = Field(
        None, description="only these decoder layers, counted from 0"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) (Kalajdzievski 2023)")
    use_dora: bool = Field(False, description="magnitude and direction apart (Liu et al. 2024)")
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = Field(
        None, description="modules trained and saved whole, such as [lm_head]"
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, description="B learns at so many times A's rate (Hayou et al. 2024)"
    )

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _known_start(cls, value: Any) -> Any:
        name = str(value).lower()
        if (
            value is True
            or name in ("gaussian", "olora", "pissa")
            or re.fullmatch(r"pissa_niter_[1-9]\d*", name)
        ):
            return value if value is True else name
        reason = (
            f"{value} is not offered here: {NOT_HERE[name]}"
            if name in NOT_HERE
            else f"unknown start {value!r}"
        )
        raise ValueError(
            f"{reason}. Expected true, gaussian, pissa, pissa_niter_N (such as pissa_niter_16) or olora"
        )

    @model_validator(mode="after")
    def _magnitudes_start_at_the_base(self) -> Config:
        if self.use_dora and self.init_lora_weights is not True:
            raise ValueError(
                "use_dora: its magnitudes are measured on a LoRA that starts at zero, so init_lora_weights must be left out"
            )
        return self

    @field_validator("r", "lora_alpha")
    @classmethod
    def _for_all_or_by_layer(cls, given: Any, info: ValidationInfo) -> Any:
        """A mapping says what holds for all other layers; one that says nothing more is that number."""
        number, wanted = (int, "a whole number") if info.field_name == "r" else (float, "a number")
        for name, value in given.items() if isinstance(given, dict) else [(None, given)]:
            if type(value) not in (int, number) or not value > 0:
                place = "" if name is None else f" at adaptation.{info.field_name}.{name}"
                raise ValueError(f"expected {wanted} greater than 0{place}, got {value!r}")
        if not isinstance(given, dict):
            return given
        if "default" not in given:
            raise ValueError(
                "the key `default` is missing: expected a number, or a mapping such as {default: 8, down_proj: 16}"
            )
        for name in given:
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(f"{name!r} is no pattern for the end of a layer's name: {error}") from None
        return given if len(given) > 1 else number(given["default"])

    @property
    def rank(self) -> int:
        """Of the layers that no pattern names."""
        return int(_default(self.r))

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Other ranks, by patterns for the ends of layers' names, as peft takes them."""
        return _others(self.r)

    @property
    def alpha(self) -> float:
        return float(_default(self.lora_alpha))

    @property
    def alpha_pattern(self) -> dict[str, float]:
        return {name: float(value) for name, value in _others(self.lora_alpha).items()}

    @property
    def begins(self) -> str | None:
        """The start, where it is read off the base's weights."""
        return (
            self.init_lora_weights
            if isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian"
            else None
        )


PEFT_KEYS = {
    "rank_pattern": "adaptation.r: {default: 8, PATTERN: 16}",
    "alpha_pattern": "adaptation.lora_alpha: {default: 16, PATTERN: 32}",
}


class Adaptation:
    traits = Traits("LORA", dropout="lora_dropout", peft_keys=PEFT_KEYS)
    learning_rate = 2e-4
    keys_of_learning = frozenset({"loraplus_lr_ratio"})
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
        """A peft model with exactly the adapter, ``modules_to_save`` and the ``new_rows`` of the vocabulary trainable.

        Raises RecipeError, before the model is touched, when a pattern matches no module, a rank is above the size of its
        layer, or new rows cannot be trained.
        """
        from peft import LoraConfig, get_peft_model

        wanted: str | list[str] = self.config.target_modules
        names = [name for name, _ in model.named_modules() if name]
        if wanted != "all-linear":
            module_patterns.require_matches("target_modules", wanted, names)
        module_patterns.require_matches("modules_to_save", self.config.modules_to_save or [], names)
        whole = [
            *module_patterns.matching_modules(self.config.modules_to_save or [], names),
            *head_types.new_parts(model, head),
        ]
        rows = self._rows_of(model, new_rows)
        begins = self.config.begins
        if self.config.layers_to_transform is not None:
            wanted = _names_in_layers(model, wanted, self.config.layers_to_transform)
        config = LoraConfig(
            task_type=head_types.TASK[head],
            r=self.config.rank,
            rank_pattern=self.config.rank_pattern,
            lora_alpha=self.config.alpha,
            alpha_pattern=self.config.alpha_pattern,
            init_lora_weights=True if begins else self.config.init_lora_weights,
            lora_dropout=self.config.lora_dropout,
            target_modules=wanted,
            layers_to_transform=self.config.layers_to_transform,
            use_rslora=self.config.use_rslora,
            use_dora=self.config.use_dora,
            bias=self.config.bias,
            modules_to_save=whole or None,
            trainable_token_indices=rows or None,
            fan_in_fan_out=linear_layers.stores_transposed(model),
            ensure_weight_tying=bool(self.config.modules_to_save)
            and bool(getattr(model.config, "tie_word_embeddings", False)),
        )
        chosen = _targets(model, config)
        self._check_apart(model, config, chosen)
        self._check_patterns(chosen)
        adapted = get_peft_model(model, config)
        if begins:
            from tunesmith.models.adapters import lora_factors, lora_init

            for name in chosen:
                layer = model.get_submodule(name)
                lora_factors.set_start(layer, *lora_init.factors_of(layer, begins))
        return adapted

    def _check_apart(self, model: PreTrainedModel, config: Any, chosen: Mapping[str, Any]) -> None:
        """Raise RecipeError where ``modules_to_save`` leaves no layer to all targets, or to one that is named, or where what is
        named is no layer that can have a LoRA."""
        names = [name for name, _ in model.named_modules() if name]
        whole, wanted = list(config.modules_to_save or []), self.config.target_modules
        for one in [wanted] if isinstance(wanted, str) else wanted:
            aimed = [
                name
                for name in names
                if module_patterns.matching_patterns(wanted if isinstance(wanted, str) else [one], [name])
            ]
            if not any(name in chosen for name in aimed):
                module_patterns.require_disjoint("adaptation.target_modules names", aimed, whole)
        if not chosen and wanted == "all-linear":
            raise RecipeError(
                f"adaptation.modules_to_save trains {', '.join(whole)} whole, which leaves no linear layer for a LoRA.\n"
                "  Leave it out, or use adaptation: full."
            )
        for name, module in chosen.items():
            if not _takes_lora(module):
                inside = sorted(
                    {
                        key.rpartition(".")[2]
                        for key, one in module.named_modules()
                        if key and _takes_lora(one)
                    }
                )
                raise RecipeError(
                    f"adaptation.target_modules names {name}, a {type(module).__name__}: a LoRA goes on linear layers and "
                    f"embeddings.\n  {'Name those inside it: ' + ', '.join(inside) if inside else 'Leave it out'}."
                )

    def _check_patterns(self, chosen: Mapping[str, Any]) -> None:
        """Raise RecipeError for a pattern that names none of the ``chosen`` layers, a rank above a layer's size, or a start that
        a layer cannot have."""
        for key, given in (("r", self.config.rank_pattern), ("lora_alpha", self.config.alpha_pattern)):
            idle = [pattern for pattern in given if not any(_pattern_of([pattern], name) for name in chosen)]
            if idle:
                ends = sorted({name.rpartition(".")[2] for name in chosen})
                raise RecipeError(
                    f"adaptation.{key}.{idle[0]} matches no layer that gets a LoRA{module_patterns.hint(idle[0], ends)}.\n"
                    f"  Those that do end in: {', '.join(ends)}"
                )
        for name, module in chosen.items():
            pattern = _pattern_of(list(self.config.rank_pattern), name)
            rank = self.config.rank if pattern is None else self.config.rank_pattern[pattern]
            size = linear_layers.widths(module)
            if rank > min(size):
                key = "r" if pattern is None else f"r.{pattern}"
                raise RecipeError(
                    f"adaptation.{key}: the rank {rank} is above the size of {name}, which is {size[0]} x {size[1]}: "
                    f"an update of it has at most rank {min(size)}.\n"
                    f"  Take a smaller rank, or give this layer its own: {{r: {{default: {self.config.rank}, "
                    f"{name.rpartition('.')[2]}: {min(size)}}}}}"
                )
            if self.config.begins and not hasattr(module, "bias"):
                raise RecipeError(
                    f"adaptation.init_lora_weights={self.config.begins} starts from the weights of linear layers, and "
                    f"{name} is none.\n  Leave it out of adaptation.target_modules, or leave out init_lora_weights."
                )

    def _rows_of(self, model: PreTrainedModel, new_rows: Sequence[int]) -> dict[str, list[int]]:
        """Layer -> rows trained beside the adapter; a layer in ``modules_to_save`` is trained whole, new rows and all."""
        if not new_rows:
            return {}
        targets = self.config.target_modules
        aimed = [
            name
            for name in vocabulary.end_names(model, all_ends=True)
            if targets != "all-linear" and module_patterns.matching_patterns(targets, [name])
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
        return {
            name: ratio
            for name, one in parameters.items()
            if one.dim() == 1 or any(part in f"{name}." for part in parts)
        }

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors, nothing of the base.

        A LoRA that started from the base's weights is saved as one of twice the rank on the untouched base.
        """
        from tunesmith.models.adapters import lora_factors, lora_init

        model.save_pretrained(folder, save_embedding_layers=False)
        if begun := lora_factors.started_layers(model):
            lora_init.write_plain(folder, begun, self.config.use_rslora)


def _default(given: Any) -> Any:
    return given["default"] if isinstance(given, dict) else given


def _others(given: Any) -> dict[str, Any]:
    """What a key says of single layers, beside its ``default``."""
    return (
        {name: value for name, value in given.items() if name != "default"} if isinstance(given, dict) else {}
    )


def _targets(model: PreTrainedModel, config: Any) -> dict[str, Any]:
    """The modules that peft will give a LoRA under ``config``, by name."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if config.target_modules != "all-linear":
        return {
            name: one
            for name, one in model.named_modules()
            if name and check_target_module_exists(config, name)
        }
    last = model.get_output_embeddings()
    whole = config.modules_to_save or []
    return {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear | Conv1D)
        and one is not last
        and not module_patterns.is_inside(name, whole)
    }


def _takes_lora(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _pattern_of(given: Sequence[str], name: str) -> str | None:
    """The first of ``given`` that names a layer, in peft's meaning: a regular expression for the end of the name."""
    return next((one for one in given if re.match(rf"(.*\.)?({one})$", name)), None)


def _names_in_layers(model: PreTrainedModel, wanted: str | list[str], layers: int | list[int]) -> list[str]:
    """The target modules as peft takes them beside ``layers_to_transform``: the ends of names. Raises RecipeError."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(wanted, str) and wanted != "all-linear":
        raise RecipeError(
            f"adaptation.layers_to_transform goes with a list of names, not with the pattern {wanted!r}.\n"
            "  Put the layers into the pattern, or give target_modules as a list such as [q_proj, v_proj]."
        )
    linear = {name for name, one in model.named_modules() if isinstance(one, nn.Linear | Conv1D)}
    found = {name: int(match[1]) for name in linear if (match := re.match(r".*?\.[^.]*\.(\d+)\.", name))}
    there = sorted(set(found.values()))
    missing = sorted(set([layers] if isinstance(layers, int) else layers) - set(there))
    if missing or layers == []:
        span = f"layers {there[0]} to {there[-1]}" if there else "no numbered layers"
        raise RecipeError(
            f"adaptation.layers_to_transform: there is no layer {missing[0] if missing else 'named'}; this model has {span}."
        )
    return sorted({name.rpartition(".")[2] for name in found}) if wanted == "all-linear" else list(wanted)
