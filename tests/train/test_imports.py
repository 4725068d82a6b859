"""A new process that imports training has loaded no library that most runs never use; peft comes without torch's compiler."""

import importlib.util
import json
import subprocess
import sys

import pytest

LATER = (
    "peft", "bitsandbytes", "sklearn", "matplotlib", "scipy.stats", "pandas", "datasets", "torch._inductor.compile_fx",
)  # fmt: skip
"""Of scipy, transformers itself imports ``scipy.optimize``."""

CODE = """
import json, os, sys
import tunesmith.train.run
loaded = [name for name in sys.argv[1:] if name in sys.modules]
from tunesmith.models.load import load
load.quiet()
import peft
print(json.dumps([loaded, "torch._inductor.compile_fx" in sys.modules, "bitsandbytes" in sys.modules, os.environ.get("TORCHDYNAMO_DISABLE")]))
"""


@pytest.fixture(scope="module")
def imported():
    done = subprocess.run([sys.executable, "-c", CODE, *LATER], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_training_imports_libraries_when_it_needs_them(imported):
    assert imported[0] == []


def test_peft_comes_without_the_compiler(imported):
    _, compiler, bitsandbytes, switch = imported
    assert not compiler and switch is None
    assert bitsandbytes == (importlib.util.find_spec("bitsandbytes") is not None)
