"""Several LoRA adapters as one: the arithmetic is peft's, the exact sum is exact, and adapters that cannot be summed are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file

import tunesmith
from tests.models.adapters import save_adapter
from tests.tiny import save_tiny
from tunesmith.errors import TunesmithError, UserError
from tunesmith.merge.combine import combine, nearest_factors, relative_distance
from tunesmith.models.find import record as saved_record
from tunesmith.models.find import saved_files

IDS = torch.tensor([[5, 17, 80, 41, 300, 9]])


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A base with adapters ``a`` and ``b`` alike, and ``c`` of other ranks on fewer layers."""
    folder = tmp_path_factory.mktemp("shelf")
    base = save_tiny("llama", folder / "base")
    save_adapter(base, folder / "a", seed=1)
    save_adapter(base, folder / "b", seed=2, lora_alpha=12)
    save_adapter(
        base, folder / "c", seed=3, r=2, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 3}, use_rslora=True
    )
    return folder


@pytest.fixture(scope="module")
def peft_model(shelf):
    model = AutoPeftModelForCausalLM.from_pretrained(shelf / "a", adapter_name="a")
    for name in "bc":
        model.load_adapter(shelf / name, name)
    return model.eval()


def peft_sum(model, names, weights, method, rank=None):
    model.add_weighted_adapter(list(names), list(weights), "sum", combination_type=method, svd_rank=rank)
    model.set_adapter("sum")
    logits = model(IDS).logits
    model.set_adapter("a")
    model.delete_adapter("sum")
    return logits


@pytest.mark.parametrize(("names", "weights", "method", "rank"), [
    ("ab", (0.7, 0.3), "cat", None), ("ab", (0.7, 0.3), "linear", None), ("ab", (0.7, -0.3), "linear", None),
    ("ab", (0.7, 0.3), "svd", 3), ("abc", (0.5, 1.5, -1.0), "cat", None), ("abc", (0.5, 1.5, -1.0), "svd", 5),
])  # fmt: skip
def test_the_sum_is_that_of_peft(shelf, peft_model, tmp_path, names, weights, method, rank):
    facts = combine([shelf / name for name in names], tmp_path / "sum", weights=weights, method=method, r=rank)
    ours, _ = tunesmith.load(tmp_path / "sum")
    assert torch.allclose(ours(IDS).logits, peft_sum(peft_model, names, weights, method, rank), atol=2e-5)
    assert facts["r"] == json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["r"]


def test_cat_is_the_weighted_sum_and_linear_is_not(shelf, tmp_path):
    facts = combine([shelf / "a", shelf / "b"], tmp_path / "sum", weights=[0.7, 0.3])
    model, _ = tunesmith.load(tmp_path / "sum")
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    exact = 0
    for name, weight in (("a", 0.7), ("b", 0.3)):
        one, _ = tunesmith.load(shelf / name)
        exact = exact + weight * one.base_model.model.model.layers[1].mlp.down_proj.get_delta_weight("default")
    assert torch.allclose(layer.get_delta_weight("default"), exact, atol=1e-6)
    assert facts["distances"]["cat"] < 1e-6 < 0.05 < facts["distances"]["svd"] < facts["distances"]["linear"]


def test_the_rank_of_a_sum_that_svd_needs_no_cut_for(shelf, tmp_path):
    facts = combine([shelf / "a", shelf / "b"], tmp_path / "sum", method="svd", r=8)
    assert facts["distances"]["svd"] < 1e-6


def test_the_nearest_of_a_rank_is_that_of_a_whole_decomposition():
    torch.manual_seed(0)
    a, b = torch.randn(6, 20), torch.randn(15, 6)
    u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
    low, high = nearest_factors(a, b, 2)
    assert torch.allclose(high @ low, (u[:, :2] * s[:2]) @ v[:2], atol=1e-4)
    apart = relative_distance({"x": (low, high)}, {"x": (a, b)})
    assert apart == pytest.approx(float(s[2:].square().sum().sqrt() / s.square().sum().sqrt()), rel=1e-4)


def test_the_sources_of_a_sum_are_recorded(shelf, tmp_path):
    combine([shelf / "a", shelf / "b"], tmp_path / "sum")
    record = saved_record.read(tmp_path / "sum")
    assert [(part["path"], part["weight"]) for part in record["combined"]["parts"]] == [
        (str(shelf / "a"), 0.5),
        (str(shelf / "b"), 0.5),
    ]
    assert record["base"]["fingerprint"] == saved_record.fingerprint(shelf / "base") and record["probe"]["answers"]
    assert (tmp_path / "sum" / "tokenizer.json").is_file()


def other_base(shelf, tmp_path):
    base = save_tiny("llama", tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    save_adapter(base, tmp_path / "x")


def dora(shelf, tmp_path):
    save_adapter(shelf / "base", tmp_path / "x", use_dora=True)


def biases(shelf, tmp_path):
    save_adapter(save_tiny("gpt2", tmp_path / "base"), tmp_path / "x", bias="all")


def rows(shelf, tmp_path):
    save_adapter(shelf / "base", tmp_path / "x", trainable_token_indices=[3, 4])


def whole_modules(shelf, tmp_path):
    save_adapter(shelf / "base", tmp_path / "x", modules_to_save=["norm"])


def merged(shelf, tmp_path):
    tunesmith.merge(shelf / "a", tmp_path / "x")


def ia3(shelf, tmp_path):
    (tmp_path / "x").mkdir()
    for file in (shelf / "a").iterdir():
        (tmp_path / "x" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    saved_files.accept(tmp_path / "x")


def half(shelf, tmp_path):
    save_adapter(shelf / "base", tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "x" / "adapter_model.safetensors", metadata={"format": "pt"})


REFUSED = {
    other_base: "different bases", dora: "use_dora", biases: "trained biases", rows: "rows of new tokens", whole_modules: "modules_to_save",
    merged: "is a full model", ia3: "ia3 adapter", half: "lacks a factor of model.layers.0.self_attn.q_proj",
}  # fmt: skip


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_adapters_that_are_no_plain_lora_are_refused_by_name(make, shelf, tmp_path):
    make(shelf, tmp_path)
    with pytest.raises(UserError, match=REFUSED[make]):
        combine([shelf / "a", tmp_path / "x"], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize(("keys", "said"), [
    ({"weights": [1.0]}, "2 adapters and 1 weights"), ({"method": "ties"}, "expected one of cat, svd, linear"), ({"r": 3}, "--method svd"),
    ({"weights": [float("nan"), 1.0]}, "weights are nan, 1"), ({"weights": [1.0, float("-inf")]}, "finite"),
])  # fmt: skip
def test_wrong_arguments(shelf, tmp_path, keys, said):
    with pytest.raises(TunesmithError, match=said):
        combine([shelf / "a", shelf / "b"], tmp_path / "sum", **keys)


def test_adapters_that_cannot_be_combined_are_refused(shelf, tmp_path):
    with pytest.raises(UserError, match="two adapters"):
        combine([shelf / "a"], tmp_path / "sum")
    with pytest.raises(UserError, match="exists already"):
        combine([shelf / "a", shelf / "b"], shelf / "a")
    with pytest.raises(UserError, match="one rank in all of them"):
        combine([shelf / "a", shelf / "c"], tmp_path / "sum", method="linear")
