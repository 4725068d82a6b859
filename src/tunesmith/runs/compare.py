"""Runs over each other: what differs between their recipes, whether their losses may be compared, and those losses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tunesmith import recipe as recipes
from tunesmith.errors import UserError
from tunesmith.runs.figure_format import is_number, shorter
from tunesmith.runs.run_list import Kept

Points = list[tuple[float, float]]
"""(step or tokens, value)."""
_LABEL = 60
"""Characters of a run in the legend, at most."""


def differences(runs: Sequence[Kept]) -> dict[str, list[Any]]:
    """Dotted recipe key -> its value in each run, for the keys that are not the same in all.

    A source is a key for each of its keys (``data.train.0.path``). A key that some runs lack (another objective has other keys)
    and that is at its default in the others is left out.
    """
    flat = [_flat(run.recipe) for run in runs]
    defaults = [_at_default(run) for run in runs]
    found = {}
    for key in dict.fromkeys(key for one in flat for key in one):
        values = [one.get(key) for one in flat]
        is_idle = any(key not in one for one in flat) and all(
            key in idle for one, idle in zip(flat, defaults, strict=True) if key in one
        )
        if len(set(map(repr, values))) > 1 and not is_idle:
            found[key] = values
    return found


def cautions(runs: Sequence[Kept]) -> list[str]:
    """Why the held-out losses of these runs must not be compared, if they must not."""

    def unlike(values: list[Any]) -> bool:
        return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1

    data = [run.manifest.get("data") or {} for run in runs]
    held = []
    for run, part in zip(runs, data, strict=True):
        hashes = [one.get("sha256") for one in part.get("sources", ())]
        held.append((hashes, (part.get("eval") or {}).get("rows"), run.recipe.get("data", {}).get("eval")))
    checks = (
        ([(run.recipe.get("objective") or {}) for run in runs], "they have other objectives"),
        (held, "they were not evaluated on the same rows"),
        ([part.get("template") for part in data], "their rows were written by other templates"),
        (
            [run.recipe.get("model") for run in runs],
            "they start from other models (a loss per token depends on the tokenizer)",
        ),
    )
    return [f"the losses are not comparable: {why}" for values, why in checks if unlike(values)]


def losses(runs: Sequence[Kept], by: str = "step") -> list[tuple[str, Points, Points]]:
    """(label, training loss, held-out loss) of each run over ``by``, which is step or tokens."""
    return [
        (label, _points(run, "train", "loss", by), _points(run, "eval", "eval_loss", by))
        for run, label in zip(runs, labels(runs), strict=True)
    ]


def labels(runs: Sequence[Kept]) -> list[str]:
    """Each run's folder name, with at most three of the keys that tell it from the others, in 60 characters.

    Sources are told by the names of their files, another list by its key alone; what does not fit is left out.
    """
    unlike = differences(runs)
    sources = [key for key in unlike if key.startswith("data.train.")]
    told: list[list[str]] = [_files(runs)] if sources else []
    scalars_first = sorted(
        unlike.items(), key=lambda one: any(isinstance(value, list | dict) for value in one[1])
    )
    for key, values in scalars_first:
        if key not in sources:
            name = key.rpartition(".")[2]
            told.append(
                [
                    name if isinstance(value, list | dict) else _told(name, value)
                    for value in shortened(values)
                ]
            )
    found = []
    for place, name in enumerate(names(runs)):
        keys = [one[place] for one in told[:3] if one[place]]
        tries = [f"{name} ({', '.join(keys[:count])})" for count in range(len(keys), 0, -1)]
        found.append(next((one for one in tries if len(one) <= _LABEL), shorter(name, _LABEL)))
    return found


def names(runs: Sequence[Kept]) -> list[str]:
    """The folder's name of each run; with as much of its path as tells it from the others."""
    return shortened([str(run.path.resolve()) for run in runs])


def shortened(values: Sequence[Any]) -> list[Any]:
    """Paths by the last of their parts, as few as tell them apart; whatever is no path as it is."""
    is_path = [isinstance(value, str) and "/" in value and " " not in value for value in values]
    paths = {value: Path(value).parts for value, yes in zip(values, is_path, strict=True) if yes}
    if not paths:
        return list(values)
    for count in range(1, max(map(len, paths.values())) + 1):
        short = {path: "/".join(parts[-count:]) for path, parts in paths.items()}
        if len(set(short.values())) == len(paths):
            break
    return [short[value] if yes else value for value, yes in zip(values, is_path, strict=True)]


def _told(name: str, value: Any) -> str:
    """``r 8``; empty where the run has no such key."""
    return "" if value is None else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _files(runs: Sequence[Kept]) -> list[str]:
    """``data a.jsonl + b.jsonl`` of each run."""
    sources = [[one.get("path") for one in (run.recipe.get("data") or {}).get("train") or ()] for run in runs]
    short = iter(shortened([path for one in sources for path in one]))
    return [shorter("data " + " + ".join(str(next(short)) for _ in one), 36) for one in sources]


def _points(run: Kept, kind: str, figure: str, by: str) -> Points:
    """(step or tokens, value) of every finite figure; an evaluation stands at the tokens of the training before it."""
    found, tokens = [], 0
    for record in run.records:
        tokens = record.get("tokens", tokens)
        at = record.get("step") if by == "step" else tokens
        if record.get("kind") == kind and is_number(record.get(figure)) and is_number(at):
            found.append((float(at), float(record[figure])))
    return [(at, value) for at, value in found if math.isfinite(value)]


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, as one with dotted keys."""
    if isinstance(tree, list) and tree and all(isinstance(one, dict) for one in tree):
        tree = {str(place): one for place, one in enumerate(tree)}
    if not isinstance(tree, dict) or not tree:
        return {key: tree}
    flat: dict[str, Any] = {}
    for part, child in tree.items():
        flat |= _flat(child, f"{key}.{part}" if key else str(part))
    return flat


def _at_default(run: Kept) -> set[str]:
    """The dotted keys of the run's recipe that are at their defaults; none where this version does not know the recipe."""
    try:
        chosen = recipes.parse(run.recipe, where=str(run.path / "recipe.yaml"))
    except UserError:
        return set()
    return set(_defaults(chosen, ""))


def _defaults(config: BaseModel, before: str) -> list[str]:
    found: list[str] = []
    for name in type(config).model_fields:
        value, key = getattr(config, name), f"{before}{name}"
        if isinstance(value, BaseModel):
            found += _defaults(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, BaseModel) for one in value):
            found += [inner for place, one in enumerate(value) for inner in _defaults(one, f"{key}.{place}.")]
        elif not recipes.changed(config, name):
            found.append(key)
    return found
