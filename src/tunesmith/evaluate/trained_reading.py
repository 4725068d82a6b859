"""Read a file in the way in which a model's training read its rows. The saved model records that way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tunesmith.data.data_config import Source
from tunesmith.data.read.source import open_source
from tunesmith.errors import DataError, RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import record
from tunesmith.models.find.locate import locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ModelArgument = str | Path | tuple["PreTrainedModel", "PreTrainedTokenizerBase"]
"""A catalog name, a folder, or a pair (model, tokenizer) in memory."""


def trained_with(model: ModelArgument) -> JsonObject:
    """Return ``record.trained`` of a model; {} for a model in memory or a model that no run saved.

    Raises ModelError for a model that cannot be found."""
    return {} if isinstance(model, tuple) else record.trained(locate(model, checkpoints=True).path)


def make_source(data: str | Path, **keys: object) -> Source:
    """Return the source ``data``. Raises RecipeError for keys that are invalid or would do nothing."""
    try:
        source = Source.model_validate({"path": str(data), **keys})
    except ValidationError as error:
        raise RecipeError(f"data: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if unused := source.unused_keys():
        raise RecipeError(
            f"{' and '.join(unused)} would do nothing: {data} is not a data set of the Hub (hub:OWNER/NAME)"
        )
    return source


def source_as_trained(
    trained: JsonObject,
    data: str | Path,
    accepted: tuple[type, ...],
    given: Mapping[str, object],
    keys: Mapping[str, object],
    *,
    gold: bool = True,
    prompts: bool = False,
) -> Source:
    """Return the source ``data``, with the reading keys of a training source if they suit the file's columns.

    ``given``: values for READING_KEYS of ``data_config``. If any of them is set, the keys that training
    recorded are not used. ``accepted``, ``gold`` and ``prompts``: as in ``open_source``. ``keys``: other keys
    of the source. Raises RecipeError."""
    plain = make_source(data, **given, **keys)
    remembered = [] if any(given.values()) else trained.get("readings") or []
    for reading in remembered:
        source = make_source(data, **reading, **keys)
        try:
            open_source(source, accepted, gold, prompts)
        except DataError:  # the file has other columns than the training file had
            continue
        return source
    return plain
