"""Weights on huge pages: the same weights in another place, and only where there is memory for them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model
from tunesmith import machine
from tunesmith.models.load import huge_pages
from tunesmith.models.load.compute_dtype import cast_and_move

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages of Linux")
WIDE = {"hidden_size": 256, "intermediate_size": 2048}  # 15 MB, several huge pages


def huge_bytes_at(address: int) -> int:
    """The bytes on huge pages of the mapping that holds ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
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
        assert huge_bytes_at(first.data_ptr()) > 4 << 20


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
