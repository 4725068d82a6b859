"""An adapter that was trained on a 4-bit or 8-bit base is merged into the de-quantised weights and no others."""

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from tests.models.adapters import save_adapter
from tests.runs import recipe
from tests.tiny import save_tiny, tiny_model
from tunesmith.errors import ModelError, UserError
from tunesmith.merge import merge_adapter
from tunesmith.merge.combine import combine
from tunesmith.models.load import load, merge_weights, quantization

pytest.importorskip("bitsandbytes")
IDS = torch.tensor([[5, 17, 80, 41, 300, 9]])


def saved(folder, name="llama", base=None, quant_type="nf4", use_double_quant=True, **lora):
    """An adapter with random values on a quantised tiny base."""
    load_kwargs = quantization.load_kwargs(quant_type, use_double_quant)
    save_adapter(base or save_tiny(name, folder / "base"), folder / "adapter", load_kwargs=load_kwargs, **lora)
    return folder / "adapter"


CASES = {
    "gemma": ("gemma", {"quant_type": "fp4", "use_double_quant": False}),
    "int8 gpt2": ("gpt2", {"quant_type": "int8"}),
    "dora": ("llama", {"use_dora": True}),
    "dora int8": ("llama", {"use_dora": True, "quant_type": "int8"}),
    "rslora": ("qwen3", {"use_rslora": True}),
    "bias": ("gpt2", {"bias": "all"}),
    "lora's bias": ("gpt2", {"bias": "lora_only"}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}),
    "a head": ("llama", {"modules_to_save": ["lm_head"]}),
}


def check_merged(adapter, out, quant_type):
    facts = merge_adapter.merge(adapter, out)
    assert facts["max_logit_difference"] < 1e-4 and facts["max_logit_difference_saved"] < 1e-4 and facts["max_kl"] < 1e-7
    assert facts["quantization"] == quant_type
    assert "quantization_config" not in (out / "config.json").read_text()
    plain, _ = tunesmith.load(out)
    assert quantization.record(plain) is None
    assert torch.allclose(plain(IDS).logits, tunesmith.load(adapter)[0](IDS).logits, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_answers_like_the_adapter_on_its_bits(case, tmp_path):
    name, keys = CASES[case]
    check_merged(saved(tmp_path, name, **keys), tmp_path / "out", keys.get("quant_type", "nf4"))


@pytest.mark.parametrize("keys", [{"add_tokens": ["<tool>"]}, {"adaptation": {"type": "qlora", "r": 4, "quant_type": "int8"}}])
def test_the_adapter_of_a_run_is_merged_like_any_other(keys, tmp_path):
    made = recipe(tmp_path, adaptation={"type": "qlora", "r": 4}, max_steps=2) | keys
    tunesmith.train(made, out=tmp_path / "run")
    check_merged(tmp_path / "run", tmp_path / "out", made["adaptation"].get("quant_type", "nf4"))


@pytest.mark.parametrize("quant_type", quantization.KINDS)
def test_the_unquantised_base_is_flagged(quant_type, tmp_path, monkeypatch):
    """A merge into the weights before quantisation gives another model."""
    adapter = saved(tmp_path, quant_type=quant_type)
    monkeypatch.setattr(load.quantization, "write_dequantized", lambda plain, base: None)
    with pytest.raises(ModelError, match=r"would change its answers: a logit differs by .* and KL\(adapter \|\| merged\) is"):
        merge_adapter.merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_divergence_alone_is_flagged(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(load.quantization, "write_dequantized", lambda plain, base: None)
    monkeypatch.setattr(merge_adapter, "LARGEST_DIFFERENCE", 1e9)
    with pytest.raises(ModelError, match="would change its answers"):
        merge_adapter.merge(shelf / "a", tmp_path / "out")


def test_nothing_is_folded_into_bits(shelf):
    model, _ = tunesmith.load(shelf / "a")
    with pytest.raises(UserError, match="cannot be merged into 4 or 8 bits"):
        merge_weights.merge_into_base(model)


def test_a_bf16_base_is_merged_from_its_own_numbers(tmp_path):
    """The bits come from bf16 numbers; the de-quantised numbers are kept in fp32 when asked for."""
    base = save_tiny("llama", tmp_path / "base")
    tiny_model("llama", eos_token_id=4).to(torch.bfloat16).save_pretrained(base)
    adapter = saved(tmp_path, base=base)
    facts = merge_adapter.merge(adapter, tmp_path / "half")
    assert facts["dtype"] == "bfloat16" and facts["max_logit_difference"] < 1e-4 < facts["max_logit_difference_saved"]
    assert 0 < facts["max_kl_saved"] < 1e-2
    facts = merge_adapter.merge(adapter, tmp_path / "whole", dtype="float32")
    assert facts["max_logit_difference_saved"] < 1e-4


def test_a_run_that_starts_from_the_sum_uses_it_as_its_base(tmp_path):
    """``adapter: merge``: the base of the new adapter is the sum, quantised anew."""
    made = recipe(tmp_path, adaptation={"type": "qlora", "r": 4}, max_steps=1)
    adapter = saved(tmp_path)
    outcome = tunesmith.train({**made, "model": str(adapter), "adapter": "merge"}, out=tmp_path / "next")
    merge_adapter.merge(adapter, tmp_path / "out")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "next" / "base", tmp_path / "out"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert quantization.record(tunesmith.load(outcome["model_dir"])[0])["quant_type"] == "nf4"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Adapters of one base: two on its nf4 bits, ``int8`` on others, ``plain`` on the base itself."""
    folder = tmp_path_factory.mktemp("shelf")
    base = save_tiny("llama", folder / "base")
    for name, quant_type, r in ("a", "nf4", 4), ("b", "nf4", 2), ("int8", "int8", 4):
        save_adapter(base, folder / name, load_kwargs=quantization.load_kwargs(quant_type, True), r=r)
    save_adapter(base, folder / "plain")
    return folder


def test_a_sum_has_the_quantised_base_of_its_parts(shelf, tmp_path):
    combine([shelf / "a", shelf / "b"], tmp_path / "sum", weights=[1, 0])
    (ours, _), (part, _) = tunesmith.load(tmp_path / "sum"), tunesmith.load(shelf / "a")
    assert quantization.record(ours) == quantization.record(part) is not None
    assert torch.allclose(ours(IDS).logits, part(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("other", ["int8", "plain"])
def test_two_ways_of_quantising_are_two_bases(other, shelf, tmp_path):
    with pytest.raises(UserError, match="quantised in different ways"):
        combine([shelf / "a", shelf / other], tmp_path / "sum")
