"""The tokens that end an answer, during generation and in the generation config of a saved model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.encode import conversations
from tunesmith.models.network import base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: those of tokenizer, generation config and chat template."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset([*conversations.stop_ids(tokenizer), *([eos] if isinstance(eos, int) else eos or [])])


def save_stop_ids(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the generation config of a saved model with every id of ``stop_ids``.

    Without the token that closes a turn, ``generate`` of transformers does not stop after the answer.
    """
    core = base(model)
    if not core.can_generate():
        return
    settings = copy.deepcopy(core.generation_config)
    eos = settings.eos_token_id
    known = [eos] if isinstance(eos, int) else list(eos or [])
    ids = [*known, *sorted(stop_ids(core, tokenizer) - set(known))]
    settings.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    settings.to_json_file(folder / "generation_config.json")
