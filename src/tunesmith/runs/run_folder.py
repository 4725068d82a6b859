"""Manage the run folder: its lock, its files, and the checks before a run starts, resumes or restarts in it.

runs/NAME/  recipe.yaml  manifest.json  metrics.jsonl  samples.jsonl  checkpoints/step-N/  model/  report.html

``claim`` locks the folder before anything else is done, also before torch is imported. ``RunFolder.begin``
writes the first file, once the data are known to be good.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from tunesmith import files
from tunesmith.errors import DataError, RecipeError, UserError
from tunesmith.json_types import JsonObject
from tunesmith.recipe import text as recipe_text
from tunesmith.runs import metrics_file

Start = Literal["new", "resume", "restart"]
"""Start of a run: in an empty folder, from the last checkpoint, or again from step 0."""

LOCK = ".lock"
REPLACED = "replaced-"
"""``--restart`` moves the files of the previous attempt into ``replaced-1/``, ``replaced-2/`` ..."""

FREE = {
    "data.cache", "train.gradient_checkpointing", "train.micro_batch_tokens", "train.report_to", "train.save_steps",
    "train.save_total_limit",
}  # fmt: skip
"""Keys that a resumed run may change (to need less memory, for example), because they change no result."""


@dataclass
class RunFolder:
    path: Path
    lock: IO[str] | None = None
    start: Start = "new"
    made: bool = False
    """True if ``claim`` made the folder. ``close`` removes it if no run began in it."""

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def manifest(self) -> JsonObject:
        """Return the content of manifest.json; {} before the first ``record``. Raises DataError."""
        file = self.path / "manifest.json"
        return read_mapping(file) if file.exists() else {}

    def record(self, **facts: object) -> None:
        """Add facts to manifest.json, atomically."""
        content = json.dumps({**self.manifest(), **facts}, indent=1, ensure_ascii=False, default=str)
        files.replace_file(self.path / "manifest.json", content.encode())

    def begin(self, recipe: JsonObject) -> None:
        """Write recipe.yaml, and remove or set aside the files of an attempt that is not resumed."""
        if self.start == "restart":
            _set_aside(self.path)
        elif self.start == "new":
            _clear_unstarted(self.path)
        file = self.path / "recipe.yaml"
        content = recipe_text.dump(recipe).encode()
        if not file.exists() or file.read_bytes() != content:
            files.replace_file(file, content)
        self.made = False
        self.recover()

    def recover(self) -> None:
        """Finish the work that a kill interrupted: replace model/, remove temporary files."""
        files.recover(self.model)
        if self.checkpoints.exists():
            files.recover(self.checkpoints / "step-0")

    def close(self) -> None:
        """Release the lock. Removes the folder if ``claim`` made it and no run began in it."""
        if self.lock is None:
            return
        if self.made:
            with suppress(OSError):  # Windows cannot remove an open file
                (self.path / LOCK).unlink()
                self.path.rmdir()
        self.lock.close()
        self.lock = None


def start_of(resume: bool, restart: bool) -> Start:
    """Return how a run starts. Raises UserError if both options are given."""
    if resume and restart:
        raise UserError("--resume continues a run and --restart starts it again: give one of them")
    return "resume" if resume else "restart" if restart else "new"


def claim(path: Path, start: Start = "new") -> RunFolder:
    """Make or reopen the folder and lock it, before any work is done.

    If a run was killed in the folder before its first record, the new run starts from step 0, with ``resume``
    too. Raises UserError if another process holds the lock, if a new run would overwrite files, if there is
    no run to resume, or if the folder cannot be written.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; expected a folder for the run. Choose another with --out.")
    if start == "resume" and not path.is_dir():
        raise UserError(f"no run to resume: there is no folder {path}. Leave out --resume to start one.")
    made = not path.is_dir()
    if not made and not (path / LOCK).exists():  # check first, so that a refused folder gets no lock file
        _check_content(path, start)
    files.make_folder(path)
    lock = take_lock(path)
    try:
        return RunFolder(path, lock, _check_content(path, start), made)
    except UserError:
        lock.close()
        raise


