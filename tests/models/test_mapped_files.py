"""A model is never in memory twice while it is loaded: measured in a new process, where no freed memory is kept."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.tiny import tiny_model, tiny_tokenizer

WIDE = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)

MEASURE = """
import sys
import torch
from tunesmith import machine
from tunesmith.models.find.locate import locate
from tunesmith.models.load import compute_dtype, load, quantization
from tunesmith.train.master_weights import Masters

kind, folder = sys.argv[1], locate(sys.argv[2])
options = quantization.load_kwargs("nf4", True) if kind == "nf4" else {}

def loaded():
    model = load.load_model(folder, trainable=kind == "trained", **options)
    if kind == "trained":
        return model, Masters(model, torch.float32)
    if kind == "frozen":
        compute_dtype.cast(model, torch.float32)
    return model, None

def bytes_of(model):
    measured = quantization.measure(model)
    return measured["base_bytes"] if measured else sum(parameter.nbytes for parameter in model.parameters())

loaded()  # what libraries allocate once
before = machine.memory_bytes()
with machine.PeakWatch(torch.device("cpu"), every=0.0005) as watch:
    model, _ = loaded()
assert all(parameter.isfinite().all() for parameter in model.parameters())
print((watch.peak - before) / bytes_of(model))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 27 million parameters in bf16."""
    target = tmp_path_factory.mktemp("wide")
    model = tiny_model("llama", **WIDE).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(target)
    tiny_tokenizer("chatml").save_pretrained(target)
    return target


@pytest.mark.parametrize(("kind", "most"), [("frozen", 1.25), ("trained", 1.25), ("nf4", 3.5)])
def test_loading_takes_little_more_than_the_model(kind: str, most: float, folder: Path) -> None:
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    done = processes.run([sys.executable, "-c", MEASURE, kind, str(folder)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.splitlines()[-1]) < most
