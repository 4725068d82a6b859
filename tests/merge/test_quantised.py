"""An adapter that was trained beside 4 or 8 bits is merged onto the numbers which those stand for, and onto no others."""

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from tests.runs import recipe
from tests.tiny import save_tiny, tiny_model
from tunesmith.errors import ModelError, UserError
from tunesmith.merge import merge_adapter
from tunesmith.merge.combine import combine
from tunesmith.models.load import load, quantization

pytest.importorskip("bitsandbytes")
IDS = torch.tensor([[5, 17, 80, 41, 300, 9]])


def trained(folder, name="llama", **keys):
    made = recipe(folder, name, adaptation={"type": "qlora", "r": 4, **keys})
    if keys.get("add"):
        made["adaptation"].pop("add")
        made["add_tokens"] = ["<tool>"]
    tunesmith.train(made, out=folder / "run")
    return folder / "run"


CASES = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "gemma": ("gemma", {"quant_type": "fp4", "use_double_quant": False}),
    "int8": ("llama", {"quant_type": "int8"}),
    "int8 gpt2": ("gpt2", {"quant_type": "int8"}),
    "dora": ("llama", {"use_dora": True}),
    "dora int8": ("llama", {"use_dora": True, "quant_type": "int8"}),
    "rslora": ("qwen3", {"use_rslora": True}),
    "bias": ("gpt2", {"bias": "all"}),
    "lora's bias": ("gpt2", {"bias": "lora_only"}),
    "patterns": ("llama", {"r": {"default": 4, "q_proj": 2}, "lora_alpha": {"default": 8.0, "k_proj": 3.0}}),
    "a head": ("llama", {"modules_to_save": ["lm_head"]}),
    "new tokens": ("llama", {"add": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_answers_like_the_adapter_on_its_bits(case, tmp_path):
    name, keys = CASES[case]
    adapter = trained(tmp_path, name, **keys)
    facts = merge_adapter.merge(adapter, tmp_path / "out")
    assert facts["max_logit_difference"] < 1e-4 and facts["max_logit_difference_saved"] < 1e-4 and facts["max_kl"] < 1e-7
    assert facts["quantization"] == keys.get("quant_type", "nf4")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    plain, _ = tunesmith.load(tmp_path / "out")
    assert quantization.record(plain) is None
    assert torch.allclose(plain(IDS).logits, tunesmith.load(adapter)[0](IDS).logits, atol=1e-4)


@pytest.mark.parametrize("quant_type", quantization.KINDS)
def test_the_unquantised_base_is_flagged(quant_type, tmp_path, monkeypatch):
    """The naive route: the update on the numbers that the bits were made from. It is another model."""
    adapter = trained(tmp_path, quant_type=quant_type)
    monkeypatch.setattr(load.quantization, "write_dequantized", lambda plain, base: None)
    with pytest.raises(ModelError, match=r"would change its answers: a logit differs by .* and KL\(adapter \|\| merged\) is"):
        merge_adapter.merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_divergence_alone_is_flagged(tmp_path, monkeypatch):
    adapter = trained(tmp_path)
    monkeypatch.setattr(load.quantization, "write_dequantized", lambda plain, base: None)
    monkeypatch.setattr(merge_adapter, "LARGEST_DIFFERENCE", 1e9)
    with pytest.raises(ModelError, match="would change its answers"):
        merge_adapter.merge(adapter, tmp_path / "out")


def test_nothing_is_folded_into_bits(tmp_path):
    model, _ = tunesmith.load(trained(tmp_path))
    with pytest.raises(UserError, match="cannot be merged into 4 or 8 bits"):
        load.merge_into_base(model)


def test_a_bf16_base_is_merged_from_its_own_numbers(tmp_path):
    """The bits come from bf16 numbers; what they stand for is kept in fp32 when asked for."""
    base = save_tiny("llama", tmp_path / "model-llama")
    tiny_model("llama", eos_token_id=4).to(torch.bfloat16).save_pretrained(base)
    adapter = trained(tmp_path)
    facts = merge_adapter.merge(adapter, tmp_path / "half")
    assert facts["dtype"] == "bfloat16" and facts["max_logit_difference"] < 1e-4 < facts["max_logit_difference_saved"]
    assert 0 < facts["max_kl_saved"] < 1e-2
    facts = merge_adapter.merge(adapter, tmp_path / "whole", dtype="float32")
    assert facts["max_logit_difference_saved"] < 1e-4


def test_a_run_that_starts_from_the_sum_stands_on_it(tmp_path):
    """``adapter: merge``: the base of the new adapter is the sum, quantised anew."""
    made = recipe(tmp_path, adaptation={"type": "qlora", "r": 4})
    tunesmith.train(made, out=tmp_path / "run")
    outcome = tunesmith.train({**made, "model": str(tmp_path / "run"), "adapter": "merge"}, out=tmp_path / "next")
    merge_adapter.merge(tmp_path / "run", tmp_path / "out")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "next" / "base", tmp_path / "out"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert quantization.record(tunesmith.load(outcome["model_dir"])[0])["quant_type"] == "nf4"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Adapters of one base: two beside its nf4 bits, ``int8`` beside others, ``plain`` beside none."""
    folder = tmp_path_factory.mktemp("shelf")
    made = recipe(folder)
    kinds = {"a": {}, "b": {"r": 2}, "int8": {"quant_type": "int8"}, "plain": {"type": "lora"}}
    for name, keys in kinds.items():
        tunesmith.train({**made, "adaptation": {"type": "qlora", "r": 4, **keys}}, out=folder / name)
    return folder


def test_a_sum_stands_on_the_bits_of_its_parts(shelf, tmp_path):
    combine([shelf / "a", shelf / "b"], tmp_path / "sum", weights=[1, 0])
    (ours, _), (part, _) = tunesmith.load(tmp_path / "sum"), tunesmith.load(shelf / "a")
    assert quantization.record(ours) == quantization.record(part) is not None
    assert torch.allclose(ours(IDS).logits, part(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("other", ["int8", "plain"])
def test_two_ways_of_quantising_are_two_bases(other, shelf, tmp_path):
    with pytest.raises(UserError, match="quantised in different ways"):
        combine([shelf / "a", shelf / other], tmp_path / "sum")
