"""Folders are checked before a weight is read, and loading is strict both ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.adapters import base_and_adapter, save_adapter
from tests.tiny import save_tiny, tiny_model
from tunesmith.errors import ModelError, UserError
from tunesmith.models.find import record as saved_record
from tunesmith.models.find import saved_files
from tunesmith.models.load.load import Folder, load, load_config, load_model, load_tokenizer, locate

IDS = torch.tensor([[5, 17, 80, 41]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, to be copied."""
    return save_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model and an adapter on it, not to be changed."""
    return base_and_adapter(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def adapter(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the adapter, on the same base."""
    return Path(shutil.copytree(pair[1], tmp_path / "adapter"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_full_model_is_found_and_loads_as_it_was_saved(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    folder = locate(tmp_path / "m")
    assert folder == Folder((tmp_path / "m").resolve(), "full")
    model, tokenizer = load(tmp_path / "m")
    assert not model.training and model.dtype == torch.float32 and tokenizer.chat_template
    assert torch.equal(model(IDS).logits, tiny_model("llama", eos_token_id=4)(IDS).logits)
    assert load_config(folder).model_type == "llama"


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma", "mistral", "gemma3"])
def test_every_tiny_architecture_loads_strictly(tmp_path: Path, name: str) -> None:
    save_tiny(name, tmp_path)
    assert torch.equal(load(tmp_path)[0](IDS).logits, tiny_model(name, eos_token_id=4)(IDS).logits)


def test_the_checkpoints_dtype_is_kept_by_default(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    folder = locate(tmp_path)
    assert load_model(folder).dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float32).dtype == torch.float32


def test_a_run_folder_leads_to_its_model(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: x\n")
    with pytest.raises(ModelError, match="saved no model yet"):
        locate(tmp_path)
    save_tiny("llama", tmp_path / "model")
    expected = Folder((tmp_path / "model").resolve(), "full", None, tmp_path.resolve())
    assert locate(tmp_path) == expected == locate(tmp_path / "model")


def test_an_adapter_is_found_with_its_base_and_answers_as_before(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    trained = save_adapter(base, tmp_path / "adapter")
    folder = locate(tmp_path / "adapter")
    assert folder == Folder((tmp_path / "adapter").resolve(), "adapter", base.resolve())
    loaded = load_model(folder)
    assert torch.equal(loaded(IDS).logits, trained(IDS).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    names = {name for name, parameter in load_model(folder, trainable=True).named_parameters() if parameter.requires_grad}
    assert names and all("lora_" in name for name in names)


def test_an_adapter_can_be_ignored_or_merged(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    plain = load_model(locate(adapter), adapter="ignore")
    assert torch.equal(plain(IDS).logits, load(base)[0](IDS).logits)
    merged = load_model(locate(adapter), adapter="merge", trainable=True)
    assert not hasattr(merged, "peft_config") and all(parameter.requires_grad for parameter in merged.parameters())
    assert torch.allclose(merged(IDS).logits, load(adapter)[0](IDS).logits, atol=1e-4)


def test_base_and_adapter_can_be_moved_together(tmp_path: Path) -> None:
    base_and_adapter(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert load(tmp_path / "there" / "adapter")[0](IDS) is not None
    assert locate(tmp_path / "there" / "adapter").base == (tmp_path / "there" / "base").resolve()


def test_the_base_is_found_by_a_path_relative_to_the_adapter(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path)
    edit(adapter / "adapter_config.json", base_model_name_or_path="../base")
    saved_record.write(adapter, saved_record.read(adapter) | {"base": {"name": None, "path": "/nowhere", "fingerprint": None}})
    assert locate(adapter).base == base.resolve()
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="is not on this machine"):
        locate(adapter)


PICKLES = ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth", "model.pkl", "model.ckpt", "weights.pickle"]


@pytest.mark.parametrize("name", PICKLES)
def test_pickled_weights_are_refused_by_name(tmp_path: Path, name: str, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(ModelError, match=rf"{name}.*runs code"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_adapter_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin.*runs code"):
        locate(adapter)


def test_a_folder_without_weights_is_refused(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        locate(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_refused(tmp_path: Path, file: str, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / file, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="auto_map"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


KERNELS = [
    {"_attn_implementation": "someone/evil-kernel"},
    {"attn_implementation": {"": "someone/evil-kernel"}},
    {"text_config": {"_attn_implementation_internal": "someone/evil-kernel"}},
    {"sub": [{"_experts_implementation": "someone/evil"}]},
]


@pytest.mark.parametrize("key", KERNELS, ids=str)
def test_kernels_of_the_hub_are_refused(tmp_path: Path, key: dict[str, object], tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "config.json", **key)
    with pytest.raises(ModelError, match="kernel"):
        locate(tmp_path)


def test_an_unknown_architecture_is_a_model_error(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "config.json", model_type="martian")
    with pytest.raises(ModelError, match=r"cannot be loaded.*martian"):
        load_config(locate(tmp_path))


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Did you mean `minilm-l6`"):
        locate("minilm-16")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        locate(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"no config\.json"):
        locate(tmp_path)


def test_a_missing_tensor_of_a_full_model_is_named(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    change_weights(tmp_path / "model.safetensors", lambda weights: [weights.pop("model.layers.1.mlp.up_proj.weight")])
    with pytest.raises(ModelError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_an_unexpected_tensor_of_a_full_model_is_named(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    change_weights(tmp_path / "model.safetensors", lambda weights: weights.update({"model.extra.weight": torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"unexpected: model\.extra\.weight"):
        load(tmp_path)


def test_a_tensor_of_another_shape_is_a_model_error(tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    change_weights(tmp_path / "model.safetensors", lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def test_a_dropped_adapter_key_is_named(adapter: Path) -> None:
    change_weights(adapter / "adapter_model.safetensors", lambda weights: [weights.pop(KEY)])
    saved_files.accept(adapter)
    with pytest.raises(ModelError, match=f"missing: {KEY}"):
        load(adapter)


@pytest.mark.parametrize("renamed", [KEY.replace("q_proj", "q_prj"), KEY.replace(".weight", ".default.weight")])
def test_a_renamed_adapter_key_is_named(renamed: str, adapter: Path) -> None:
    change_weights(adapter / "adapter_model.safetensors", lambda weights: weights.update({renamed: weights.pop(KEY)}))
    saved_files.accept(adapter)
    with pytest.raises(ModelError, match=f"missing: {KEY}"):
        load(adapter)


def test_an_adapter_refuses_another_base(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path)
    save_tiny("llama", base, seed=7)
    with pytest.raises(ModelError, match="trained on another model"):
        load(adapter)


def test_modules_to_save_and_dora_come_back(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", tie_word_embeddings=False)
    trained = save_adapter(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True)
    assert torch.equal(load(tmp_path / "a")[0](IDS).logits, trained(IDS).logits)


def test_prompt_tuning_cannot_be_merged(tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    base = save_tiny("llama", tmp_path / "base")
    model = get_peft_model(load_model(locate(base)), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="nothing to merge"):
        load_model(locate(tmp_path / "a"), adapter="merge")


def test_the_tokenizer_of_the_base_serves_an_adapter_without_one(adapter: Path) -> None:
    for file in adapter.glob("*token*"):
        file.unlink()
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    saved_files.accept(adapter)
    assert load_tokenizer(locate(adapter)).chat_template
