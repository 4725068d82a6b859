"""Forward passes over the prompts of several rows."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from tunesmith.models.generate.forward_passes import SlotPass
from tunesmith.models.generate.slot_cache import Piece


def run_prompts(
    dtype: torch.dtype, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[SlotPass, list[torch.Tensor], set[int]]:
    """Run two prompts a pass; return the pass, its logits, and the numbers of tokens that the model got."""
    model, sizes = tiny_model("llama").to(dtype), set[int]()
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: sizes.add(inputs[0].shape[1]))
    run = SlotPass(model)
    run.step = None  # passes over so few tokens would be steps in C
    if not padded:
        monkeypatch.setattr(run, "_padding", lambda tokens: 0)
    run.resize(2, 64)
    lengths = range(2, 34)
    logits = [run([Piece(range(5, 5 + length), 0, 0), Piece([9, 8], 1, 0)]) for length in lengths]
    return run, logits, sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_over_prompts_have_few_sizes_where_each_costs_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that are added change neither the logits nor what the slots hold."""
    run, logits, sizes = run_prompts(dtype, True, monkeypatch)
    plain, expected, lengths = run_prompts(dtype, False, monkeypatch)
    assert lengths == set(range(4, 36))
    assert sizes == (lengths if dtype is torch.float32 else {8, 16, 24, 32, 40})
    pairs = [*zip(logits, expected, strict=True)]
    stored = zip(run.cache.keys + run.cache.values, plain.cache.keys + plain.cache.values, strict=True)
    pairs += [(a[:, :, :2], b[:, :, :2]) for a, b in stored]
    for found, right in pairs:
        assert torch.allclose(found.float(), right.float(), atol=2e-2)
