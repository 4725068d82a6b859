"""Every command that builds on an adapter refuses one that changed after it was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tests.models.adapters import save_adapter
from tests.runs import recipe
from tunesmith.errors import ModelError
from tunesmith.merge.combine import combine


def built_on(made, folder, adapter):
    return tunesmith.train({**made, "model": str(folder), "adapter": adapter}, out=folder.parent / adapter)


USES = {
    "merge": lambda made, folder: tunesmith.merge(folder, folder.parent / "merge"),
    "combine": lambda made, folder: combine([folder, folder], folder.parent / "combine"),
    "continue": lambda made, folder: built_on(made, folder, "continue"),
    "merge before training": lambda made, folder: built_on(made, folder, "merge"),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    made = recipe(folder, adaptation={"type": "lora"}, max_steps=1)
    save_adapter(Path(made["model"]), folder / "adapter")
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
    return made, folder / "adapter"


@pytest.mark.parametrize("use", USES)
def test_a_changed_adapter_is_refused(use, damaged):
    made, folder = damaged
    before = {path.name for path in folder.parent.iterdir()}
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors changed"):
        USES[use](made, folder)
    left = {
        path for name in {path.name for path in folder.parent.iterdir()} - before for path in (folder.parent / name).iterdir()
    }
    assert not [path.name for path in left if path.name in ("base", "model", "tunesmith.json")]
