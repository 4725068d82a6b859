"""The body frozen: its last blocks, the output layer, or parts chosen by name are trained, and nothing below them is touched.

The oldest way of transfer (Yosinski et al. 2014; of transformers only the last layers: Lee et al. 2019, "What Would Elsa Do?").
The backward pass ends at the first trained layer, because nothing below it wants a gradient. Where only what stands on top of the
body is trained, the engine keeps the body's outputs, and each later epoch costs the head alone (``train.frozen_body_cache``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.adaptations import Traits
from tunesmith.errors import RecipeError
from tunesmith.models.heads import head_types
from tunesmith.models.load import module_patterns as matching

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_BLOCKS = 2
"""What a language model trains when the recipe names nothing; a new head is enough by itself."""


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    train_last: int | None = Field(
        None,
        ge=0,
        description="so many of the last blocks, and the final norm; default 2, or 0 beside a new head or target_modules",
    )
    target_modules: str | list[str] | None = Field(
        None,
        description="modules or parameters trained besides, such as [lm_head], by the end of their names; or one pattern",
    )


class Adaptation:
    traits = Traits(None)
    learning_rate = 2e-4
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
        """The model itself, with the chosen parts and any new head trainable and everything else frozen.

        An output layer that is named while the embedding it is tied to is not gets weights of its own: the body stays as it was.
        Raises RecipeError, before the model is touched, when a name matches nothing, when there are fewer blocks than
        ``train_last``, when nothing would be trained, and when the rows of new tokens would not be.
        """
        chosen = [*self._last_blocks(model, head), *self._named(model), *_new_head(model, head)]
        trained = {id(parameter) for part in chosen for parameter in part}
        apart = self._is_parted(model)
        if not trained:
            raise RecipeError(
                "adaptation.train_last=0 leaves nothing to train: the body is frozen and this objective brings no new head.\n"
                "  Set adaptation.train_last=2, or name parts, as in adaptation.target_modules=[lm_head]."
            )
        if new_rows:
            _require_whole_ends(model, trained, apart)
        if apart:
            self._part(model)
            trained.discard(id(model.get_input_embeddings().weight))
            trained.add(id(model.get_output_embeddings().weight))
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        if head != "lm" and trained == {id(one) for part in _new_head(model, head) for one in part}:
            self._still(model)
        return model

    def _still(self, model: PreTrainedModel) -> None:
        """Nothing is dropped in a body of which nothing is learnt: its outputs are features, the same each time."""
        from torch import nn

        drops = [one for one in model.base_model.modules() if isinstance(one, nn.Dropout) and one.p > 0]
        for module in drops:
            module.p = 0.0
        if drops:
            self.notes = [
                "the frozen body drops nothing in training: its outputs are the same in every epoch"
            ]

    def _last_blocks(self, model: PreTrainedModel, head: str) -> list[list[Any]]:
        """Parameters of the last blocks and of the norm after them, each module's as a list."""
        from tunesmith.models.fast import torch_compile

        blocks = torch_compile.layers(model)
        wanted = self.config.train_last
        if wanted is None:
            wanted = (
                min(DEFAULT_BLOCKS, len(blocks)) if head == "lm" and self.config.target_modules is None else 0
            )
        if wanted > len(blocks):
            raise RecipeError(
                f"adaptation.train_last={wanted}: this model has {len(blocks)} blocks.\n"
                f"  Set it to at most {len(blocks)}, or use adaptation=full, which trains everything."
            )
        if wanted == 0:
            return []
        return [
            list(module.parameters())
            for module in [*blocks[-wanted:], *_norms_after(model.base_model, blocks)]
        ]

    def _named(self, model: PreTrainedModel) -> list[list[Any]]:
        """Parameters of the modules, and the parameters themselves, that ``target_modules`` names."""
        modules = {name: list(module.parameters()) for name, module in model.named_modules() if name}
        parts = {**modules, **{name: [one] for name, one in model.named_parameters(remove_duplicate=False)}}
        patterns = self._patterns
        matching.check_regex("target_modules", self.config.target_modules or [])
        unmatched = [
            one
            for one in patterns
            if not any(inside and self._matches(one, name) for name, inside in parts.items())
        ]
        if unmatched:
            ends = sorted(
                {name.rpartition(".")[2] for name, inside in modules.items() if inside}
                - set(map(str, range(1000)))
            )
            hints = [f"`{one}`{matching.hint(one, ends)}" for one in unmatched]
            raise RecipeError(
                f"adaptation.target_modules matches nothing that can be trained: {'; '.join(hints)}.\n"
                f"  Modules of this model with weights: {', '.join(ends)}"
            )
        return [parts[name] for name in parts if any(self._matches(pattern, name) for pattern in patterns)]

    @property
    def _patterns(self) -> list[str]:
        given = self.config.target_modules
        return [] if given is None else [given] if isinstance(given, str) else list(given)

    def _matches(self, pattern: str, name: str) -> bool:
        """As in peft: a whole name or the end of one; a single string may also be a regular expression."""
        return bool(
            matching.matching_patterns(
                pattern if isinstance(self.config.target_modules, str) else [pattern], [name]
            )
        )

    def _is_parted(self, model: PreTrainedModel) -> bool:
        """Whether the output layer is to be trained and the embedding that shares its weights is not."""
        first, last = model.get_input_embeddings(), model.get_output_embeddings()
        if last is None or last.weight is not first.weight:
            return False
        names = {module: name for name, module in model.named_modules()}

        def named(layer: Any) -> bool:
            own = (names[layer], f"{names[layer]}.weight")
            return any(self._matches(pattern, name) for pattern in self._patterns for name in own)

        return named(last) and not named(first)

    def _part(self, model: PreTrainedModel) -> None:
        """Give the output layer weights of its own, equal to the embedding's, and say so in the config, for whoever loads it."""
        import torch

        last = model.get_output_embeddings()
        last.weight = torch.nn.Parameter(last.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
        self.notes = [
            "the output layer shared its weights with the embedding; it is trained apart from it, so that the body stays as it "
            "was: the saved model has a matrix more and tie_word_embeddings: false"
        ]

    def learning_rates(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """A plain transformers folder: trained tensors as they are now, frozen ones as the base's files hold them, bit for bit.

        The config names fp32 (or the base's dtype, where that is wider): what loads it then keeps what was trained, and a bf16
        number is the same number in fp32. Files stay as small as the base's, but for what was trained.
        """
        import torch

        from tunesmith.models.load import load

        base = Path(model.name_or_path)
        originals = _originals(model, base)
        names = model.named_parameters(remove_duplicate=False)
        state = {
            **model.state_dict(),
            **{name: originals[id(one)] for name, one in names if id(one) in originals},
        }
        model.save_pretrained(folder, state_dict=state)
        model.config.dtype = torch.promote_types(torch.float32, load.checkpoint_dtype(base))
        model.config.save_pretrained(folder)


def _norms_after(body: Any, blocks: Sequence[Any]) -> list[Any]:
    """The norms of the ``body`` that stand after its last block; encoders such as bert have none."""
    inside = {module for block in blocks for module in block.modules()}
    modules = list(body.modules())
    last = max(modules.index(block) for block in blocks)
    return [one for one in modules[last:] if one not in inside and type(one).__name__.endswith("Norm")]


def _new_head(model: PreTrainedModel, head: str) -> list[list[Any]]:
    return (
        []
        if head == "lm"
        else [list(model.get_submodule(name).parameters()) for name in head_types.parts(model, head)]
    )


def _require_whole_ends(model: PreTrainedModel, trained: set[int], apart: bool) -> None:
    """The rows of new tokens stand in the embedding and in the output layer; in a frozen matrix they would stay the mean.

    Single rows of a frozen matrix are LoRA's to train. A mask on the gradient would not do: weight decay moves every row.
    """
    from tunesmith.models.load import vocabulary

    parameters = dict(model.named_parameters(remove_duplicate=False))
    ends = vocabulary.end_names(model)
    frozen = ends if apart else [name for name in ends if id(parameters[f"{name}.weight"]) not in trained]
    if frozen:
        every = ", ".join(name.rpartition(".")[2] for name in ends)
        raise RecipeError(
            f"add_tokens: frozen here: {', '.join(frozen)}, so the rows of new tokens would never be learnt.\n"
            f"  Name it, as in adaptation.target_modules=[{every}], or use adaptation=lora, which trains the new rows alone."
        )


def _originals(model: PreTrainedModel, base: Path) -> dict[int, Any]:
    """Of each frozen parameter, by id, the tensor in the files of ``base``: in its own dtype, which the network's may not hold.

    One that is not there under its name, or is not what the network computed with, is left out: it is saved as it is.
    """
    import torch
    from safetensors import safe_open

    from tunesmith.models.find import headers

    stored = headers.read_tensors(base)
    prefix = f"{model.base_model_prefix}."
    others = {name.partition(".")[0] for name in stored}
    opened: dict[Path, Any] = {}
    found = {}
    for name, parameter in model.named_parameters():
        bare = name.removeprefix(
            prefix
        )  # some files hold the body alone, or under another name than this class
        key = next(
            (one for one in (name, bare, *(f"{other}.{bare}" for other in sorted(others))) if one in stored),
            bare,
        )
        if parameter.requires_grad or key not in stored or stored[key].shape != tuple(parameter.shape):
            continue
        file = stored[key].file
        if file not in opened:
            opened[file] = safe_open(file, framework="pt")
        original = opened[file].get_tensor(key)
        if torch.equal(original.to(parameter.device, parameter.dtype), parameter):
            found[id(parameter)] = original
    return found
