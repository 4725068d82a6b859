"""Check that the files of a model or a run are unchanged since they were saved (``tunesmith verify``)."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from tunesmith.errors import ModelError, UserError
from tunesmith.json_types import JsonObject
from tunesmith.models.find import catalog, model_store, record, saved_files
from tunesmith.models.find.locate import locate
from tunesmith.train import checkpoint

MODELS = ("model", "merged", "base")
"""Folders of a run that hold a model."""


class Finding(TypedDict):
    """State of a file, a checkpoint or an adapter's base model.

    ``path``: relative to the verified folder; "the base model" for a base outside it."""

    path: str
    state: str
    reason: str | None


def verify(folder: str | Path, accept: bool = False) -> JsonObject:
    """Compare every file of a model, adapter, merged or run folder with the sha256 recorded when it was saved.

    ``folder``: a path, or a name in the model store. ``accept``: record the current files of a model folder
    before the comparison.

    Returns {"path", "ok", "recorded", "files"}. ``ok`` is false if a file was changed, removed or added.
    ``recorded`` is false if there are no hashes to compare with. ``files`` is a list of {"path", "state",
    "reason"}; a state is ok, changed, missing, added or not recorded. A checkpoint is one entry, and so is an
    adapter's base model. Raises UserError.
    """
    name = str(folder)
    stored = model_store.folder_of(name)
    path = stored if name in catalog.CATALOG or not Path(name).exists() else Path(folder).expanduser()
    if not path.is_dir():
        raise ModelError(f"no model or folder is called {name!r}. {catalog.suggest(name)}")
    path = path.resolve()
    models = [path / name for name in MODELS if (path / name).is_dir()]
    is_run = (path / "recipe.yaml").is_file() and not (path / "config.json").is_file()
    if accept:
        if is_run:
            raise UserError(
                f"--accept takes a model folder; {path} is a run. Name {path / 'model'}, for example."
            )
        saved_files.accept(path)
    findings = [one for model in (models if is_run else [path]) for one in _model(model, path)]
    recorded = any(one["state"] != "not recorded" for one in findings)
    for step in checkpoint.steps(path / "checkpoints") if is_run else ():
        damage = checkpoint.find_damage(path / "checkpoints" / f"step-{step}")
        state = "ok" if damage is None else "changed"
        findings.append({"path": f"checkpoints/step-{step}", "state": state, "reason": damage})
        recorded = True
    ok = all(one["state"] in ("ok", "not recorded") for one in findings)
    return {"path": str(path), "ok": ok, "recorded": recorded, "files": findings}


def _model(folder: Path, root: Path) -> list[Finding]:
    """Return a finding for each file of a model folder, the record first, and for an adapter's base model."""
    place = folder.relative_to(root)
    findings: list[Finding] = []
    try:
        if record.read(folder):
            findings.append({"path": str(place / record.FILE), "state": "ok", "reason": None})
        states = saved_files.verify(folder)
    except ModelError as error:
        return [{"path": str(place / record.FILE), "state": "changed", "reason": str(error).splitlines()[0]}]
    for one in states:
        found = one["found"]
        reason = (
            f"sha256 {found[:12]}, expected {one['expected'][:12]}"
            if one["state"] == "changed" and found and one["expected"]
            else None
        )
        findings.append({"path": str(place / one["name"]), "state": one["state"], "reason": reason})
    if (folder / "adapter_config.json").is_file() and all(one["state"] == "ok" for one in states):
        findings.append(_base(folder))
    return findings


def _base(adapter: Path) -> Finding:
    try:
        base = locate(adapter).network
    except ModelError as error:
        return {"path": "the base model", "state": "changed", "reason": str(error).splitlines()[0]}
    try:
        record.check_base(adapter, base)
        with saved_files.checking_weights(adapter, base):
            pass
    except ModelError as error:
        return {"path": str(base), "state": "changed", "reason": str(error).splitlines()[0]}
    return {"path": str(base), "state": "ok", "reason": None}
