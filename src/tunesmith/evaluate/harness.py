"""The bridge to lm-evaluation-harness: its tasks on a model that tunesmith loaded.

The harness gets the loaded network and tokenizer as they are. An adapter stays attached, and its base is not loaded
a second time. Data sets are read offline: those of a task's ``data_files``, or of the Hub's local cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import MissingExtra, UserError
from tunesmith.evaluate.trained_reading import ModelArgument
from tunesmith.json_types import JsonObject
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.generate import decode
from tunesmith.models.load.compute_dtype import ComputeDtype, cast_and_move
from tunesmith.models.load.load import load, quiet
from tunesmith.models.network import base, first_position
from tunesmith.suggestions import closest
from tunesmith.train.meta_model import window_of

if TYPE_CHECKING:
    from tunesmith.models.generate.decode import Loaded

TASK_FILE = ".yaml"
SUGGESTED = 3
"""Names of tasks that an error suggests; the harness has thousands."""


def evaluate_harness(
    model: ModelArgument,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    precision: str = "auto",
    batch_size: int = 8,
    on_precision: Callable[[ComputeDtype], None] = lambda chosen: None,
) -> JsonObject:
    """Return the figures of ``tasks``, names of the harness or paths of task files, by task.

    ``folder``: holds further task files. ``limit``: rows of each task. A figure has ``value`` and, if the harness
    computes it, ``stderr``. Raises UserError for an unknown task, data that are not on this machine, and a model
    that writes no text; MissingExtra without the package.
    """
    harness, language_model, manager_class = _packages()
    own = all(
        name.endswith(TASK_FILE) for name in tasks
    )  # to find the harness's thousands of tasks takes half a minute
    manager = manager_class(include_path=None if folder is None else str(folder), include_defaults=not own)
    chosen = [_checked(name, manager.all_tasks) for name in tasks]
    loaded = load(model) if not isinstance(model, tuple) else model
    decode.check_writes(loaded[0])
    if not isinstance(model, tuple):
        on_precision(cast_and_move(loaded[0], precision))
    opened = _open(language_model, loaded, batch_size)
    try:
        found = harness(opened, tasks=chosen, task_manager=manager, limit=limit, log_samples=False)
    except OSError as error:  # a data set of the Hub that is not in its local cache
        raise UserError(
            f"--harness {','.join(tasks)}: the data of a task are not on this machine ({error}).\n"
            "  Name files of yours in the task file: dataset_path: json, dataset_kwargs: {data_files: FILE}"
        ) from None
    return {"tasks": {name: _figures(name, found) for name in found["results"]}}


def _packages() -> tuple[Any, Any, Any]:
    """Return ``simple_evaluate``, ``HFLM`` and ``TaskManager`` of lm_eval, after the Hub's client is set offline."""
    quiet()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is not a name
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise MissingExtra("lm-eval", "harness", "--harness") from None
    return simple_evaluate, HFLM, TaskManager


def _checked(name: str, known: Sequence[str]) -> str:
    if name.endswith(TASK_FILE):
        if not Path(name).is_file():
            raise UserError(
                f"--harness {name}: there is no such file. Name a task file, or a task of the harness."
            )
        return name
    if name not in known:
        nearest = " or ".join(f"`{one}`" for one in closest(name, known)[:SUGGESTED])
        raise UserError(
            f"--harness: lm-evaluation-harness has no task {name!r}.{f' Did you mean {nearest}?' if nearest else ''}\n"
            "  A task of yours is a .yaml file: --harness my_task.yaml"
        )
    return name


def _open(language_model: Any, loaded: Loaded, batch_size: int) -> Any:
    network, tokenizer = loaded
    ahead = virtual_tokens.count(network) + first_position(base(network))
    window = window_of(base(network).config, ahead)
    return language_model(
        pretrained=network, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=window
    )


def _figures(task: str, found: JsonObject) -> JsonObject:
    """Return the figures of a task; the harness calls them ``acc,none`` and ``acc_stderr,none``."""
    results: JsonObject = found["results"][task]
    figures: JsonObject = {}
    for key, value in results.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        shown = name if chosen == "none" else f"{name} ({chosen})"
        stderr = results.get(f"{name}_stderr,{chosen}")
        figures[shown] = {
            "value": float(value),
            **({"stderr": float(stderr)} if isinstance(stderr, float) else {}),
        }
    rows = (found.get("n-samples") or {}).get(task) or {}
    return {"rows": rows.get("effective"), "figures": figures}
