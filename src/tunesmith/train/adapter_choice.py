"""Checks of the recipe's ``adapter`` key (continue, merge or new), for a model that is an adapter already."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

from tunesmith import adaptations
from tunesmith.errors import RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import record
from tunesmith.models.find.locate import Folder
from tunesmith.models.load import load
from tunesmith.recipe import Recipe, changed

if TYPE_CHECKING:
    from peft import PeftConfig

PATTERN_KEYS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
"""Keys of a recipe that peft stores as two: the value of most layers, and those of named layers."""


def check(recipe: Recipe, folder: Folder) -> None:
    """Raise RecipeError where ``adapter`` does not fit the model in ``folder`` or the adaptation."""
    kind = adaptations.name_of(recipe.adaptation)
    if folder.kind != "adapter" and recipe.adapter is not None:
        raise RecipeError(
            f"adapter: {recipe.adapter}: the model {recipe.model} is not an adapter. Leave the key out."
        )
    if folder.kind == "adapter" and recipe.adapter is None:
        raise RecipeError(
            f"adapter: missing, and the model {recipe.model} is an adapter on {folder.base}.\n"
            "  Set adapter: continue (train it further), merge (merge it into its base first) or new (ignore it)."
        )
    if recipe.adapter != "continue":
        return
    if adaptations.module(kind).Adaptation.traits.saved_as is None:
        raise RecipeError(
            f"adapter: continue trains the adapter, adaptation: {kind} trains the model's own weights. Use adapter: merge."
        )
    _check_continued(recipe, folder, kind)


def _check_continued(recipe: Recipe, folder: Folder, kind: str) -> None:
    """Raise RecipeError where the adaptation has another type, base or keys than the adapter."""
    adaptation = adaptations.module(kind).Adaptation
    saved = load.adapter_config(folder.path)
    saved_as = str(saved.peft_type.value if isinstance(saved.peft_type, Enum) else saved.peft_type)
    if saved_as != adaptation.traits.saved_as:
        made = (adaptations.makers(saved_as, False) or ["of another type"])[0]
        raise RecipeError(
            f"adapter: continue: this adapter is {made}, and adaptation: {kind} has another learning rate and other keys.\n"
            f"  Take adaptation: {made}, or start a new adapter with adapter: merge or adapter: new."
        )
    recorded = record.read(folder.path).get("quantization") or {}
    if adaptation.traits.quantised_base != bool(recorded):
        base = f"quantised to {recorded['quant_type']}" if recorded else "not quantised"
        makers = adaptations.makers(saved_as, bool(recorded))
        raise RecipeError(
            f"adapter: continue: this adapter was trained on a base that was {base}, and adaptation: {kind} has another.\n"
            f"  {f'Take adaptation: {makers[0]}, or start' if makers else 'Start'} a new adapter with adapter: merge or "
            "adapter: new."
        )
    # compared with the defaults, because a run's own recipe.yaml contains every default
    keys = set(type(recipe.adaptation).model_fields) - adaptation.keys_of_learning
    chosen = sorted(key for key in keys if changed(recipe.adaptation, key))
    made_with = {**recorded, **(recorded_adaptation(recipe, folder) or {})}
    differences = [
        f"{key} (it has {was})" for key in chosen if (was := _made_with_other(recipe, key, saved, made_with))
    ]
    if differences:
        raise RecipeError(
            f"adapter: continue keeps the adapter as it was made, and adaptation names another {', '.join(differences)}.\n"
            "  Leave out those keys, or start a new adapter with adapter: merge or adapter: new."
        )


def recorded_adaptation(recipe: Recipe, folder: Folder) -> JsonObject | None:
    """Return the adaptation, with its keys, that made the adapter which a run of ``recipe`` saves.

    That is the first one, if the adapter is continued; None for an adapter without a record. peft's config
    does not always tell it: a PiSSA of rank r is saved as a plain LoRA of rank 2 r.
    """
    if recipe.adapter == "continue":
        return record.read(folder.path).get("adaptation")
    return {"type": adaptations.name_of(recipe.adaptation), **recipe.adaptation.model_dump(mode="json")}


def _made_with_other(
    recipe: Recipe, key: str, saved: PeftConfig, recorded: Mapping[str, object]
) -> str | None:
    """Return the adapter's value of a recipe key, if it differs; ``recorded`` has precedence over
    ``saved``."""
    wanted: object = dict(recipe.adaptation)[key]
    has = recorded.get(key, vars(saved).get(key))
    if key not in recorded and (by_layer := vars(saved).get(PATTERN_KEYS.get(key, ""))):
        has = {"default": has, **by_layer}
    if isinstance(has, set | list):
        has, wanted = sorted(has), sorted(wanted) if isinstance(wanted, list) else wanted
    return None if wanted == has or (not wanted and not has) else f"{has}"