def _check_content(path: Path, start: Start) -> Start:
    """Return how the run starts, given what the folder holds. Raises UserError."""
    empty = all(entry.name == LOCK for entry in path.iterdir())
    unstarted = _is_unstarted(path)
    if start == "resume":
        if unstarted:
            return "new"
        if empty or not (path / "recipe.yaml").is_file():
            raise UserError(f"no run to resume in {path}: no recipe.yaml. Leave out --resume to start one.")
    elif not empty and not unstarted:
        is_run = any((path / name).is_file() for name in ("recipe.yaml", "manifest.json", "metrics.jsonl"))
        if start == "new" or not is_run:
            advice = (
                "To continue that run, add --resume. To start again from step 0, add --restart, which keeps its files in "
                f"{REPLACED}N/. To start another, add --out DIR."
                if is_run
                else "It is not a run folder. Choose another with --out DIR."
            )
            raise UserError(f"the run folder {path} exists already.\n  {advice}")
    else:
        return "new"
    return start


def _is_unstarted(path: Path) -> bool:
    """Return whether the folder has only files of a run that was killed before its first record."""
    names = {entry.name for entry in path.iterdir()}
    own = {LOCK, "recipe.yaml", "metrics.jsonl", "samples.jsonl", "base"}
    if LOCK not in names:  # no run was here: the user wrote the recipe.yaml
        return False
    others = {name for name in names - own if not (_is_temporary(name) or name.startswith(REPLACED))}
    records = [path / name for name in ("metrics.jsonl", "samples.jsonl")]
    return not others and not any(file.exists() and file.stat().st_size for file in records)


def _is_temporary(name: str) -> bool:
    return re.fullmatch(r"\..*\.(tmp|replaced)", name) is not None


def take_lock(path: Path) -> IO[str]:
    """Lock a folder for this process until the file is closed. Raises UserError if another one holds the lock."""
    file = path / LOCK
    while True:
        try:
            lock = file.open("a+")
        except OSError as error:
            raise UserError(
                f"the run folder {path} cannot be written: {error.strerror}. Name another folder with --out."
            ) from None
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
        if file.exists() and os.path.samestat(os.fstat(lock.fileno()), file.stat()):
            break
        lock.close()  # another run that did not begin has removed the file since this process opened it
        path.mkdir(parents=True, exist_ok=True)
    with files.naming_full_disk(file):
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    return lock


def _clear_unstarted(path: Path) -> None:
    """Remove the files of a run that was killed before its first record; ``begin`` replaces recipe.yaml."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / "base", ignore_errors=True)


def _set_aside(path: Path) -> None:
    """Move everything in the folder into ``replaced-N/``: the checkpoints first, recipe.yaml last.

    After a kill in between, ``--resume`` refuses the folder, because its checkpoints are gone, and
    ``--restart`` works again.
    """
    order = {"checkpoints": 0, "recipe.yaml": 2}
    entries = sorted(path.iterdir(), key=lambda entry: (order.get(entry.name, 1), entry.name))
    moved = [
        entry
        for entry in entries
        if entry.name != LOCK and not entry.name.startswith(REPLACED) and not _is_temporary(entry.name)
    ]
    if not moved:
        return
    taken = [re.fullmatch(rf"{REPLACED}(\d+)", entry.name) for entry in path.iterdir()]
    target = path / f"{REPLACED}{1 + max((int(match[1]) for match in taken if match), default=0)}"
    target.mkdir()
    if (path / "recipe.yaml").is_file():  # copied first, so that a kill before its move leaves a copy
        shutil.copyfile(path / "recipe.yaml", target / "recipe.yaml")
    for entry in moved:
        entry.replace(target / entry.name)
    files.sync(target)
    files.sync(path)


def check_recipe(path: Path, recipe: JsonObject) -> list[str]:
    """Return the keys of ``FREE`` whose values in ``recipe`` differ from those of the run in ``path``.

    Raises RecipeError if any other key differs, DataError if recipe.yaml cannot be read.
    """
    started = read_mapping(path / "recipe.yaml")
    old, new = flatten(started), flatten(recipe)
    different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    free = {key for key in different for name in FREE if key == name or key.startswith(f"{name}.")}
    changed = [f"{key}: was {old.get(key)!r}, is {new.get(key)!r}" for key in different if key not in free]
    if changed:
        raise RecipeError(
            f"the recipe is not the one that {path} was started with, so the resumed run would not be the same:\n  "
            + "\n  ".join(changed)
            + "\n  Change these keys back, or start another run with --out DIR."
            + (f"\n  This run is finished. {train_further(path)}" if _is_finished(path) else "")
        )
    return sorted(free)


def train_further(path: Path) -> str:
    """Return advice on how to train a finished run's model further: start another run from that model."""
    model = path / "model"
    keys = [f"model={path}", *(["adapter=continue"] if (model / "adapter_config.json").is_file() else [])]
    return f"To train its model further, start another run from it: {shlex.join(keys)} --out DIR"


