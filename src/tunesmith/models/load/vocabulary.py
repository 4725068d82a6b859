"""New tokens: an id for each in the tokenizer, a row for each in the embedding and in the output layer.

A new row is the mean of the known rows (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html), so a
new token is about as probable as an average one. ``resize_token_embeddings`` would draw around that mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.find import headers
from tunesmith.models.load import module_patterns
from tunesmith.models.network import trained_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BLOCK_ROWS = 4096
"""Rows summed at a time: a copy of a large vocabulary in fp64 would be larger than the model."""


@dataclass(frozen=True, slots=True)
class NewTokens:
    """``ids``: of the new tokens, by their text. ``known``: tokens in the vocabulary before."""

    ids: dict[str, int]
    known: int

    def rows(self, have: int) -> list[int]:
        """Return the rows to fill in an embedding of ``have`` rows: new ids and the gaps below."""
        return sorted({*self.ids.values(), *range(have, max(self.ids.values()) + 1)}) if self.ids else []


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> NewTokens:
    """Add ``tokens`` to the tokenizer, in place. They are never split, and decoding an answer keeps them.

    Raises RecipeError for a token that the vocabulary has, or that does not decode to the same text.
    """
    from tokenizers import AddedToken

    known = len(tokenizer)
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if token in vocabulary or (len(ids) == 1 and tokenizer.decode(ids) == token):
            number = vocabulary.get(token, ids[0])
            raise RecipeError(f"add_tokens: {token!r} is one token of this model (id {number}). Remove it.")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    new = NewTokens({token: tokenizer.convert_tokens_to_ids(token) for token in tokens}, known)
    for token, number in new.ids.items():
        decoded = tokenizer.decode([number], skip_special_tokens=True)
        if number not in tokenizer.encode(f"a{token}b", add_special_tokens=False) or decoded != token:
            raise RecipeError(
                f"add_tokens: this tokenizer decodes {token!r} to {tokenizer.decode([number])!r}.\n"
                "  Write the token with ASCII letters, as in <tool>."
            )
    return new


def forget_loading(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return ``tokenizer`` without the arguments it was loaded with: transformers would save them."""
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def grow(model: PreTrainedModel, new: NewTokens) -> list[int]:
    """Give ``model`` a row for each new token, in place, as the mean of its known rows. Returns the new rows.

    Spare rows, which many models have, are used before the matrix grows. Tied layers stay one tensor.
    """
    import torch

    have = _row_count(model)
    rows = new.rows(have)
    if not rows:
        return []
    resize(model, max(have, rows[-1] + 1))
    known = min(new.known, have)
    with torch.no_grad():
        for tensor in _token_tensors(model):
            total = sum(block.double().sum(dim=0) for block in tensor[:known].split(BLOCK_ROWS))
            tensor[torch.tensor(rows, device=tensor.device)] = (total / known).to(tensor.dtype)
    return rows


def resize(model: PreTrainedModel, rows: int) -> None:
    """Grow embedding and output layer by rows of zeros, in place. No random number is used up."""
    import torch

    have = _row_count(model)
    if rows <= have:
        return
    state = torch.get_rng_state()
    model.resize_token_embeddings(rows, mean_resizing=False)
    torch.set_rng_state(state)
    with torch.no_grad():
        for tensor in _token_tensors(model):
            tensor[have:] = 0


def fit_to_adapter(model: PreTrainedModel, adapter: Path) -> None:
    """Grow ``model``, in place, to the vocabulary of the adapter in the folder ``adapter``.

    Raises ModelError when the adapter lacks one of the new rows, which would stay zeros.
    """
    trained = adapter_rows(adapter)
    saved = headers.read_tensors(adapter, "adapter_model")
    have = _row_count(model)
    held: dict[str, set[int]] = {}
    for name in end_names(model):
        key = f"base_model.model.{name}.weight"
        rows = next((rows for layer, rows in trained.items() if f".{name}".endswith(f".{layer}")), [])
        held[name] = {*rows, *range(saved[key].shape[0] if key in saved else 0)}
    needed = max(have, *(max(rows, default=-1) + 1 for rows in held.values()))
    for name, held_rows in held.items():
        for row in range(have, needed):
            if row not in held_rows:
                raise ModelError(
                    f"{adapter} has a vocabulary of {needed} tokens, its base has {have}, "
                    f"and the adapter lacks row {row} of {name}.\n"
                    "  It was saved without its new tokens; save or train it again."
                )
    resize(model, needed)


def adapter_rows(adapter: Path) -> dict[str, list[int]]:
    """Return layer -> rows that an adapter trained (peft's ``trainable_token_indices``), {} for none."""
    rows = headers.read_json(adapter / "adapter_config.json").get("trainable_token_indices") or {}
    return rows if isinstance(rows, dict) else {"embed_tokens": rows}


def write_rows(model: PreTrainedModel) -> None:
    """Write trained rows into the base's layers, in place: else each forward pass copies the matrix."""
    core = model.get_base_model()
    for layer in (core.get_input_embeddings(), core.get_output_embeddings()):
        rows = trained_rows(layer)
        if rows is not None and not rows.merged:
            rows.merge()


def rows_to_train(
    model: PreTrainedModel, new_rows: Sequence[int], modules_to_save: Sequence[str] = ()
) -> dict[str, list[int]]:
    """Return peft's ``trainable_token_indices``: layer -> the ``new_rows`` that are trained with an adapter.

    ``modules_to_save``: patterns of layers that are trained with all rows. Tied layers share their rows.
    Raises RecipeError for an output layer with a bias, which peft's trained rows leave out.
    """
    if not new_rows:
        return {}
    output = model.get_output_embeddings()
    ends = end_names(model)
    all_ends = end_names(model, all_ends=True)
    covered = [name for name in all_ends if module_patterns.matching_patterns(list(modules_to_save), [name])]
    tied = output is not None and len(ends) == 1
    names = [] if tied and covered else [name for name in ends if name not in covered]
    if not tied and output is not None and output.bias is not None and ends[-1] in names:
        raise RecipeError(
            f"add_tokens: the output layer {ends[-1]} has a bias, which peft's trained rows leave out.\n"
            f"  Add adaptation.modules_to_save=[{ends[-1]}], or use adaptation=full."
        )
    return {name: list(new_rows) for name in names}


def end_names(model: PreTrainedModel, all_ends: bool = False) -> list[str]:
    """Return the names of embedding and output layer; of a tied output layer only with ``all_ends``."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is None or (output.weight is embedding.weight and not all_ends)
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(end)] for end in ([embedding] if tied else [embedding, output])]


def _row_count(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _token_tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the tensors with one row per token: embedding, output layer and its bias, each once."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tensors = [embedding.weight, *([output.weight, output.bias] if output is not None else [])]
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def no_room(adaptation: str) -> RecipeError:
    """Return the error of an adaptation whose files cannot hold the rows of new tokens."""
    return RecipeError(
        f"add_tokens: the files of adaptation={adaptation} have no room for the rows of new tokens.\n"
        "  Use adaptation=lora, which keeps them, or adaptation=full; or remove add_tokens."
    )
