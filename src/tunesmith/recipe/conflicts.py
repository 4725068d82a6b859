"""Choices of a recipe that contradict each other, and keys that would do nothing: tables of rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from tunesmith import adaptations, objectives, user_functions
from tunesmith.data.data_config import DataConfig, Source
from tunesmith.data.read.source import eval_sources
from tunesmith.data.rows import Chat, Labelled, Text
from tunesmith.recipe.schema import Recipe, changed
from tunesmith.suggestions import did_you_mean
from tunesmith.train.train_config import SampleConfig, TrainConfig

Rule = tuple[object, str]
"""(condition of the conflict, message)."""


ALTERNATIVES = (
    ("train.max_steps", "train.epochs"),
    ("train.warmup_ratio", "train.warmup_steps"),
    ("data.eval.path", "data.eval.sets", "data.eval.fraction"),
    ("samples.prompts", "samples.count"),
)
"""Keys that set the same thing in different ways: at most one of each group may be set."""


def conflicts(recipe: Recipe) -> list[str]:
    """Messages of all conflicts in the recipe. A key at its default value never conflicts."""
    data = recipe.data
    sources = {f"data.train.{index}": source for index, source in enumerate(data.train)}
    sources |= {f"data.eval.sets.{name}": source for name, source in (data.eval.sets or {}).items()}
    holds_out = bool(eval_sources(data)) or data.eval.fraction > 0
    # fmt: off
    rules = [
        *((len(given) > 1, f"set {' or '.join(given)}, not both")
          for given in ([key for key in group if _is_set(recipe, key)] for group in ALTERNATIVES)),
        *_model_rules(recipe),
        *_objective_rules(recipe, sources),
        *_data_rules(data, sources, holds_out),
        *_train_rules(recipe.train, holds_out),
        *_answer_rules(recipe, sources, holds_out),
        *_figure_rules(recipe, holds_out),
        *_sample_rules(recipe.samples),
    ]
    # fmt: on
    return [message for broken, message in rules if broken]


def _is_set(recipe: Recipe, key: str) -> bool:
    *parts, name = key.split(".")
    config: BaseModel = recipe
    for part in parts:
        config = dict(config)[part]
    return changed(config, name)


def _dropout(recipe: Recipe) -> tuple[str, object]:
    """(key of the adaptation's dropout, its value)."""
    key = adaptations.module(adaptations.name_of(recipe.adaptation)).Adaptation.traits.dropout
    return f"adaptation.{key}", dict(recipe.adaptation).get(key)


# fmt: off
def _model_rules(recipe: Recipe) -> list[Rule]:
    (dropout_key, dropout), compiled = _dropout(recipe), recipe.train.torch_compile
    return [
        (recipe.add_tokens and recipe.adapter == "continue",
         "add_tokens: adapter: continue keeps the adapter's vocabulary. Use adapter: merge, which can add new tokens"),
        (recipe.device_map is not None and recipe.adapter,
         "device_map: peft moves the layers when it attaches an adapter. Merge the adapter first: tunesmith merge"),
        (recipe.device_map is not None and compiled,
         "device_map: the hooks that move batches to its layers cannot be compiled. Leave out one of the two"),
        (compiled and dropout,
         f"{dropout_key}: the host draws it for each row, which is impossible in a layer compiled by train.torch_compile. "
         "Leave out one of the two"),
        (recipe.trust_remote_code and recipe.add_tokens,
         "add_tokens: only the model's own code knows how its vocabulary grows (trust_remote_code). Leave out one of the two"),
    ]


def _objective_rules(recipe: Recipe, sources: Mapping[str, Source]) -> list[Rule]:
    name = objectives.name_of(recipe.objective)
    traits: objectives.Traits = objectives.module(name).Objective.traits
    writes_text = traits.head == "lm"
    learns = f"{name} learns from {', '.join(row.__name__ for row in traits.rows)} rows"
    adaptation = adaptations.name_of(recipe.adaptation)
    freezes_body = adaptations.module(adaptation).Adaptation.traits.freezes_body
    random_keys = (_dropout(recipe), ("train.neftune_noise_alpha", recipe.train.neftune_noise_alpha))
    return [
        *((changed(recipe.samples, key) and not writes_text,
           f"samples.{key} does nothing: a model of {name} writes no text")
          for key in ("prompts", "count", "max_new_tokens")),
        (changed(recipe.data, "max_unlearnable") and (traits.fits_rows or not writes_text),
         f"data.max_unlearnable does nothing: every row of {name} has something to learn"),
        (traits.value_head and freezes_body,
         f"adaptation: {adaptation} freezes the body, and the value model of {name} is one layer on its hidden states, which "
         "must learn with it. Set adaptation: lora, or an objective without a value model, such as grpo"),
        *((traits.deterministic and value,
           f"{key}: {name} compares log-probabilities or rewards, which must depend on the weights alone. Leave it out")
          for key, value in random_keys),
        *((changed(recipe.data, key) and Chat not in traits.rows and not traits.fits_rows,
           f"data.{key} does nothing: {learns}")
          for key in ("template", "template_kwargs", "special_tokens")),
        *((source.separator and Labelled not in traits.rows, f"{place}.separator does nothing: {learns}")
          for place, source in sources.items()),
        *((source.separator and dict(recipe.objective)[key],
           f"{place}.separator separates several labels, and objective.{key} applies to one. Leave out one of the two")
          for place, source in sources.items() for key in traits.single_label_keys),
    ]


def _data_rules(data: DataConfig, sources: Mapping[str, Source], holds_out: bool) -> list[Rule]:
    held_out = data.eval
    return [
        *((True, f"{place}.{key} does nothing: {source.path} is no data set of the Hub (path: hub:OWNER/NAME)")
          for place, source in sources.items() for key in source.unused_keys()),
        (not data.cache and any(source.streaming for source in sources.values()),
         "data.cache=false: a stream is read once and kept encoded, so that a run can be resumed. Leave out one of the two"),
        (held_out.limit and held_out.sets,
         "data.eval.limit does nothing next to data.eval.sets: give each set its own limit"),
        *((changed(source, "weight"), f"data.eval.sets.{name}.weight does nothing: every held-out row is read once")
          for name, source in (held_out.sets or {}).items()),
        (held_out.limit and not holds_out,
         "data.eval.limit does nothing: no row is held out (data.eval.fraction is 0)"),
    ]


def _answer_rules(recipe: Recipe, sources: Mapping[str, Source], holds_out: bool) -> list[Rule]:
    name, held_out = objectives.name_of(recipe.objective), recipe.data.eval
    traits: objectives.Traits = objectives.module(name).Objective.traits
    key = "task" if recipe.task and not held_out.generate else "data.eval.generate"
    asked = held_out.generate or recipe.task
    streamed = any(source.streaming for source in (eval_sources(recipe.data) or sources).values())
    return [
        (asked and traits.head != "lm", f"{key}: a model of {name} writes no text. Leave it out"),
        (asked and traits.rows == (Text,), f"{key}: {name} learns from documents, which have no prompts to answer. Leave it out"),
        (asked and not holds_out, f"{key} does nothing: no row is held out (data.eval.fraction is 0)"),
        (asked and streamed, f"{key}: a stream is read once, and its prompts would be read again. Set streaming: false"),
        *((True, message) for message in _unknown_metrics(recipe.answer_metrics)),
    ]


def _unknown_metrics(names: Sequence[str]) -> list[str]:
    """Return a message for each name of a metric that is unknown, or a function's path that is none."""
    if not names:
        return []
    from tunesmith.metrics import answer_metrics, python_metric  # they load SciPy

    known = answer_metrics.table()
    found: list[str] = []
    for name in names:
        try:
            user_functions.check_path(name if ":" in name else "m:f", python_metric.EXAMPLE)
        except ValueError as error:
            found.append(f"data.eval.generate.metrics: {error}")
        if ":" not in name and name not in known:
            found.append(f"data.eval.generate.metrics: there is no metric {name!r}. {did_you_mean(name, known)}")
    return found


def _figure_rules(recipe: Recipe, holds_out: bool) -> list[Rule]:
    name, figure = objectives.name_of(recipe.objective), recipe.train.best_figure
    answered = [f"eval_answer_{one.rpartition(':')[2]}" for one in recipe.answer_metrics]
    reported = (*objectives.module(name).Objective.traits.figures, *answered)
    of_sets = [f"eval_{one}_{key.removeprefix('eval_')}" for one in recipe.data.eval.sets or () for key in reported
               if key not in answered]
    valid = [key.removeprefix("eval_") for key in (*reported, *of_sets)]
    if _unknown_metrics(recipe.answer_metrics):  # reported; the name of the figure is wrong in the same way
        return []
    return [
        (figure and not holds_out, "train.metric_for_best_model does nothing: no row is held out (data.eval.fraction is 0)"),
        (figure and figure not in (*reported, *of_sets),
         f"train.metric_for_best_model: {name} reports no figure {recipe.train.metric_for_best_model!r} that can choose a "
         f"model. {did_you_mean((figure or '').removeprefix('eval_'), valid)}"),
    ]


def _train_rules(train: TrainConfig, holds_out: bool) -> list[Rule]:
    has_momentum = train.optim_name != "sgd" or train.optim_args.get("momentum")
    return [
        (train.early_stopping_patience and not holds_out,
         "train.early_stopping_patience needs held-out rows: give data.eval.fraction, data.eval.path or data.eval.sets"),
        (train.eval_steps not in (None, "epoch") and not holds_out,
         "train.eval_steps does nothing: no row is held out (data.eval.fraction is 0)"),
        (train.early_stopping_threshold and not train.early_stopping_patience,
         "train.early_stopping_threshold does nothing without train.early_stopping_patience"),
        (train.scheduler_name == "constant" and (train.warmup_ratio or train.warmup_steps),
         "train.lr_scheduler_type: constant has no warm-up; use constant_with_warmup"),
        *((train.optim_args.get(key) and not has_momentum, f"train.optim.{key} does nothing without train.optim.momentum")
          for key in ("dampening", "nesterov")),
    ]


def _sample_rules(samples: SampleConfig) -> list[Rule]:
    return [
        (samples.count == 0 and not samples.prompts and changed(samples, "max_new_tokens"),
         "samples.max_new_tokens does nothing: samples.count is 0"),
    ]
# fmt: on
