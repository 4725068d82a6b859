"""A model is never in memory twice while it is loaded: measured in a new process, where no freed memory is kept."""

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
from tunesmith.models.load import compute_dtype, load
from tunesmith.train.master_weights import Masters

kind, folder = sys.argv[1], locate(sys.argv[2])

def loaded():
    model = load.load_model(folder, trainable=kind == "trained")
    if kind == "trained":
        return model, Masters(model, torch.float32)
    if kind == "frozen":
        compute_dtype.cast(model, torch.float32)
    return model, None

loaded()  # what libraries allocate once
before = machine.memory_bytes()
with machine.PeakWatch(torch.device("cpu"), every=0.0005) as watch:
    model, _ = loaded()
assert all(parameter.isfinite().all() for parameter in model.parameters())
print((watch.peak - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""

QUANTISED = """
import re, sys, threading, time
from pathlib import Path
from tunesmith.models.find.locate import locate
from tunesmith.models.load import load, quantization

folder = locate(sys.argv[1])

def loaded():
    return load.load_model(folder, trainable=False, **quantization.load_kwargs("nf4", True))

def mapped_bytes():
    return int(re.search(r"RssFile:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    while not ended.is_set():
        seen.append(mapped_bytes())
        time.sleep(0.0005)

loaded()  # what libraries map once
seen, ended = [mapped_bytes()], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = loaded()
ended.set()
watcher.join()
print((max(seen) - seen[0]) / (folder.path / "model.safetensors").stat().st_size)
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


def measured(*words: str) -> float:
    done = processes.run([sys.executable, "-c", *words])
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_loading_takes_little_more_than_the_model(kind: str, folder: Path) -> None:
    assert measured(MEASURE, kind, str(folder)) < 1.25


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much of a mapped file is in memory")
def test_a_quantised_tensor_leaves_the_mapped_file(folder: Path) -> None:
    """All of the file is in memory at the end when nothing is dropped. Freed blocks, of which the allocator keeps more or
    fewer, are not counted."""
    pytest.importorskip("bitsandbytes")
    assert measured(QUANTISED, str(folder)) < 0.5