def _is_finished(path: Path) -> bool:
    manifest = path / "manifest.json"
    return manifest.is_file() and bool(read_mapping(manifest).get("finished"))


def check_nothing_lost(run: RunFolder, damaged: dict[int, str]) -> None:
    """Raise UserError if a run without a good checkpoint would overwrite results by starting from step 0.

    ``damaged``: the damage of each checkpoint by step. A run that never saved a checkpoint and did not finish
    may start again: it takes the same steps.
    """
    manifest = run.manifest()
    records = metrics_file.read(run.path / "metrics.jsonl")
    last = max((int(record.get("step") or 0) for record in records), default=0)
    saved, finished = manifest.get("first_checkpoint"), manifest.get("finished")
    unknown = not manifest and (records or run.model.exists())  # a run writes manifest.json before both
    if not (damaged or saved is not None or finished or unknown):
        return
    if damaged:
        listed = "".join(f"\n  step-{step}: {damage}" for step, damage in sorted(damaged.items()))
        what = f"every checkpoint of {run.path} is damaged, so it cannot be resumed:{listed}"
    else:
        first = f", of which the first was of step {saved}" if saved is not None else ""
        what = f"the checkpoints of {run.path} are gone{first}, so it cannot be resumed."
    left = [f"metrics.jsonl (to step {last})"] if records else []
    if run.model.exists():
        best = f" (of step {manifest['result'].get('best_step')})" if manifest.get("result") else ""
        left.append(f"model/{best or ' (the best so far)'}")
    left += [name for name in ("merged", "report.html") if (run.path / name).exists()]
    raise UserError(
        f"{what}\n  What is left: {', '.join(left) or 'nothing'}.{' The run had finished.' if finished else ''}\n"
        f"  Restore a checkpoint, or start again from step 0 with --restart: it moves what is left to {REPLACED}N/."
    )


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


def read_mapping(file: Path) -> JsonObject:
    """Read a JSON or YAML mapping. Raises DataError naming file and line if the file does not hold one."""
    advice = (
        "\n  Another program or a power cut changed the file; restore it, or train again with --restart or into another "
        "folder (--out DIR)."
    )
    expected = f"expected one {'JSON object' if file.suffix == '.json' else 'YAML mapping'}"
    try:
        content = file.read_text(encoding="utf-8")
        value = json.loads(content) if file.suffix == ".json" else recipe_text.read(content, str(file))[0]
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: {expected}: {error.msg}{advice}") from None
    except (RecipeError, ValueError, RecursionError) as error:
        where = "" if isinstance(error, RecipeError) else f"{file}: {expected}: "
        raise DataError(f"{where}{error}{advice}") from None
    if not isinstance(value, dict):
        raise DataError(f"{file}, line 1: {expected}, got {str(value)[:60]!r}{advice}")
    return value
