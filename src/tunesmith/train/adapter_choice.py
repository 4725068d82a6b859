"""What becomes of a model that is an adapter already (``adapter:`` of the recipe), checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith import adaptations
from tunesmith.errors import RecipeError
from tunesmith.models.find import record
from tunesmith.models.find.locate import Folder
from tunesmith.models.load import load
from tunesmith.recipe import Recipe, changed

BY_LAYER = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
"""Keys of a recipe that peft keeps in two: what holds for most layers, and what for those named."""


def check(recipe: Recipe, folder: Folder) -> None:
    kind = adaptations.name_of(recipe.adaptation)
    if folder.kind != "adapter" and recipe.adapter is not None:
        raise RecipeError(
            f"adapter: {recipe.adapter}: the model {recipe.model} is not an adapter. Leave the key out."
        )
    if folder.kind == "adapter" and recipe.adapter is None:
        raise RecipeError(
            f"the model {recipe.model} is an adapter on {folder.base}. Say what becomes of it:\n"
            "  adapter: continue (train it on), merge (fold it into its base first), or new (leave it out)."
        )
    traits = adaptations.module(kind).Adaptation.traits
    if recipe.adapter == "continue" and traits.saved_as is not None:
        saved = load.adapter_config(folder.path)
        saved_as = str(getattr(saved.peft_type, "value", saved.peft_type))
        if saved_as != traits.saved_as:
            made = (adaptations.makers(saved_as, False) or ["of another kind"])[0]
            raise RecipeError(
                f"adapter: continue: this adapter is {made}, and adaptation: {kind} would learn at another's rate and keys.\n"
                f"  Take adaptation: {made}, or start a new one with adapter: merge or adapter: new."
            )
        recorded = record.read(folder.path).get("quantization") or {}
        if traits.quantised_base != bool(recorded):
            base = f"in {recorded['quant_type']}" if recorded else "as it is"
            fitting = adaptations.makers(saved_as, bool(recorded))
            raise RecipeError(
                f"adapter: continue: this adapter was trained on its base {base}, and adaptation: {kind} has another.\n"
                f"  {f'Take adaptation: {fitting[0]}, or start' if fitting else 'Start'} a new one with adapter: merge or "
                "adapter: new."
            )
        keys = (
            set(type(recipe.adaptation).model_fields) - adaptations.module(kind).Adaptation.keys_of_learning
        )
        chosen = sorted(
            key for key in keys if changed(recipe.adaptation, key)
        )  # a run's own recipe.yaml holds every default
        made_with = keys_that_made(recipe, folder) or {}
        other = [
            f"{key} (it has {was})"
            for key in chosen
            if (was := _made_otherwise(recipe, key, saved, {**recorded, **made_with}))
        ]
        if other:
            raise RecipeError(
                f"adapter: continue keeps the adapter as it was made, and adaptation names another {', '.join(other)}.\n"
                "  Leave out those keys, or start a new one with adapter: merge or adapter: new."
            )
    if recipe.adapter == "continue" and traits.saved_as is None:
        raise RecipeError(
            f"adapter: continue trains the adapter, adaptation: {kind} trains the model's own weights. Use adapter: merge."
        )


def keys_that_made(recipe: Recipe, folder: Folder) -> dict[str, Any] | None:
    """The adaptation, with its keys, that made what a run of ``recipe`` saves: of an adapter that is continued, its first one.

    peft's config does not always tell: a PiSSA of rank r is saved as a plain LoRA of rank 2 r. None for an adapter without a
    record.
    """
    if recipe.adapter == "continue":
        return record.read(folder.path).get("adaptation")
    return {"type": adaptations.name_of(recipe.adaptation), **recipe.adaptation.model_dump(mode="json")}


def _made_otherwise(recipe: Recipe, key: str, saved: Any, recorded: Mapping[str, Any]) -> str | None:
    """What the ``saved`` adapter has of a key of the recipe, if that is another. What is ``recorded`` of it goes first."""
    wanted, has = getattr(recipe.adaptation, key), recorded.get(key, getattr(saved, key, None))
    if key not in recorded and (others := getattr(saved, BY_LAYER.get(key, ""), None)):
        has = {"default": has, **others}
    if isinstance(has, set | list):
        has, wanted = sorted(has), sorted(wanted) if isinstance(wanted, list) else wanted
    return None if wanted == has or (not wanted and not has) else f"{has}"
