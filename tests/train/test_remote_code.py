"""trust_remote_code: a model's own code runs in the run that asks for it, is named, and never runs otherwise."""

import json
import sys

import pytest
from transformers import dynamic_module_utils

import tunesmith
from tests.runs import recipe
from tunesmith.errors import ModelError, RecipeError, UserError
from tunesmith.models.find.locate import code_files, locate

CODE = """
import os
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(os.environ["RAN"]).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


@pytest.fixture
def made(tmp_path):
    """A recipe whose model is a llama that brings its own classes."""
    made = recipe(tmp_path, max_steps=1)
    folder = tmp_path / "model-llama"
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": MAP, "model_type": "own", "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """transformers copies the code into a folder on the module path."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))


def test_the_code_runs_when_trusted_and_is_named_once(made, tmp_path):
    tunesmith.train({**made, "trust_remote_code": True}, out=tmp_path / "run")
    assert (tmp_path / "ran").exists()
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]
    (note,) = [note for note in notes if "runs with all your rights" in note]
    assert "own.py" in note
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model_type"] == "own"
    with pytest.raises(ModelError, match="auto_map"):  # for that run only: what it made is refused like any other
        locate(tmp_path / "run")


def test_the_code_does_not_run_otherwise(made, tmp_path):
    with pytest.raises(UserError, match="trust_remote_code=true"):
        tunesmith.train(made, out=tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_code_that_the_named_code_may_import_is_named_too(made, tmp_path):
    (tmp_path / "model-llama" / "beside.py").write_text("")
    assert [file.name for file in code_files(locate(tmp_path / "model-llama", remote_code=True))] == ["own.py", "beside.py"]


def test_code_of_another_place_is_refused(made, tmp_path):
    config = tmp_path / "model-llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoConfig": "someone/else--own.OwnConfig"}}))
    with pytest.raises(ModelError, match="someone/else--own"):
        code_files(locate(tmp_path / "model-llama", remote_code=True))


def test_trust_in_a_model_that_brings_no_code_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="contains no Python code"):
        tunesmith.check({**recipe(tmp_path), "trust_remote_code": True})
