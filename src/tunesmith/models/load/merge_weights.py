"""Merge the adapter of a peft model into its base, in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.errors import UserError
from tunesmith.models.adapters import adapter_types
from tunesmith.models.load import quantization
from tunesmith.models.network import has_attributes, submodule, without_adapter

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


def merge_into_base(model: PreTrainedModel) -> PreTrainedModel:
    """Merge a peft model's adapter into its base, in place, and return the plain model. Raises UserError.

    Tied embeddings are separated first, so that a delta of one does not change the other. They are tied again
    if they are equal after the merge. If not, the config is set to untied, so that a reload keeps both.
    """
    import torch

    if quantization.record(model) is not None:
        raise UserError('an adapter cannot be merged into 4 or 8 bits: load it with adapter="merge"')
    for config in model.peft_config.values():
        check_mergeable(config)
    core = model.get_base_model()
    embedding, output = core.get_input_embeddings(), core.get_output_embeddings()
    embedding, output = without_adapter(embedding), without_adapter(output)
    tied = output is not None and embedding.weight is output.weight
    if tied:
        output.weight = torch.nn.Parameter(embedding.weight.detach().clone())
    _install_trained_copies(core)
    try:
        plain = model.merge_and_unload(safe_merge=True)
    except (
        ValueError,
        NotImplementedError,
    ) as error:  # peft raises either for an adapter that it cannot merge
        raise UserError(f"this adapter cannot be merged: {error}") from None
    if tied:
        embedding, output = plain.get_input_embeddings(), plain.get_output_embeddings()
        equal = torch.equal(embedding.weight, output.weight)
        if equal:
            output.weight = embedding.weight
        for config in (plain.config, plain.config.get_text_config()):  # peft wrote them before the comparison
            config.tie_word_embeddings = equal
    return plain


def _install_trained_copies(core: PreTrainedModel) -> None:
    """Replace modules of several layers with their trained copies: peft's merge assumes a single layer."""
    for name, module in list(core.named_modules()):
        copies = submodule(module, "modules_to_save")
        if copies is not None and not has_attributes(module.original_module, "weight"):
            core.set_submodule(name, copies[module.active_adapters[0]])


def check_mergeable(config: PeftConfig) -> None:
    """Raise UserError for a type of adapter that cannot be merged into weights."""
    name = config.peft_type.value.lower()
    if config.is_prompt_learning:
        raise UserError(f"a {name} adapter adds inputs, not weights: there is nothing to merge it into")
    if (reason := adapter_types.kind_of(config.peft_type.value).unmergeable) is not None:
        raise UserError(f"a {name} adapter is {reason}")
