"""Weights that are not finite are found in memory and in saved files, and counted exactly."""

import math

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import save_tiny, tiny_tokenizer
from tunesmith.errors import ModelError
from tunesmith.models.find.locate import locate
from tunesmith.models.load import finite, load, probe


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_kind_of_number_is_found(value, kind):
    largest = torch.full((3, 5), torch.finfo(kind).max, dtype=kind)
    bad = torch.zeros(7, 9, dtype=kind)
    bad[3, 3:5] = value
    tensors = {"largest": largest, "a": bad, "b": bad.T, "empty": torch.zeros(0, dtype=kind), "ids": torch.arange(3)}
    counts = finite.count_non_finite(tensors)
    assert counts == {"a": 2, "b": 2}
    assert finite.describe(counts, tensors) == (
        "2 of 5 tensors hold values that are not finite (a: 2 of 63 values, b: 2 of 63 values)"
    )
    assert finite.count_non_finite({}) == finite.count_non_finite({"ids": torch.arange(3)}) == {}


def test_a_long_list_is_cut():
    tensors = {name: torch.tensor([math.nan]) for name in "abcd"}
    assert finite.describe(finite.count_non_finite(tensors), tensors).endswith("c: 1 of 1 values, ...)")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_is_checked_as_it_was_saved(shards, tmp_path):
    """The network is finite in fp32; the file is not, because its dtype holds no number above 65504."""
    save_tiny("llama", tmp_path / "model")
    model = load.load_model(locate(tmp_path / "model"))
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    size = "40KB" if shards == 2 else "5GB"
    model.half().save_pretrained(tmp_path / "model", max_shard_size=size)
    if shards == 2:
        (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"safetensors would be written .*1 of \d+ tensors .*model.norm.weight: 1 of 32 values"):
        probe.write_probe(tmp_path / "model", model, tiny_tokenizer())


def test_an_adapter_is_checked_too(tmp_path):
    save_file({"a": torch.tensor([1.0, math.inf])}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter_model.safetensors .*a: 1 of 2 values"):
        finite.check_saved(tmp_path)
