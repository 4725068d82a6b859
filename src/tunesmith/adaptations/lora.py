"""LoRA: every chosen linear layer gets a trained update of low rank, W + (alpha / r) B A (Hu et al. 2021).
Files are in peft's format.

Where A and B start from the base model's weights, those weights still stay unchanged: see
``models.adapters.lora_factors``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tunesmith import adaptations
from tunesmith.adaptations import Traits
from tunesmith.errors import RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.models.adapters import linear_layers, lora_targets
from tunesmith.models.heads import head_types
from tunesmith.models.load import module_patterns, vocabulary

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

UNSUPPORTED_INITS = {
    "loftq": "it changes the base model to fit its own quantisation, on a GPU; adaptation: qlora trains on a 4-bit base model",
    "eva": "it reads the training rows before the first step",
    "corda": "it reads the training rows before the first step",
    "lora_ga": "it reads the training rows before the first step",
    "mica": "it freezes B, so others could not train the adapter further as a LoRA",
    "orthogonal": "its update also starts at zero, and only peft has it",
    "false": "its update starts as random numbers, for peft's own tests",
}
"""Values of peft's ``init_lora_weights`` that are refused, with the reason."""


class Config(adaptations.Config):
    r: int | JsonObject = Field(
        8,
        description="rank of the update; by the end of a layer's name (peft's rank_pattern): {default: 8, down_proj: 16}",
    )
    lora_alpha: float | JsonObject = Field(
        16.0,
        description="the update is scaled by lora_alpha / r; by name (peft's alpha_pattern): {default: 16, down_proj: 32}",
    )
    init_lora_weights: Literal[True] | str = Field(
        True,
        description="initial A and B: true (A random, B zero), gaussian, pissa, pissa_niter_N or olora",
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear, or names of modules such as [q_proj, v_proj]"
    )
    layers_to_transform: int | list[int] | None = Field(None, description="only these layers, counted from 0")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) (Kalajdzievski 2023)")
    use_dora: bool = Field(False, description="train magnitude and direction separately (Liu et al. 2024)")
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = Field(
        None, description="modules trained and saved whole, such as [lm_head]"
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, description="learning rate of B as a multiple of A's (Hayou et al. 2024)"
    )

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _check_init(cls, value: object) -> object:
        name = str(value).lower()
        if value is True:
            return value
        if name in ("gaussian", "olora", "pissa") or re.fullmatch(r"pissa_niter_[1-9]\d*", name):
            return name
        reason = UNSUPPORTED_INITS.get(name)
        problem = f"{value} is not supported: {reason}" if reason else f"unknown initialisation {value!r}"
        raise ValueError(
            f"{problem}. Expected true, gaussian, pissa, pissa_niter_N (such as pissa_niter_16) or olora"
        )

    @model_validator(mode="after")
    def _check_dora(self) -> Config:
        if self.use_dora and self.init_lora_weights is not True:
            raise ValueError(
                "use_dora measures its magnitudes on an update that starts at zero: leave out init_lora_weights"
            )
        return self

    @field_validator("r", "lora_alpha")
    @classmethod
    def _check_number_or_mapping(cls, given: float | JsonObject, info: ValidationInfo) -> float | JsonObject:
        """A mapping has a ``default`` for the layers it does not name; alone, that is the number."""
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
    def ranks(self) -> tuple[int, dict[str, int]]:
        """(rank of the layers that no pattern names, peft's ``rank_pattern``)."""
        default, by_pattern = _split_default(self.r)
        return int(default), by_pattern

    @property
    def alphas(self) -> tuple[float, dict[str, float]]:
        """As :attr:`ranks`: (alpha, peft's ``alpha_pattern``)."""
        default, by_pattern = _split_default(self.lora_alpha)
        return float(default), {name: float(value) for name, value in by_pattern.items()}

    @property
    def init_from_base(self) -> str | None:
        """The initialisation, where it is computed from the base model's weights."""
        return None if self.init_lora_weights in (True, "gaussian") else str(self.init_lora_weights)


