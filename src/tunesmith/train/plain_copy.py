"""A second copy of what a run made, for programs that know transformers alone: where an adapter is not enough for them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith import files
from tunesmith.errors import TunesmithError
from tunesmith.merge import merge_adapter as merging
from tunesmith.models.find.locate import locate
from tunesmith.models.load import load
from tunesmith.models.network import base
from tunesmith.train import machine
from tunesmith.train.run_state import Run

NAME = "merged"
NEEDED = 12
"""Bytes of memory for each number of a network while an adapter is folded in: fp32, for a moment twice, and read once more."""


def copy(run: Run) -> str | None:
    """The folder ``merged`` of a run: its adapter folded into the base, where transformers' own class cannot open the adapter.

    None where it can, and where there is no such copy; the run says which and why. It costs nothing that is already saved.
    """
    target = run.folder.path / NAME
    shutil.rmtree(target, ignore_errors=True)  # of an earlier attempt
    if not (run.folder.model / "adapter_config.json").exists():
        return None
    reason = load.stock_class_problem(base(run.model), run.setup.model_folder)
    if reason is None:
        return None
    say = run.progress.note
    alone = f"plain transformers cannot open the adapter in {run.folder.model.name}/ ({reason})"
    try:
        load.check_mergeable(load.adapter_config(run.folder.model))
        numbers = run.setup.outline.total
        free = machine.available_memory_bytes()
        if NEEDED * numbers > free:
            say(
                f"{alone}; memory does not suffice to fold it in. Type: tunesmith merge {run.folder.model} --out NEW_FOLDER"
            )
            return None
        folded = merging.fold(locate(run.folder.model, run.setup.model_folder.remote_code))
        files.publish_folder(target, partial(_fill, folded), 4 * numbers)
    except TunesmithError as error:
        say(
            f"{alone}, and there is no merged copy: {str(error).splitlines()[0]} `tunesmith predict` opens it."
        )
        return None
    say(f"{alone}: a copy with the adapter folded in is in {NAME}/")
    return str(target)


def _fill(folded: Any, made: Path) -> None:
    merging.write(folded, made)
