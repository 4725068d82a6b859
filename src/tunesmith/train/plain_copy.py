"""``merged/``: the model with its adapter merged, where transformers' class cannot open the adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

from tunesmith import files, machine
from tunesmith.errors import TunesmithError
from tunesmith.merge import merge_adapter
from tunesmith.models.find.locate import locate
from tunesmith.models.load import load, merge_weights
from tunesmith.models.network import base
from tunesmith.train.run_state import Run

NAME = "merged"
BYTES_PER_PARAMETER = 12
"""Memory needed while an adapter is merged: fp32, for a moment twice, and loaded once more for the check."""


def copy(run: Run) -> str | None:
    """Write ``merged/`` into the run folder and return its path.

    Returns None where it is not needed, and where it cannot be made, with a note.
    """
    target = run.folder.path / NAME
    shutil.rmtree(target, ignore_errors=True)  # of an earlier attempt
    if not (run.folder.model / "adapter_config.json").exists():
        return None
    reason = load.stock_class_problem(base(run.model), run.setup.model_folder)
    if reason is None:
        return None
    note, model = run.progress.note, run.folder.model
    problem = f"plain transformers cannot open the adapter in {model.name}/ ({reason})"
    try:
        merge_weights.check_mergeable(load.adapter_config(model))
        parameters = run.setup.outline.total
        if BYTES_PER_PARAMETER * parameters > machine.available_memory_bytes():
            note(
                f"{problem}; there is too little memory to merge it. Type: tunesmith merge {model} --out NEW_FOLDER"
            )
            return None
        merged = merge_adapter.fold(locate(model, run.setup.model_folder.remote_code))

        def write(folder: Path) -> None:
            merge_adapter.write(merged, folder)

        files.publish_folder(target, write, 4 * parameters)
    except TunesmithError as error:
        first_line = str(error).splitlines()[0]
        note(f"{problem}, and there is no merged copy: {first_line} `tunesmith predict` opens the adapter.")
        return None
    note(f"{problem}: a copy with the adapter merged is in {NAME}/")
    return str(target)
