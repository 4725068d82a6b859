"""Everything about a pipeline that can be known before its first stage trains.

First, what the recipes alone tell: whether a result has the head that the next stage trains, and whether it
is an adapter. Then ``train.run.check`` reads the data of every stage. The result of an earlier stage may not
exist yet: the model that its chain of stages began with takes its place, because it has the same tokenizer,
window and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tunesmith import adaptations, objectives
from tunesmith.errors import RecipeError, UserError
from tunesmith.models.adapters import adapter_types
from tunesmith.pipeline.pipeline_file import Pipeline, Stage
from tunesmith.recipe import Recipe
from tunesmith.train import run


def check(
    pipeline: Pipeline, due: Sequence[Stage], trained: frozenset[str], note: Callable[[str], None]
) -> None:
    """Check the stages that are ``due``. Raises RecipeError with every problem found.

    ``trained``: the stages whose results exist and stay. ``note`` receives a line for each stage.
    """
    problems = [
        f"{stage.where}: stage {stage.name}: {line}" for stage in due for line in _misfits(pipeline, stage)
    ]
    for stage in due if not problems else ():
        recipe = stand_in(pipeline, stage, trained)
        if recipe is None:
            note(
                f"{stage.name}: the recipe is valid; its data are checked when the stages that it names have ended"
            )
            continue
        try:
            facts = run.check(recipe)
        except UserError as error:
            problems.append(f"{stage.where}: stage {stage.name}: {error}")
        else:
            note(
                f"{stage.name}: {facts['data']['train']['examples']:,} training examples, {facts['steps']:,} steps"
            )
    if problems:
        raise RecipeError("\n".join(problems))


def _misfits(pipeline: Pipeline, stage: Stage) -> Iterator[str]:
    """Yield a message for each input of a stage that cannot be used as its recipe asks."""
    name = objectives.name_of(stage.recipe.objective)
    for key, source in stage.inputs.items():
        result = pipeline.stage(source)
        if key == "model":
            yield from _model_misfits(stage, result)
        elif ".rewards." in key and not result.traits.rewards:
            made = objectives.name_of(result.recipe.objective)
            yield (
                f"{key}: {{stage: {source}}} is a model of {made}, which gives no rewards. Name a stage that trains a "
                "reward model."
            )
        if key == "model" and stage.writes and not result.writes:
            yield (
                f"model: {name} trains a language model, and {{stage: {source}}} has a task head in place of its output layer. "
                "Name a stage whose model writes text."
            )


def _model_misfits(stage: Stage, result: Stage) -> Iterator[str]:
    """Yield a message if ``adapter`` does not fit the result that the stage trains further."""
    saved_as, adapter = adapter_type(result), stage.recipe.adapter
    if saved_as is None and adapter is not None:
        yield f"adapter: {adapter}: the result of stage {result.name} is a full model, not an adapter. Leave the key out."
    if saved_as is not None and adapter is None:
        yield (
            f"adapter: missing, and the result of stage {result.name} is an adapter. Set adapter: merge (merge it into its base "
            "first), continue (train it further) or new (ignore it)."
        )
    if saved_as is not None and adapter == "merge" and (why := adapter_types.kind_of(saved_as).unmergeable):
        yield f"adapter: merge: the adapter of stage {result.name} is {why}"
    own = _traits(stage.recipe).saved_as
    if saved_as is not None and adapter == "continue" and own != saved_as:
        yield (
            f"adapter: continue: the adapter of stage {result.name} is of another type than "
            f"adaptation: {adaptations.name_of(stage.recipe.adaptation)}. Take the same adaptation, or adapter: merge."
        )


def _traits(recipe: Recipe) -> adaptations.Traits:
    traits: adaptations.Traits = adaptations.module(adaptations.name_of(recipe.adaptation)).Adaptation.traits
    return traits


def adapter_type(stage: Stage) -> str | None:
    """Return peft's type of the adapter that a stage saves; None for a full model."""
    return _traits(stage.recipe).saved_as


def stand_in(pipeline: Pipeline, stage: Stage, trained: frozenset[str]) -> Recipe | None:
    """Return the recipe of a stage with a model that exists now; None if another of its inputs is missing.

    Tokens and template that the stages in between save with their models are in the returned recipe.
    """
    if any(source not in trained for key, source in stage.inputs.items() if key != "model"):
        return None
    source, recipe = stage.inputs.get("model"), stage.recipe
    while source is not None and source not in trained:
        earlier = pipeline.stage(source)
        source = earlier.inputs.get("model")
        data = recipe.data
        if data.template is None and not data.template_kwargs:
            saved = {key: dict(earlier.recipe.data)[key] for key in ("template", "template_kwargs")}
            data = data.model_copy(update=saved)
        tokens = list(dict.fromkeys([*earlier.recipe.add_tokens, *recipe.add_tokens]))
        taken = {"model": earlier.recipe.model, "adapter": earlier.recipe.adapter}
        recipe = recipe.model_copy(update={**taken, "data": data, "add_tokens": tokens})
    return recipe