class Adaptation(adaptations.Adaptation):
    config: Config
    traits = Traits("LORA", dropout="lora_dropout")
    learning_rate = 2e-4
    keys_of_learning = frozenset({"loraplus_lr_ratio"})

    def apply(
        self, model: PreTrainedModel, head: str, new_rows: Sequence[int] = (), tokenizer: Tokenizer = None
    ) -> PreTrainedModel:
        """Return a peft model with exactly the adapter, ``modules_to_save`` and the ``new_rows`` of the
        vocabulary trainable.

        Raises RecipeError, before the model is changed, when a pattern matches no module, a rank is above the
        size of its layer, or new rows cannot be trained.
        """
        from peft import LoraConfig, get_peft_model

        keys = self.config
        (rank, rank_pattern), (alpha, alpha_pattern) = keys.ranks, keys.alphas
        names = [name for name, _ in model.named_modules() if name]
        modules_to_save = keys.modules_to_save or []
        if keys.target_modules != "all-linear":
            module_patterns.require_matches("target_modules", keys.target_modules, names)
        module_patterns.require_matches("modules_to_save", modules_to_save, names)
        whole = [
            *module_patterns.matching_modules(modules_to_save, names),
            *head_types.new_parts(model, head),
        ]
        new_token_rows = self._new_token_rows(model, new_rows)
        targets = keys.target_modules
        if keys.layers_to_transform is not None:
            targets = _names_in_layers(model, targets, keys.layers_to_transform)
        config = LoraConfig(
            task_type=head_types.TASK[head],
            r=rank,
            rank_pattern=rank_pattern,
            lora_alpha=alpha,
            alpha_pattern=alpha_pattern,
            init_lora_weights=True if keys.init_from_base else keys.init_lora_weights,
            lora_dropout=keys.lora_dropout,
            target_modules=targets,
            layers_to_transform=keys.layers_to_transform,
            use_rslora=keys.use_rslora,
            use_dora=keys.use_dora,
            bias=keys.bias,
            modules_to_save=whole or None,
            trainable_token_indices=new_token_rows or None,
            fan_in_fan_out=linear_layers.stores_transposed(model),
            ensure_weight_tying=adaptations.keeps_weights_tied(model, modules_to_save),
        )
        chosen = _target_layers(model, config)
        ordinary = [name for name in chosen if _first_match(rank_pattern, name) is None]
        if keys.target_modules == "all-linear" and (left_out := lora_targets.left_out(model, ordinary, rank)):
            config.exclude_modules = module_patterns.in_any_layer(left_out)
            self.notes = [lora_targets.note(left_out)]
            chosen = {name: module for name, module in chosen.items() if name not in left_out}
        self._check_targets(names, chosen, whole)
        self._check_patterns(chosen)
        self._check_ranks(chosen)
        adapted = get_peft_model(model, config)
        self._check_restored(adapted, chosen)
        if keys.init_from_base:
            from tunesmith.models.adapters import lora_factors, lora_init

            for name in chosen:
                layer = model.get_submodule(name)
                lora_factors.set_start(layer, *lora_init.factors_of(layer, keys.init_from_base))
        return adapted

    def _check_targets(
        self, names: Sequence[str], chosen: Mapping[str, nn.Module], whole: Sequence[str]
    ) -> None:
        """Raise RecipeError for targets inside ``modules_to_save`` or of a wrong type."""
        targets = self.config.target_modules
        for pattern in [targets] if isinstance(targets, str) else targets:
            named = _matching(targets if isinstance(targets, str) else [pattern], names)
            if not any(name in chosen for name in named):
                module_patterns.require_disjoint("adaptation.target_modules names", named, list(whole))
        if not chosen and targets == "all-linear":
            saved = self.config.modules_to_save
            trained = f" besides {', '.join(whole)}, which is trained whole" if whole else ""
            raise RecipeError(
                f"adaptation: lora adds to linear layers, and this model has none{trained}.\n"
                f"  {'Leave out adaptation.modules_to_save, or use' if saved else 'Use'} adaptation: full."
            )
        for name, module in chosen.items():
            if not _takes_lora(module):
                inside = {
                    key.rpartition(".")[2] for key, one in module.named_modules() if key and _takes_lora(one)
                }
                fix = f"Name the layers inside it: {', '.join(sorted(inside))}" if inside else "Leave it out"
                raise RecipeError(
                    f"adaptation.target_modules names {name}, a {type(module).__name__}: only linear layers and embeddings can "
                    f"have a LoRA.\n  {fix}."
                )

    def _check_patterns(self, chosen: Iterable[str]) -> None:
        """Raise RecipeError for a pattern of ``r`` or ``lora_alpha`` that names no ``chosen`` layer."""
        for key, (_, given) in (("r", self.config.ranks), ("lora_alpha", self.config.alphas)):
            unused = [
                pattern for pattern in given if not any(_first_match([pattern], name) for name in chosen)
            ]
            if unused:
                ends = sorted({name.rpartition(".")[2] for name in chosen})
                raise RecipeError(
                    f"adaptation.{key}.{unused[0]} matches no layer that gets a LoRA{module_patterns.hint(unused[0], ends)}.\n"
                    f"  Those layers end in: {', '.join(ends)}"
                )

    def _check_ranks(self, chosen: Mapping[str, nn.Module]) -> None:
        """Raise RecipeError for a rank or an initialisation that a layer cannot have."""
        from torch import nn

        default, by_pattern = self.config.ranks
        for name, module in chosen.items():
            pattern = _first_match(by_pattern, name)
            rank = default if pattern is None else by_pattern[pattern]
            size = linear_layers.widths(module)
            if rank > min(size):
                key = "r" if pattern is None else f"r.{pattern}"
                raise RecipeError(
                    f"adaptation.{key}: the rank {rank} is above the size of {name}, which is {size[0]} x {size[1]}: "
                    f"its update has at most rank {min(size)}.\n"
                    f"  Choose a smaller rank, or another one for this layer: {{r: {{default: {default}, "
                    f"{name.rpartition('.')[2]}: {min(size)}}}}}"
                )
            if self.config.init_from_base and isinstance(module, nn.Embedding):
                raise RecipeError(
                    f"adaptation.init_lora_weights={self.config.init_from_base} starts from the weights of linear layers, and "
                    f"{name} is an embedding.\n  Leave it out of adaptation.target_modules, or leave out init_lora_weights."
                )

    def _check_restored(self, adapted: PreTrainedModel, chosen: Iterable[str]) -> None:
        """Raise RecipeError for layers whose LoRA peft would not restore from the saved folder."""
        from tunesmith.models.adapters import restored_names

        if lost := restored_names.unrestored_layers(adapted):
            lost_ends, ends = ({name.rpartition(".")[2] for name in names} for names in (lost, chosen))
            others = ", ".join(sorted(ends - lost_ends))
            listed = ", ".join(dict.fromkeys(map(lora_targets.name_in_block, lost)))
            fix = f"Set adaptation.target_modules: [{others}], or use" if others else "Use"
            raise RecipeError(
                f"adaptation: peft would not restore the LoRA on {len(lost)} layers of a saved adapter, because it "
                f"renames their tensors while it loads them: {listed}.\n  {fix} adaptation: full."
            )

    def _new_token_rows(self, model: PreTrainedModel, new_rows: Sequence[int]) -> dict[str, list[int]]:
        """Layer -> rows trained with the adapter; ``modules_to_save`` are trained whole anyway."""
        if not new_rows:
            return {}
        targets = self.config.target_modules
        ends = vocabulary.end_names(model, all_ends=True)
        if targets != "all-linear" and (named := _matching(targets, ends)):
            raise RecipeError(
                f"add_tokens trains rows of {named[0]}, which adaptation.target_modules names too: a layer takes only one."
                "\n  Put it under adaptation.modules_to_save instead, or leave it out."
            )
        return vocabulary.rows_to_train(model, new_rows, self.config.modules_to_save or [])

    def learning_rates(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """LoRA+: B has a multiple of A's rate. So do vectors (biases, DoRA's magnitudes), as in peft and the
        authors' code.

        peft trains B of an embedding at a fixed rate of 1e-6; here it has the rate of any other B.
        """
        ratio = self.config.loraplus_lr_ratio
        if ratio is None:
            return {}
        factors = (".lora_B.", ".lora_embedding_B.")
        return {
            name: ratio
            for name, parameter in parameters.items()
            if parameter.dim() == 1 or any(factor in f"{name}." for factor in factors)
        }

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors. A LoRA that started from the base model's
        weights is saved as a LoRA of twice the rank on the unchanged base model."""
        from tunesmith.models.adapters import lora_factors, lora_init

        super().save(model, folder)
        if started := lora_factors.started_layers(model):
            lora_init.write_plain(folder, started, self.config.use_rslora)


def _split_default(given: float | JsonObject) -> tuple[float, JsonObject]:
    """(the number for all other layers, the numbers by pattern)."""
    by_pattern = dict(given) if isinstance(given, dict) else {"default": given}
    return by_pattern.pop("default"), by_pattern


def _target_layers(model: PreTrainedModel, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules to which peft will add a LoRA under ``config``, by name."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = {name: module for name, module in model.named_modules() if name}
    if config.target_modules != "all-linear":
        return {name: module for name, module in modules.items() if check_target_module_exists(config, name)}
    output_layer, whole = model.get_output_embeddings(), config.modules_to_save or []
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output_layer
        and not module_patterns.is_inside(name, whole)
    }


def _takes_lora(module: nn.Module) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _matching(patterns: str | list[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if module_patterns.matching_patterns(patterns, [name])]


def _first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that names a layer as in peft: a regular expression for the end of the name."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)


def _names_in_layers(model: PreTrainedModel, targets: str | list[str], layers: int | list[int]) -> list[str]:
    """The ends of names that peft needs with ``layers_to_transform``. Raises RecipeError."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(targets, str) and targets != "all-linear":
        raise RecipeError(
            f"adaptation.layers_to_transform needs a list of target_modules, not the pattern {targets!r}.\n"
            "  Put the layers into the pattern, or give target_modules as a list such as [q_proj, v_proj]."
        )
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    layer_of = {name: int(match[1]) for name in linear if (match := re.match(r".*?\.[^.]*\.(\d+)\.", name))}
    valid = sorted(set(layer_of.values()))
    missing = sorted(set([layers] if isinstance(layers, int) else layers) - set(valid))
    if missing or layers == []:
        span = f"layers {valid[0]} to {valid[-1]}" if valid else "no numbered layers"
        problem = f"there is no layer {missing[0]}" if missing else "the list is empty"
        raise RecipeError(f"adaptation.layers_to_transform: {problem}; this model has {span}.")
    return (
        sorted({name.rpartition(".")[2] for name in layer_of}) if targets == "all-linear" else list(targets)
    )
