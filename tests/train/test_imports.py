"""A new process that starts training has loaded no library that most runs never use; peft comes without torch's compiler."""

import importlib.util
import json
import subprocess
import sys

import pytest

LATER = (
    "peft", "sklearn", "matplotlib", "scipy.stats", "pandas", "datasets", "torch._inductor.compile_fx",
)  # fmt: skip
"""Of scipy, transformers itself imports ``scipy.optimize``."""

CODE = """
import gc, json, os, sys
from tunesmith.cli.main import main
assert main(["check", sys.argv[1]]) == 2
loaded = [name for name in sys.argv[2:] if name in sys.modules]
searched = [gc.isenabled(), gc.get_freeze_count()]
import tunesmith.train.run
from tunesmith.models.load import load
load.quiet()
import peft
print(json.dumps([loaded, "torch._inductor.compile_fx" in sys.modules, "bitsandbytes" in sys.modules, os.environ.get("TORCHDYNAMO_DISABLE"), searched]))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Facts about a process that checked a recipe up to its model, which does not exist, and then imported peft."""
    recipe = tmp_path_factory.mktemp("imports") / "recipe.yaml"
    recipe.write_text("model: ./none\ndata:\n  train: [{path: x.json}]\n")
    done = subprocess.run([sys.executable, "-c", CODE, str(recipe), *LATER], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_training_imports_libraries_when_it_needs_them(imported):
    assert imported[0] == []


def test_python_does_not_search_what_the_imports_made(imported):
    enabled, frozen = imported[-1]
    assert enabled and frozen > 100_000


def test_peft_comes_without_the_compiler(imported):
    _, compiler, bitsandbytes, switch, _ = imported
    assert not compiler and switch is None
    assert bitsandbytes == (importlib.util.find_spec("bitsandbytes") is not None)
