"""The base model of a model, to answer the same prompts: the baseline that shows what training did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.evaluate.trained_reading import ModelArgument
from tunesmith.json_types import JsonObject
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.find import record
from tunesmith.models.find.locate import locate
from tunesmith.models.generate.row_adapters import ACTIVE
from tunesmith.models.load import load
from tunesmith.models.network import base, is_peft

if TYPE_CHECKING:
    from tunesmith.models.generate.decode import Loaded

WORDS = "the base model"


@dataclass(frozen=True)
class BaseModel:
    """``loaded`` answers as the base model if its requests name ``adapter``."""

    loaded: Loaded
    adapter: str | None = ACTIVE


def base_of(model: ModelArgument, loaded: Loaded, trained: JsonObject) -> BaseModel | str | None:
    """Return the base model of ``loaded``, or the reason why there is none to compare with.

    An adapter is switched off, and nothing is loaded again; virtual tokens cannot be. Of a fully fine-tuned
    model, training recorded where it started. None for a model that records no training: it is a base model
    itself. ``model``: what the user named, as it was loaded. Both models get the tokens of the same tokenizer.
    """
    network, tokenizer = loaded
    if is_peft(network) and not virtual_tokens.is_installed(base(network)):
        return BaseModel(loaded, None)
    if isinstance(model, tuple):
        return None
    folder = locate(model, checkpoints=True)
    path = folder.base
    if path is None:
        start = trained.get("start")
        if not start:
            return None
        path = Path(start["path"])
        if not path.is_dir():
            return f"the answers are not compared with the base model {start['model']}: {path} is not there"
        if record.file_hashes(path) != start["files"]:
            return (
                f"the answers are not compared with the base model {start['model']}: {path} has changed since"
            )
    other = load.load_model(locate(path), dtype=network.dtype).to(network.device)
    rows = other.get_input_embeddings().weight.shape[0]
    if rows < base(network).get_input_embeddings().weight.shape[0]:
        return (
            f"the answers are not compared with the base model in {path}: training added tokens that it lacks"
        )
    return BaseModel((other, tokenizer))
