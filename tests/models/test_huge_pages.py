"""Weights on huge pages: the values stay equal, and weights move only if there is enough memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import processes
from tests.tiny import tiny_model
from tunesmith import machine
from tunesmith.models.load import huge_pages
from tunesmith.models.load.compute_dtype import cast_and_move

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages of Linux")
WIDE = {"hidden_size": 256, "intermediate_size": 2048}  # 15 MB, several huge pages


def bytes_in_memory(address: int, kind: str = "Rss") -> int:
    """The bytes in memory of the mapping that holds ``address``; ``kind``: a key of smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    return 0


@torch.inference_mode()
def test_weights_move_and_stay_what_they_are() -> None:
    model, ids = tiny_model("llama", **WIDE), torch.arange(5, 40)[None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(ids).logits
    cast_and_move(model, "fp32", torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids).logits, logits)
    first = next(model.parameters())
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if enabled.exists() and "[never]" not in enabled.read_text():
        assert bytes_in_memory(first.data_ptr(), "AnonHugePages") > 4 << 20


class Weights(nn.Module):
    """Parameters of ``size`` bytes each, all in ``storage`` if given."""

    def __init__(self, count: int, size: int, storage: torch.Tensor | None = None) -> None:
        super().__init__()
        whole = torch.zeros(count * size, dtype=torch.uint8) if storage is None else storage
        parts = [part if storage is not None else part.clone() for part in whole.view(torch.float32).chunk(count)]
        self.parts = nn.ParameterList([nn.Parameter(part, requires_grad=False) for part in parts])


MOVED = """
import torch
from tests.models.test_huge_pages import Weights
from tunesmith import machine
from tunesmith.models.load import huge_pages

size, count = 33 << 20, 4
model = Weights(count, size)
for number, parameter in enumerate(model.parameters()):
    parameter.fill_(number)
before = machine.memory_bytes()
with machine.PeakWatch(torch.device("cpu"), every=0.0005) as watch:
    assert huge_pages.move_weights(model)
assert [float(parameter[-1]) for parameter in model.parameters()] == list(range(count))
print((watch.peak - before) / (count * size))
"""


def test_weights_are_never_in_memory_twice() -> None:
    """In a new process: after a training, the allocator keeps what is freed."""
    done = processes.run([sys.executable, "-c", MOVED])
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 0.5


def test_a_mapped_file_leaves_memory_as_its_weights_move(tmp_path: Path) -> None:
    """What else reads the file finds it as it was."""
    size, count, file = 2 << 20, 8, tmp_path / "weights"
    torch.arange(count * size / 4).numpy().tofile(file)
    stored = torch.from_file(str(file), shared=False, size=count * size, dtype=torch.uint8)
    model: Any = Weights(count, size, stored)
    copies = [parameter.clone() for parameter in model.parameters()]
    assert bytes_in_memory(stored.data_ptr()) == count * size
    assert huge_pages.move_weights(model)
    assert bytes_in_memory(stored.data_ptr()) < size
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), copies, strict=True))
    assert float(stored[-4:].view(torch.float32)) == count * size / 4 - 1


def test_weights_that_are_views_of_one_tensor_stay_one() -> None:
    model = tiny_model("llama", **WIDE)
    up, gate = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj
    gate.weight.data = up.weight.data
    assert huge_pages.move_weights(model)
    assert gate.weight.data_ptr() == up.weight.data_ptr()


def test_weights_stay_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", **WIDE)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    monkeypatch.setattr(machine, "free_bytes", lambda device: 20 << 20)
    assert not huge_pages.move_weights(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_memory_that_loading_has_freed_is_returned() -> None:
    """glibc keeps freed blocks below one in use; a tokenizer leaves tens of megabytes of them."""
    blocks = [bytearray(100_000) for _ in range(400)]
    pin = bytearray(100_000)
    del blocks
    before = machine.memory_bytes()
    cast_and_move(tiny_model("llama"), "fp32", torch.device("cpu"))
    assert machine.memory_bytes() < before - 30_000_000 and pin
