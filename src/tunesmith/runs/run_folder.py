"""The run folder: its lock, its files, and the checks before a run starts or resumes in it.

runs/NAME/  recipe.yaml  manifest.json  metrics.jsonl  samples.jsonl  checkpoints/step-N/  model/  report.html
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tunesmith import files
from tunesmith.errors import RecipeError, UserError
from tunesmith.json_types import JsonObject
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

    def manifest(self) -> JsonObject:
        """Return the content of manifest.json; {} before the first ``record``."""
        file = self.path / "manifest.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def record(self, **facts: object) -> None:
        """Add facts to manifest.json, atomically."""
        content = json.dumps({**self.manifest(), **facts}, indent=1, ensure_ascii=False, default=str)
        files.replace_file(self.path / "manifest.json", content.encode())

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def check_free(path: Path) -> None:
    """Raise UserError if ``path`` holds anything that a new run would overwrite."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; expected a new folder for the run. Choose another with --out.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"the run folder {path} exists already.\n"
            "  To continue that run, add --resume. To start another, add --out DIR."
        )


FREE = {
    "data.cache", "train.gradient_checkpointing", "train.micro_batch_tokens", "train.report_to", "train.save_steps",
    "train.save_total_limit",
}  # fmt: skip
"""Keys that do not change the result, so that a resumed run may change them (to need less memory, say)."""


def check_resumable(path: Path, recipe: JsonObject) -> list[str]:
    """Return the keys of ``FREE`` in which ``recipe`` differs from the run in ``path``.

    Raises UserError if there is no run, RecipeError if any other key differs.
    """
    file = path / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"no run to resume in {path}: no recipe.yaml. Leave out --resume to start one.")
    started = recipe_text.read(file.read_text(encoding="utf-8"), str(file))[0]
    old, new = flatten(started), flatten(recipe)
    different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    free = {key for key in different for name in FREE if key == name or key.startswith(f"{name}.")}
    changed = [f"{key}: was {old.get(key)!r}, is {new.get(key)!r}" for key in different if key not in free]
    if changed:
        raise RecipeError(
            f"the recipe is not the one that {path} was started with, so the resumed run would not be the same:\n  "
            + "\n  ".join(changed)
            + "\n  Change these keys back, or start another run with --out DIR."
        )
    return sorted(free)


def flatten(tree: object, key: str = "", all_lists: bool = False) -> JsonObject:
    """Flatten nested mappings, and lists of mappings, into one mapping with dotted keys.

    ``all_lists``: other lists become keys by index, too.
    """
    if isinstance(tree, list) and tree and (all_lists or all(isinstance(one, dict) for one in tree)):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict) or not tree:
        return {key: tree}
    flat: JsonObject = {}
    for part, child in tree.items():
        flat |= flatten(child, f"{key}.{part}" if key else str(part), all_lists)
    return flat


def take(path: Path, recipe: JsonObject) -> RunFolder:
    """Create or reopen the folder and lock it. Raises UserError if another process holds the lock."""
    files.make_folder(path)
    lock = (path / ".lock").open("a+")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no flock; the folder is not locked there
        pass
    except OSError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        raise UserError(
            f"another process (pid {owner}) is training in {path}. Wait for it, or use --out DIR."
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
