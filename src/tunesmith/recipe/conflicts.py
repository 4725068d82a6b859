"""Choices of a recipe that contradict each other, and keys that would do nothing next to the others."""

from __future__ import annotations

from typing import Any

from tunesmith import adaptations, objectives
from tunesmith.data.read.source import eval_sources
from tunesmith.data.rows import Chat, Labelled
from tunesmith.recipe.schema import Recipe, changed


def conflicts(recipe: Recipe) -> list[str]:
    """Choices that contradict each other, and keys that would do nothing beside the others. Default values never count."""
    data, train, samples = recipe.data, recipe.train, recipe.samples
    held_out = bool(eval_sources(data)) or data.eval.fraction > 0
    objective = objectives.name_of(recipe.objective)
    loss = objectives.module(objective).Objective.traits
    traits = adaptations.module(adaptations.name_of(recipe.adaptation)).Adaptation.traits
    rows = loss.rows
    found = []

    def clash(condition: Any, message: str) -> None:
        if condition:
            found.append(message)

    clash(
        recipe.add_tokens and recipe.adapter == "continue",
        "add_tokens: adapter: continue keeps the adapter's own vocabulary. Use adapter: merge, which makes room for new tokens",
    )
    clash(
        recipe.device_map is not None and recipe.adapter,
        "device_map: peft places the layers anew when it attaches an adapter. Fold it in first: tunesmith merge",
    )
    clash(
        recipe.device_map is not None and train.torch_compile,
        "device_map: the hooks that bring batches to its layers cannot be compiled. Leave out one of the two",
    )
    dropout = traits.dropout and getattr(recipe.adaptation, traits.dropout)
    clash(
        train.torch_compile and dropout,
        f"adaptation.{traits.dropout}: it is drawn on the host for each row, and a layer compiled by train.torch_compile cannot "
        "ask the host. Leave out one of the two",
    )
    clash(
        recipe.trust_remote_code and recipe.add_tokens,
        "add_tokens: how the vocabulary of a model with code of its own grows is up to that code. Leave out one of the two",
    )
    if loss.head != "lm":
        for key in ("prompts", "count", "max_new_tokens"):
            clash(changed(samples, key), f"samples.{key} does nothing: a model of {objective} writes no text")
    clash(
        changed(data, "max_unlearnable") and (loss.fits_rows or loss.head != "lm"),
        f"data.max_unlearnable does nothing: there is something to learn in every row of {objective}",
    )
    for key, drawn in (
        (f"adaptation.{traits.dropout}", dropout),
        ("train.neftune_noise_alpha", train.neftune_noise_alpha),
    ):
        clash(
            loss.deterministic and drawn,
            f"{key}: {objective} compares what the weights say, and nothing may be drawn in it. Leave it out",
        )
    learns = f"{objective} learns from {', '.join(row.__name__ for row in rows)} rows"
    clash(data.template and Chat not in rows and not loss.fits_rows, f"data.template does nothing: {learns}")
    sources = {f"data.train.{place}": source for place, source in enumerate(data.train)}
    sources |= {f"data.eval.sets.{name}": source for name, source in (data.eval.sets or {}).items()}
    for place, source in sources.items():
        for key in source.unused_keys():
            clash(
                True,
                f"{place}.{key} does nothing: {source.path} is no data set of the Hub (path: hub:OWNER/NAME)",
            )
        clash(source.separator and Labelled not in rows, f"{place}.separator does nothing: {learns}")
        for key in loss.single_label_keys:
            clash(
                source.separator and getattr(recipe.objective, key),
                f"{place}.separator stands between several labels; objective.{key} goes with one. Leave out one of the two",
            )
    clash(
        not data.cache and any(source.streaming for source in sources.values()),
        "data.cache=false: a stream is read once and kept encoded, so that a run can be resumed. Leave out one of the two",
    )
    given = [key for key in ("path", "sets", "fraction") if changed(data.eval, key)]
    clash(len(given) > 1, f"set {' or '.join(f'data.eval.{key}' for key in given)}, not both")
    clash(
        data.eval.limit and data.eval.sets,
        "data.eval.limit does nothing beside data.eval.sets: give each set its own limit",
    )
    for name, source in (data.eval.sets or {}).items():
        clash(
            changed(source, "weight"),
            f"data.eval.sets.{name}.weight does nothing: every held-out row is read once",
        )
    clash(
        data.eval.limit and not held_out,
        "data.eval.limit does nothing: no row is held out (data.eval.fraction is 0)",
    )
    clash(
        train.early_stopping_patience and not held_out,
        "train.early_stopping_patience needs held-out rows: give data.eval.fraction, data.eval.path or data.eval.sets",
    )
    clash(
        train.eval_steps not in (None, "epoch") and not held_out,
        "train.eval_steps does nothing: no row is held out (data.eval.fraction is 0)",
    )
    clash(
        train.early_stopping_threshold and not train.early_stopping_patience,
        "train.early_stopping_threshold does nothing without train.early_stopping_patience",
    )
    clash(
        train.max_steps and changed(train, "epochs"),
        "set train.max_steps or train.epochs, not both; train.epochs=1 beside max_steps takes back what the recipe says",
    )
    clash(
        train.scheduler_name == "constant" and (train.warmup_ratio or train.warmup_steps),
        "train.lr_scheduler_type: constant has no warm-up; use constant_with_warmup",
    )
    for key in ("dampening", "nesterov"):
        clash(
            train.optim_name == "sgd" and train.optim_args.get(key) and not train.optim_args.get("momentum"),
            f"train.optim.{key} does nothing without train.optim.momentum",
        )
    clash(samples.prompts and changed(samples, "count"), "set samples.prompts or samples.count, not both")
    clash(
        samples.count == 0 and not samples.prompts and changed(samples, "max_new_tokens"),
        "samples.max_new_tokens does nothing: samples.count is 0",
    )
    return found
