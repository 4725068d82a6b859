"""The run folder: who may write to it, what lies in it, and what a resumed run finds there.

runs/NAME/  recipe.yaml  manifest.json  metrics.jsonl  samples.jsonl  checkpoints/step-N/  model/  report.html
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tunesmith import files
from tunesmith.errors import RecipeError, UserError
from tunesmith.recipe import text as recipe_text


@dataclass
class RunFolder:
    path: Path
    lock: IO[str] | None = None

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def manifest(self) -> dict[str, Any]:
        """What is recorded of the run so far; empty when nothing is."""
        file = self.path / "manifest.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def record(self, **facts: Any) -> None:
        """Add facts to manifest.json, which is replaced in one piece."""
        content = {**self.manifest(), **facts}
        files.replace_file(
            self.path / "manifest.json",
            json.dumps(content, indent=1, ensure_ascii=False, default=str).encode(),
        )

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def check_free(path: Path) -> None:
    """Raise UserError when ``path`` already holds something a new run would overwrite."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; expected a new folder for the run. Choose another with --out.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"the run folder {path} exists already.\n  Go on with it: --resume. Start another: --out DIR."
        )


FREE = {
    "data.cache",
    "train.gradient_checkpointing",
    "train.micro_batch_tokens",
    "train.report_to",
    "train.save_steps",
    "train.save_total_limit",
}
"""Keys that change no result: a run that did not fit may go on with others."""


def check_resumable(path: Path, recipe: dict[str, Any]) -> list[str]:
    """Raise UserError unless ``path`` holds a run, RecipeError unless it is a run of this very recipe, but for keys of ``FREE``.

    Returns those of them that differ.
    """
    file = path / "recipe.yaml"
    if not file.is_file():
        raise UserError(
            f"there is no run to resume in {path} (it has no recipe.yaml). Leave out --resume to start one."
        )
    before = recipe_text.read(file.read_text(encoding="utf-8"), str(file))[0]
    found = _changes(before, recipe)
    free = {key for key, _, _ in found for one in FREE if key == one or key.startswith(f"{one}.")}
    changes = [f"{key}: was {old!r}, is {new!r}" for key, old, new in found if key not in free]
    if changes:
        raise RecipeError(
            f"the recipe is not the one that {path} was started with, so going on would not be the same run:\n  "
            + "\n  ".join(changes)
            + "\n  Put these keys back, or start another run with --out DIR."
        )
    return sorted(free)


def take(path: Path, recipe: dict[str, Any]) -> RunFolder:
    """Create or reopen the folder and hold it, so that no second process writes to it. Raises UserError when one does."""
    files.make_folder(path)
    lock = (path / ".lock").open("a+")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no flock; there the folder is not guarded
        pass
    except OSError:
        lock.seek(0)
        raise UserError(
            f"another process (pid {lock.read().strip() or 'unknown'}) is training in {path}. Wait for it, or use --out DIR."
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    file = path / "recipe.yaml"
    content = recipe_text.dump(recipe).encode()
    if not file.exists() or file.read_bytes() != content:
        files.replace_file(file, content)
    folder = RunFolder(path, lock)
    files.recover(folder.model)
    if folder.checkpoints.exists():
        files.recover(folder.checkpoints / "step-0")
    return folder


def _changes(before: Any, after: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every difference between two plain trees."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [*before, *(name for name in after if name not in before)]
        return [
            change
            for name in names
            for change in _changes(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if before == after else [(key, before, after)]
