"""Train the top of the network and freeze the rest: the last blocks, the output layer, or parts chosen by
name.

The oldest form of transfer learning (Yosinski et al. 2014; for the last layers of transformers Lee et al.
2019, "What Would Elsa Do?"). The backward pass ends at the first trained layer. Where only a head is trained,
``train.frozen_body_cache`` keeps the body's hidden states, so each later epoch costs the head alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from tunesmith import adaptations
from tunesmith.adaptations import Traits
from tunesmith.errors import RecipeError
from tunesmith.models.heads import head_types
from tunesmith.models.load import module_patterns

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

DEFAULT_BLOCKS = 2
"""Blocks of a language model that are trained when the recipe names nothing; a new head needs none."""


class Config(adaptations.Config):
    train_last: int | None = Field(
        None,
        ge=0,
        description="train this many of the last blocks, and the final norm; default 2, or 0 with a new head or target_modules",
    )
    target_modules: str | list[str] | None = Field(
        None,
        description="further modules or parameters to train, such as [lm_head], by the end of their names; or one pattern",
    )


class Adaptation(adaptations.Adaptation):
    config: Config
    traits = Traits(None, freezes_body=True)
    learning_rate = 2e-4

    def apply(
        self, model: PreTrainedModel, head: str, new_rows: Sequence[int] = (), tokenizer: Tokenizer = None
    ) -> PreTrainedModel:
        """Return the same model, with the chosen parts and any new head trainable and everything else frozen.

        Where the output layer is chosen and the embedding it is tied to is not, the output layer gets a copy
        of the weights, so that the body stays unchanged. Raises RecipeError, before the model is changed,
        when a name matches nothing, when there are fewer blocks than ``train_last``, when nothing would be
        trained, and when the rows of new tokens would be frozen.
        """
        new_head = _head_parameters(model, head)
        chosen = [*self._last_blocks(model, head), *self._named_parameters(model), *new_head]
        trained = set(map(id, chosen))
        unties = self._unties_output_layer(model)
        if not trained:
            raise RecipeError(
                "adaptation.train_last=0 leaves nothing to train: the body is frozen and this objective has no new head.\n"
                "  Set adaptation.train_last=2, or name parts, as in adaptation.target_modules=[lm_head]."
            )
        if new_rows:
            _require_trained_vocabulary(model, trained, unties)
        if unties:
            self._untie_output_layer(model)
            trained.discard(id(model.get_input_embeddings().weight))
            trained.add(id(model.get_output_embeddings().weight))
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        if head != "lm" and trained == set(map(id, new_head)):
            self._disable_dropout(model)
        return model

    def _disable_dropout(self, model: PreTrainedModel) -> None:
        """Switch off dropout in a frozen body: its hidden states can then be cached for all epochs."""
        from torch import nn

        dropouts = [
            module for module in model.base_model.modules() if isinstance(module, nn.Dropout) and module.p > 0
        ]
        for module in dropouts:
            module.p = 0.0
        if dropouts:
            self.notes = [
                "dropout of the frozen body is off in training: its hidden states are the same in every epoch"
            ]

    def _last_blocks(self, model: PreTrainedModel, head: str) -> list[nn.Parameter]:
        """Parameters of the last blocks and of the norm after them."""
        from tunesmith.models.fast import torch_compile

        blocks = torch_compile.layers(model)
        count = self.config.train_last
        if count is None:
            is_default = head == "lm" and self.config.target_modules is None
            count = min(DEFAULT_BLOCKS, len(blocks)) if is_default else 0
        if count > len(blocks):
            raise RecipeError(
                f"adaptation.train_last={count}: this model has {len(blocks)} blocks.\n"
                f"  Set it to at most {len(blocks)}, or use adaptation=full, which trains everything."
            )
        if count == 0:
            return []
        modules = [*blocks[-count:], *_norms_after(model.base_model, blocks)]
        return [parameter for module in modules for parameter in module.parameters()]

    def _named_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """Parameters that ``target_modules`` names, themselves or by a module around them."""
        modules = {name: list(module.parameters()) for name, module in model.named_modules() if name}
        parts = modules | {name: [one] for name, one in model.named_parameters(remove_duplicate=False)}
        module_patterns.check_regex("target_modules", self.config.target_modules or [])
        named = {
            pattern: [name for name, inside in parts.items() if inside and self._matches(pattern, name)]
            for pattern in self._patterns
        }
        if unmatched := [pattern for pattern, names in named.items() if not names]:
            ends = {name.rpartition(".")[2] for name, inside in modules.items() if inside}
            valid = sorted(end for end in ends if not end.isdecimal())
            hints = [f"`{pattern}`{module_patterns.hint(pattern, valid)}" for pattern in unmatched]
            raise RecipeError(
                f"adaptation.target_modules matches nothing that can be trained: {'; '.join(hints)}.\n"
                f"  Modules of this model with weights: {', '.join(valid)}"
            )
        return [parameter for names in named.values() for name in names for parameter in parts[name]]

    @property
    def _patterns(self) -> list[str]:
        patterns = self.config.target_modules
        return [patterns] if isinstance(patterns, str) else patterns or []

    def _matches(self, pattern: str, name: str) -> bool:
        """As in peft: a whole name or the end of one; a single string may also be a regular expression."""
        single = isinstance(self.config.target_modules, str)
        return bool(module_patterns.matching_patterns(pattern if single else [pattern], [name]))

    def _unties_output_layer(self, model: PreTrainedModel) -> bool:
        """Return whether the output layer is trained and the embedding tied to it is not."""
        embedding, output_layer = model.get_input_embeddings(), model.get_output_embeddings()
        if output_layer is None or output_layer.weight is not embedding.weight:
            return False
        names = {module: name for name, module in model.named_modules()}

        def is_named(layer: nn.Module) -> bool:
            own = (names[layer], f"{names[layer]}.weight")
            return any(self._matches(pattern, name) for pattern in self._patterns for name in own)

        return is_named(output_layer) and not is_named(embedding)

    def _untie_output_layer(self, model: PreTrainedModel) -> None:
        """Give the output layer a copy of the embedding's weights, also for later loads (config)."""
        import torch

        output_layer = model.get_output_embeddings()
        output_layer.weight = torch.nn.Parameter(output_layer.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
        self.notes = [
            "the output layer shared its weights with the embedding. It is trained as a copy, so that the body stays unchanged: "
            "the saved model has one more matrix and tie_word_embeddings: false"
        ]

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write a plain transformers folder: trained tensors as they are now, frozen ones as in the base's
        files, bit for bit.

        The config names fp32 (or the base's dtype, where that is wider), so that a load keeps what was
        trained; a bf16 number is the same number in fp32. Only the trained tensors take more room than in the
        base's files.
        """
        import torch

        from tunesmith.models.load import load

        base = Path(model.name_or_path)
        originals = _original_tensors(model, base)
        state = model.state_dict()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            state[name] = originals.get(id(parameter), state[name])
        model.save_pretrained(folder, state_dict=state)
        model.config.dtype = torch.promote_types(torch.float32, load.checkpoint_dtype(base))
        model.config.save_pretrained(folder)


def _norms_after(body: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The norms of the ``body`` after its last block; encoders such as bert have none."""
    inside = {module for block in blocks for module in block.modules()}
    modules = list(body.modules())
    last = max(modules.index(block) for block in blocks)
    return [
        module for module in modules[last:] if module not in inside and type(module).__name__.endswith("Norm")
    ]


def _head_parameters(model: PreTrainedModel, head: str) -> list[nn.Parameter]:
    names = [] if head == "lm" else head_types.parts(model, head)
    return [parameter for name in names for parameter in model.get_submodule(name).parameters()]


def _require_trained_vocabulary(model: PreTrainedModel, trained: set[int], unties: bool) -> None:
    """Raise RecipeError where the embedding or the output layer is frozen: the rows of new tokens would keep
    their initial mean.

    Single rows of a frozen matrix are LoRA's to train. A mask on the gradient would not suffice: weight decay
    moves every row.
    """
    from tunesmith.models.load import vocabulary

    parameters = dict(model.named_parameters(remove_duplicate=False))
    matrices = vocabulary.end_names(model)
    frozen = [name for name in matrices if unties or id(parameters[f"{name}.weight"]) not in trained]
    if frozen:
        names = ", ".join(name.rpartition(".")[2] for name in matrices)
        raise RecipeError(
            f"add_tokens: {', '.join(frozen)} is frozen, so the rows of new tokens would not be trained.\n"
            f"  Name it, as in adaptation.target_modules=[{names}], or use adaptation=lora, which trains the new rows alone."
        )


def _original_tensors(model: PreTrainedModel, base: Path) -> dict[int, Tensor]:
    """Frozen parameter, by id -> its tensor in the files of ``base``, in the file's dtype, which may be wider
    than the network's.

    A parameter that the files do not have under its name, or with other values, is left out: it is saved as
    it is now.
    """
    import torch
    from safetensors import safe_open

    from tunesmith.models.find import headers

    stored = headers.read_tensors(base)
    prefixes = sorted({name.partition(".")[0] for name in stored})
    files: dict[Path, safe_open] = {}
    originals = {}
    for name, parameter in model.named_parameters():
        # some files hold the body alone, or under another name than this class
        bare = name.removeprefix(f"{model.base_model_prefix}.")
        keys = [key for key in (name, bare, *(f"{prefix}.{bare}" for prefix in prefixes)) if key in stored]
        if parameter.requires_grad or not keys or stored[keys[0]].shape != tuple(parameter.shape):
            continue
        file = stored[keys[0]].file
        if file not in files:
            files[file] = safe_open(file, framework="pt")
        original = files[file].get_tensor(keys[0])  # type: ignore[no-untyped-call]
        if torch.equal(original.to(parameter.device, parameter.dtype), parameter):
            originals[id(parameter)] = original
    return originals
