"""Merging keeps the model's answers, its tied embeddings and its files, and a fresh process with plain libraries agrees."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tests import processes
from tests.models.adapters import base_and_adapter, save_adapter
from tests.runs import recipe
from tests.tiny import save_tiny, tiny_model
from tunesmith.errors import ModelError, UserError
from tunesmith.merge import merge_adapter
from tunesmith.models.find.record import FILE
from tunesmith.models.generate.decode import generate_ids
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.load.load import load, load_model, locate
from tunesmith.models.load.probe import write_probe
from tunesmith.train import setup

IDS = [5, 17, 80, 41, 300, 9]

FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import AutoPeftModelForCausalLM

ids = torch.tensor([json.loads(sys.argv[1])])
made = {}
for folder in sys.argv[2:]:
    kind = AutoPeftModelForCausalLM if folder.endswith("adapter") else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    logits = model(input_ids=ids).logits[0, -1].tolist()
    new = model.generate(input_ids=ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    made[folder] = {"logits": logits, "new": new[0, ids.shape[1]:].tolist(), "chat": chat}
assert not any(name.partition(".")[0] == "tunesmith" for name in sys.modules)
print(json.dumps(made))
"""


def fresh(*folders: Path) -> dict[str, Any]:
    """Open the folders in a process that knows nothing of tunesmith."""
    command = [sys.executable, "-c", FRESH, json.dumps(IDS), *map(str, folders)]
    done = processes.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ours(folder: Path) -> dict[str, Any]:
    """Open a folder with tunesmith: 16 greedy tokens, the end tokens forbidden as ``min_new_tokens`` forbids them."""
    model, tokenizer = load(folder)
    core = model.get_base_model() if hasattr(model, "peft_config") else model
    head = core.get_output_embeddings()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([IDS])).logits[0, -1].tolist()

    def no_end(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output[..., core.generation_config.eos_token_id] = float("-inf")
        return output

    hook = head.register_forward_hook(no_end)
    new = generate_ids(model, tokenizer, [IDS], SamplingParams(max_new_tokens=16, stop=frozenset()))[0]
    hook.remove()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    return {"logits": logits, "new": new, "chat": chat}


def test_a_fresh_process_with_plain_libraries_agrees(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path)
    merge_adapter.merge(adapter, tmp_path / "merged")
    folders = (base, adapter, tmp_path / "merged")
    assert fresh(*folders) == {str(folder): ours(folder) for folder in folders}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter that tests only read."""
    return base_and_adapter(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bf16_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    base = save_tiny("llama", folder / "base")
    tiny_model("llama", eos_token_id=4).to(torch.bfloat16).save_pretrained(base)
    save_adapter(base, folder / "adapter")
    return folder / "adapter"


def weights_are_one(model: Any) -> bool:
    return model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "qwen3"])
def test_the_merged_model_answers_like_the_adapter(tmp_path: Path, name: str) -> None:
    _, adapter = base_and_adapter(tmp_path, name)
    facts = merge_adapter.merge(adapter, tmp_path / "out")
    assert facts["max_logit_difference"] < 1e-4 and facts["max_logit_difference_saved"] < 1e-4
    model, tokenizer = load(tmp_path / "out")
    ids = torch.tensor([IDS])
    assert torch.allclose(model(ids).logits, load(adapter)[0](ids).logits, atol=1e-4)
    assert weights_are_one(model) and facts["tied_embeddings"] and tokenizer.chat_template
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", FILE} <= names
    assert not any("adapter" in name for name in names)


KINDS = {
    "biases": {"bias": "all"}, "dora with biases": {"use_dora": True, "bias": "lora_only"},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2, "c_fc": 2}, "alpha_pattern": {"v_proj": 3, "c_proj": 3}}, "one layer": {"target_modules": ["down_proj", "c_fc"], "layers_to_transform": [1]},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_kind_of_lora_is_merged_exactly(tmp_path: Path, name: str, kind: str) -> None:
    base, adapter = base_and_adapter(tmp_path, name, **KINDS[kind])
    facts = merge_adapter.merge(adapter, tmp_path / "out", dtype="float32")
    assert facts["max_logit_difference"] < 1e-5 and facts["max_logit_difference_saved"] < 1e-5
    ids = torch.tensor([IDS])
    merged, alone, untouched = (load(folder)[0](ids).logits for folder in (tmp_path / "out", adapter, base))
    assert torch.allclose(merged, alone, atol=1e-5) and not torch.allclose(merged, untouched, atol=1e-3)


TIED = {
    "lora on the embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "lora on the head": ({"target_modules": ["lm_head", "q_proj"]}, False),
    "a trained copy of the embedding": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "one trained copy of both": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
}


@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_survive_a_merge(tmp_path: Path, case: str) -> None:
    """Tied where the adapter treats them as one weight; else written as two, and the config says so."""
    lora, still_tied = TIED[case]
    _, adapter = base_and_adapter(tmp_path, **lora)
    facts = merge_adapter.merge(adapter, tmp_path / "out")
    model = load_model(locate(tmp_path / "out"))
    ids = torch.tensor([IDS])
    assert torch.allclose(model(ids).logits, load(adapter)[0](ids).logits, atol=1e-4)
    assert facts["tied_embeddings"] is still_tied is weights_are_one(model) is model.config.tie_word_embeddings


def test_the_bases_dtype_is_kept(tmp_path: Path, bf16_adapter: Path) -> None:
    facts = merge_adapter.merge(bf16_adapter, tmp_path / "out")
    assert facts["dtype"] == "bfloat16" and load_model(locate(tmp_path / "out")).dtype == torch.bfloat16
    assert facts["max_logit_difference"] < 1e-4 < facts["max_logit_difference_saved"]


def test_a_wider_dtype_keeps_what_rounding_would_lose(tmp_path: Path, bf16_adapter: Path) -> None:
    facts = merge_adapter.merge(bf16_adapter, tmp_path / "out", dtype="float32")
    assert facts["dtype"] == "float32" and facts["max_logit_difference_saved"] < 1e-4
    with pytest.raises(UserError, match="unknown dtype"):
        merge_adapter.merge(bf16_adapter, tmp_path / "other", dtype="int8")


def test_nothing_is_overwritten(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    _, adapter = llama
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        merge_adapter.merge(adapter, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_model_has_nothing_to_merge(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to merge"):
        merge_adapter.merge(save_tiny("llama", tmp_path / "m"), tmp_path / "out")


def test_a_merge_that_changes_answers_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: tuple[Path, Path]
) -> None:
    base, adapter = llama
    monkeypatch.setattr(merge_adapter.merge_weights, "merge_into_base", lambda model: load_model(locate(base)))
    with pytest.raises(ModelError, match="would change its answers"):
        merge_adapter.merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_dtype_that_cannot_hold_the_sum_writes_nothing(tmp_path: Path) -> None:
    """The sum is right in fp32; fp16, whose largest number is 65504, cannot hold it."""
    base = save_tiny("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("input_layernorm.weight"):
            value.mul_(1e5)
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            value.mul_(1e-5)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    save_adapter(base, tmp_path / "adapter", target_modules=["down_proj"])
    with pytest.raises(ModelError, match=r"(?s)numbers that no model can use: .*input_layernorm.*--dtype float32"):
        merge_adapter.merge(tmp_path / "adapter", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert merge_adapter.merge(tmp_path / "adapter", tmp_path / "out")["dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_more_than_rounding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: tuple[Path, Path], dtype: str
) -> None:
    _, adapter = llama
    facts = merge_adapter.merge(adapter, tmp_path / "fits", dtype=dtype)
    assert 0 < facts["max_kl_saved"] < merge_adapter.LARGEST_ROUNDING[dtype]
    monkeypatch.setitem(merge_adapter.LARGEST_ROUNDING, dtype, facts["max_kl_saved"] / 2)
    with pytest.raises(ModelError, match=f"in {dtype} would change its answers"):
        merge_adapter.merge(adapter, tmp_path / "out", dtype=dtype)


def test_a_run_starts_from_no_sum_that_answers_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path, adaptation="lora", max_steps=1)
    save_adapter(Path(made["model"]), tmp_path / "adapter")
    made |= {"model": str(tmp_path / "adapter"), "adapter": "merge"}
    monkeypatch.setitem(merge_adapter.LARGEST_ROUNDING, "float32", -1.0)
    with pytest.raises(ModelError, match="in float32 would change its answers"):
        tunesmith.train(made, out=tmp_path / "run")
    monkeypatch.setattr(merge_adapter, "LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(ModelError, match="Use the adapter as it is"):
        tunesmith.train(made, out=tmp_path / "other")
    assert not (tmp_path / "run" / "base").exists() and not (tmp_path / "other" / "base").exists()


def test_a_sum_made_before_training_draws_no_numbers_of_the_run(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    """One process merges, only once. The initial values of the new adapter must equal those of other processes and of a resumed run."""
    _, adapter = llama
    before = torch.get_rng_state()
    made = setup._merged_base(SimpleNamespace(model_folder=locate(adapter)), tmp_path / "run")  # type: ignore[arg-type]
    assert made.path == tmp_path / "run" / "base" and torch.equal(torch.get_rng_state(), before)


def test_a_merged_model_carries_its_own_probe(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    _, adapter = llama
    merge_adapter.merge(adapter, tmp_path / "out")
    model, tokenizer = load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / FILE).read_text())["base"] is None
    write_probe(tmp_path / "out", model, tokenizer)


def test_tied_embeddings_are_one_tensor_in_memory_too(llama: tuple[Path, Path]) -> None:
    """Two equal tensors would be saved and loaded as one, and trained apart."""
    _, adapter = llama
    merged = load_model(locate(adapter), adapter="merge")
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
