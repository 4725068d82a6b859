"""New tokens: one id each in the tokenizer, a row each in the embedding and in the output layer.

A new row starts as the mean of the rows that were there (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html):
the model then gives a new token about the chance of an average one, and the chances of all others hardly move.
``resize_token_embeddings`` would draw around that mean; the mean itself needs no random number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.find import headers
from tunesmith.models.load import module_patterns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PART = 4096
"""Rows summed at a time: a copy of a large vocabulary in double would be larger than the model."""


@dataclass(frozen=True, slots=True)
class NewTokens:
    """``ids`` of the new tokens by their text; ``known`` = how many tokens the vocabulary had before."""

    ids: dict[str, int]
    known: int

    def rows(self, have: int) -> list[int]:
        """The rows of an embedding of ``have`` rows that hold nothing yet and will be used: new ids, and any gap before them."""
        return sorted({*self.ids.values(), *range(have, max(self.ids.values()) + 1)}) if self.ids else []


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> NewTokens:
    """Add ``tokens`` to the tokenizer, in place: kept whole wherever they stand, and shown when an answer is decoded.

    Raises RecipeError naming a token that is one token already, or that the tokenizer cannot give back as it was written.
    """
    from tokenizers import AddedToken

    known = len(tokenizer)
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        found = tokenizer.encode(token, add_special_tokens=False)
        if token in vocabulary or (len(found) == 1 and tokenizer.decode(found) == token):
            number = vocabulary.get(token, found[0])
            raise RecipeError(
                f"add_tokens: {token!r} is one token of this model already (id {number}). Leave it out."
            )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    for token, number in ids.items():
        inside = tokenizer.encode(f"a{token}b", add_special_tokens=False)
        if number not in inside or tokenizer.decode([number], skip_special_tokens=True) != token:
            raise RecipeError(
                f"add_tokens: {token!r} would not come back as it was written: this tokenizer gives "
                f"{tokenizer.decode([number])!r}.\n  Write it with letters of ASCII, as in <tool>."
            )
    return NewTokens(ids, known)


def grow(model: PreTrainedModel, new: NewTokens) -> list[int]:
    """Give ``model`` a row for each new token, in place, as the mean of its known rows. Returns the rows that are new.

    Spare rows (many models have more rows than tokens) are used before the matrix grows. Tied layers stay one tensor.
    """
    import torch

    weight = model.get_input_embeddings().weight
    have = weight.shape[0]
    rows = new.rows(have)
    if not rows:
        return []
    resize(model, max(have, rows[-1] + 1))
    known = min(new.known, have)
    with torch.no_grad():
        for tensor in _ends(model):
            where = torch.tensor(rows, device=tensor.device)
            total = sum(part.double().sum(dim=0) for part in tensor[:known].split(PART))
            tensor[where] = (total / known).to(tensor.dtype)
    return rows


def resize(model: PreTrainedModel, rows: int) -> None:
    """Make embedding and output layer ``rows`` long, in place; rows that are new hold zeros."""
    import torch

    have = model.get_input_embeddings().weight.shape[0]
    if rows <= have:
        return
    state = torch.get_rng_state()
    model.resize_token_embeddings(rows, mean_resizing=False)
    torch.set_rng_state(
        state
    )  # what it drew for the new rows is not kept, so it is no part of the run either
    with torch.no_grad():
        for tensor in _ends(model):
            tensor[have:] = 0


def fit_to_adapter(model: PreTrainedModel, adapter: Path) -> None:
    """Grow ``model`` to the vocabulary of the adapter in the folder ``adapter``, in place, where that brings new tokens.

    Raises ModelError when the adapter lacks any of the new rows: they would hold nothing.
    """
    own = adapter_rows(adapter)
    saved = headers.read_tensors(adapter, "adapter_model")
    have = model.get_input_embeddings().weight.shape[0]
    needed, lacking = have, []
    for name in end_names(model):
        key = f"base_model.model.{name}.weight"
        whole = saved[key].shape[0] if key in saved else 0
        trained = next(
            (rows for layer, rows in own.items() if name == layer or name.endswith(f".{layer}")), []
        )
        needed = max(needed, whole, max(trained, default=-1) + 1)
        lacking.append((name, whole, set(trained)))
    for name, whole, given in lacking:
        empty = [row for row in range(have, needed) if row >= whole and row not in given]
        if empty:
            raise ModelError(
                f"{adapter} has a vocabulary of {needed} tokens, its base has {have}, and the adapter holds no row "
                f"{empty[0]} of {name}.\n  It was saved without what it learnt of its new tokens; save or train it again."
            )
    resize(model, needed)


def adapter_rows(adapter: Path) -> dict[str, list[int]]:
    """Layer -> rows that an adapter trained (peft's ``trainable_token_indices``); empty when it trained none."""
    rows = headers.read_json(adapter / "adapter_config.json").get("trainable_token_indices") or {}
    return rows if isinstance(rows, dict) else {"embed_tokens": rows}


def write_rows(model: PreTrainedModel) -> None:
    """Write an attached adapter's rows into its base's layers, in place: no forward pass copies the matrix to put them there."""
    for layer in (
        model.get_base_model().get_input_embeddings(),
        model.get_base_model().get_output_embeddings(),
    ):
        rows = getattr(layer, "token_adapter", None)
        if rows is not None and not rows.merged:
            rows.merge()


def rows_to_train(
    model: PreTrainedModel, new_rows: Sequence[int], whole: Sequence[str] = ()
) -> dict[str, list[int]]:
    """Layer -> the ``new_rows`` trained beside an adapter, as peft's ``trainable_token_indices`` wants them.

    ``whole``: patterns of layers that are trained whole (``modules_to_save``), new rows and all. Tied layers share their rows.
    Raises RecipeError for an output layer with a bias, which peft's rows leave out.
    """
    if not new_rows:
        return {}
    last = model.get_output_embeddings()
    own = end_names(model)
    covered = [
        name for name in end_names(model, all_ends=True) if module_patterns.matched(list(whole), [name])
    ]
    tied = last is not None and len(own) == 1
    left = [] if tied and covered else [name for name in own if name not in covered]
    if not tied and last is not None and last.bias is not None and own[-1] in left:
        raise RecipeError(
            f"add_tokens: the output layer {own[-1]} of this model has a bias, which peft's trained rows leave out.\n"
            f"  Add adaptation.modules_to_save=[{own[-1]}], or use adaptation=full."
        )
    return {name: list(new_rows) for name in left}


def end_names(model: PreTrainedModel, all_ends: bool = False) -> list[str]:
    """The names of the embedding and, when it has weights of its own (or with ``all_ends``), of the output layer."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [first] if last is None or (last.weight is first.weight and not all_ends) else [first, last]
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(end)] for end in ends]


def _ends(model: PreTrainedModel) -> list[Any]:
    """The tensors that have one row for each token: embedding, output layer and its bias, each once."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    found = [first.weight, *([last.weight, last.bias] if last is not None else [])]
    return list({id(tensor): tensor for tensor in found if tensor is not None}.values())


def no_room(adaptation: str) -> RecipeError:
    """What an adaptation answers to new tokens whose files have no place for their rows."""
    return RecipeError(
        f"add_tokens: the files of adaptation={adaptation} have no room for the rows of new tokens.\n"
        "  Use adaptation=lora, which keeps them, or adaptation=full; or leave add_tokens out."
    )
