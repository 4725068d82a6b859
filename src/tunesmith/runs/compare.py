"""Comparison of runs: recipe keys that differ, whether losses are comparable, and the curves to overlay."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from tunesmith import recipe as recipes
from tunesmith.errors import UserError
from tunesmith.runs.figure_format import is_number, shorten_middle
from tunesmith.runs.run_folder import flatten
from tunesmith.runs.run_list import StoredRun

Points = list[tuple[float, float]]
"""(step or tokens, value)."""
_MOST_LABEL, _MOST_SOURCES = 60, 36
"""Characters of a run's label in the legend, and of the file names in it."""


def differences(runs: Sequence[StoredRun]) -> dict[str, list[object]]:
    """Return dotted recipe key -> its value in each run, for the keys whose values differ.

    The keys of a data source are separate (``data.train.0.path``). A key is left out if some runs lack it (it
    belongs to another objective) and it has its default value in the others.
    """
    recipe_keys = [flatten(run.recipe) for run in runs]
    default_keys = [_keys_at_default(run) for run in runs]
    found = {}
    for key in dict.fromkeys(key for keys in recipe_keys for key in keys):
        values = [keys.get(key) for keys in recipe_keys]
        has_key = [key in keys for keys in recipe_keys]
        is_default = all(key in defaults for defaults, has in zip(default_keys, has_key, strict=True) if has)
        if len(set(map(repr, values))) > 1 and (all(has_key) or not is_default):
            found[key] = values
    return found


def cautions(runs: Sequence[StoredRun]) -> list[str]:
    """Return every reason why the held-out losses of these runs are not comparable."""

    def differ(values: Sequence[object]) -> bool:
        return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1

    data = [run.manifest.get("data") or {} for run in runs]
    hashes = [[source.get("sha256") for source in part.get("sources", ())] for part in data]
    rows = [(part.get("eval") or {}).get("rows") for part in data]
    evals = [run.recipe.get("data", {}).get("eval") for run in runs]
    models = [run.recipe.get("model") for run in runs]
    checks = (
        ([run.recipe.get("objective") or {} for run in runs], "the objectives differ"),
        (list(zip(hashes, rows, evals)), "the evaluation rows differ"),
        ([part.get("template") for part in data], "the chat templates differ"),
        (models, "the base models differ (a loss per token depends on the tokenizer)"),
    )
    return [f"the losses are not comparable: {reason}" for values, reason in checks if differ(values)]


def losses(runs: Sequence[StoredRun], by: str = "step") -> list[tuple[str, Points, Points]]:
    """Return (label, training loss, held-out loss) of each run over ``by``: step or tokens."""
    training = [_points(run, "train", "loss", by) for run in runs]
    held_out = [_points(run, "eval", "eval_loss", by) for run in runs]
    return list(zip(labels(runs), training, held_out, strict=True))


def labels(runs: Sequence[StoredRun]) -> list[str]:
    """Return each run's folder name and at most three keys that differ, in 60 characters.

    Sources appear as the names of their files, another list as its key alone. Keys that do not fit are left
    out.
    """
    different = differences(runs)
    sources = [key for key in different if key.startswith("data.train.")]
    columns = [_source_names(runs)] if sources else []
    has_list = {key: any(isinstance(one, list | dict) for one in values) for key, values in different.items()}
    for key, values in sorted(different.items(), key=lambda item: has_list[item[0]]):
        if key not in sources:
            columns.append([_label(key.rpartition(".")[2], value) for value in shorten_paths(values)])
    found = []
    for index, name in enumerate(names(runs)):
        keys = [column[index] for column in columns[:3] if column[index]]
        candidates = (f"{name} ({', '.join(keys[:count])})" for count in range(len(keys), 0, -1))
        short = shorten_middle(name, _MOST_LABEL)
        found.append(next((label for label in candidates if len(label) <= _MOST_LABEL), short))
    return found


def names(runs: Sequence[StoredRun]) -> list[str]:
    """Return the folder name of each run, with as many parent folders as make the names differ."""
    return [str(path) for path in shorten_paths([str(run.path.resolve()) for run in runs])]


def shorten_paths(values: Sequence[object]) -> list[object]:
    """Shorten paths to as many of their last parts as make them differ; other values stay."""
    texts = [value for value in values if isinstance(value, str)]
    paths = {text: Path(text).parts for text in texts if "/" in text and " " not in text}
    short: dict[object, str] = {}
    for count in range(1, max(map(len, paths.values()), default=0) + 1):
        short = {path: "/".join(parts[-count:]) for path, parts in paths.items()}
        if len(set(short.values())) == len(paths):
            break
    return [short.get(value, value) if isinstance(value, str) else value for value in values]


def _label(name: str, value: object) -> str:
    """``r 8``; the name alone for a list or mapping; empty if the run has no such key."""
    if isinstance(value, list | dict):
        return name
    return "" if value is None else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _source_names(runs: Sequence[StoredRun]) -> list[str]:
    """``data a.jsonl + b.jsonl`` of each run."""
    sources = [[one.get("path") for one in (run.recipe.get("data") or {}).get("train") or ()] for run in runs]
    short = iter(shorten_paths([path for paths in sources for path in paths]))
    joined = ("data " + " + ".join(str(next(short)) for _ in paths) for paths in sources)
    return [shorten_middle(text, _MOST_SOURCES) for text in joined]


def _points(run: StoredRun, kind: str, figure: str, by: str) -> Points:
    """Return (step or tokens, value) of every finite figure. An evaluation has the tokens trained before it."""
    found, tokens = [], 0
    for record in run.records:
        tokens = record.get("tokens", tokens)
        at = record.get("step") if by == "step" else tokens
        if record.get("kind") == kind and is_number(record.get(figure)) and is_number(at):
            found.append((float(at), float(record[figure])))
    return [(at, value) for at, value in found if math.isfinite(value)]


def _keys_at_default(run: StoredRun) -> set[str]:
    """Return the dotted recipe keys at their defaults; none if this version cannot read the recipe."""
    try:
        recipe = recipes.parse(run.recipe, where=str(run.path / "recipe.yaml"))
    except UserError:
        return set()
    return set(_default_keys(recipe, ""))


def _default_keys(config: BaseModel, prefix: str) -> Iterator[str]:
    for name, value in config:
        key = f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from _default_keys(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, BaseModel) for one in value):
            for index, one in enumerate(value):
                yield from _default_keys(one, f"{key}.{index}.")
        elif not recipes.changed(config, name):
            yield key
