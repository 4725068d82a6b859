"""Begin a run: claim its folder, choose the checkpoint to resume, return the result of a finished run."""

from __future__ import annotations

from pathlib import Path

from tunesmith.json_types import JsonObject
from tunesmith.recipe import Recipe
from tunesmith.report import run_page
from tunesmith.runs import run_folder as run_folders
from tunesmith.runs.progress import Progress
from tunesmith.runs.run_folder import RunFolder, Start
from tunesmith.train import checkpoint, distributed, setup
from tunesmith.train.starting_point import StartingPoint


def claim(
    recipe: Recipe | JsonObject | str | Path,
    out: str | Path | RunFolder | None,
    start: Start,
    main: bool,
) -> RunFolder:
    """Return the run folder, locked by the main process."""
    if isinstance(out, RunFolder):
        return out
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "run"
    target = Path(out or Path("runs") / name).resolve()
    return run_folders.claim(target, start) if main else RunFolder(target, start=start)


def choose(run_folder: RunFolder, recipe: Recipe, progress: Progress) -> tuple[int | None, list[str]]:
    """Return the step of the checkpoint to continue from (None = step 0) and the recipe keys that changed.

    Raises RecipeError if a key changed that must not change. Raises UserError if there is no good checkpoint
    and a start from step 0 would overwrite results.
    """
    if run_folder.start != "resume":
        return None, []
    changed_keys = run_folders.check_recipe(run_folder.path, recipe.resolved())
    step, damaged = checkpoint.newest(run_folder.checkpoints)
    if step is None:
        run_folders.check_nothing_lost(run_folder, damaged)
        progress.note("the run was stopped before it saved a checkpoint: it starts again from step 0")
    for bad, damage in damaged.items():
        path = run_folder.checkpoints / f"step-{bad}"
        progress.note(f"the checkpoint {path} is damaged ({damage}); the one before it is used")
    return step, changed_keys


def finished_result(
    run_folder: RunFolder,
    ready: setup.Setup,
    started_with: StartingPoint,
    step: int | None,
    progress: Progress,
) -> JsonObject | None:
    """Return the result of a run that is finished at the checkpoint of ``step``; None if steps are left.

    Raises RecipeError if the data or the base model changed since the run started.
    """
    if step is None:
        return None
    state = checkpoint.load_state(run_folder.checkpoints, step)
    started_with.check_same(state)
    result: JsonObject | None = run_folder.manifest().get("result")
    if step < ready.source.plan.steps or not result:
        return None
    progress.note(
        "the run is finished already: there are no steps left to train, and its files stay unchanged. "
        + run_folders.train_further(run_folder.path)
    )
    if distributed.state().is_main_process:
        run_folder.recover()
        if not run_page.is_current(run_folder.path):  # a kill or a full disk prevented the report
            run_page.write_report(run_folder.path)
    return result
