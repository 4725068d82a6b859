"""The record written next to weights notices another base, other weights and another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.adapters import base_and_adapter
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tunesmith import adaptations
from tunesmith.errors import ModelError
from tunesmith.models.find import record as saved_record
from tunesmith.models.find import saved_files
from tunesmith.models.load import probe
from tunesmith.models.load.load import load, load_model, load_tokenizer, locate


def test_the_fingerprint_is_of_the_weights_not_of_the_shards(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert saved_record.fingerprint(tmp_path / "one") == saved_record.fingerprint(tmp_path / "many")
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    assert saved_record.fingerprint(tmp_path / "one") != saved_record.fingerprint(tmp_path / "other")


def test_a_saved_model_passes_its_own_probe(tmp_path: Path) -> None:
    _, adapter = base_and_adapter(tmp_path)
    model, tokenizer = load(adapter)
    assert probe.verify_probe(adapter, model, tokenizer) == 0.0
    model.train()
    probe.write_probe(adapter, model, tokenizer)
    assert model.training


def test_other_weights_fail_the_probe(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("chatml")
    save_tiny("llama", tmp_path)
    probe.write_probe(tmp_path, model, tokenizer)
    load(tmp_path)
    save_tiny("llama", tmp_path, seed=1)
    with pytest.raises(ModelError, match=r"model\.safetensors changed since the model was saved"):
        load(tmp_path)
    without(tmp_path, "files")
    with pytest.raises(ModelError, match="does not answer as it did"):
        load(tmp_path)


def without(folder: Path, *keys: str) -> None:
    """Take ``keys`` out of the folder's tunesmith.json; without ``files`` nothing is hashed."""
    record = saved_record.read(folder)
    saved_record.write(folder, {key: record[key] for key in record if key not in keys})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", ["lora", "qlora", "bottleneck", "ia3", "prefix", "prompt"])
def test_an_adapter_that_does_nothing_is_caught_in_bf16(kind: str, base: Path, tmp_path: Path) -> None:
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    part, tokenizer = adaptations.module(kind), load_tokenizer(locate(base))
    adaptation = part.Adaptation(part.Config())
    loaded = load_model(locate(base), dtype=torch.bfloat16, **adaptation.load_kwargs())
    model = adaptation.apply(loaded, "lm", (), tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adaptation.save(model, tmp_path)
    probe.write_probe(tmp_path, model, tokenizer)
    load(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    nothing = 1.0 if kind == "ia3" else 0.0
    save_file({name: torch.full_like(value, nothing) for name, value in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=r"adapter_model.safetensors changed .* sha256"):
        load(tmp_path)


def test_a_config_that_was_edited_is_named_and_may_be_meant(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path)
    config = adapter / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"base_model_name_or_path": str(base.resolve())}))
    (adapter / "README.md").write_text("an adapter")
    load(adapter)
    config.write_text(json.dumps(settings | {"lora_dropout": 0.5}))  # changes no answer
    with pytest.raises(ModelError, match=r"(?s)adapter_config.json changed .* type: tunesmith verify .* --accept"):
        load(adapter)
    assert saved_files.accept(adapter)["base"] == saved_record.read(adapter)["base"] is not None
    load(adapter)


def test_another_tokenizer_fails_the_probe(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    probe.write_probe(tmp_path, tiny_model("llama"), tiny_tokenizer("chatml"))
    record = saved_record.read(tmp_path)
    record["probe"]["answers"][0]["input_ids"][0] += 1
    saved_record.write(tmp_path, record)
    with pytest.raises(ModelError, match="the tokenizer turns"):
        load(tmp_path)


def test_a_foreign_folder_has_no_probe(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, tokenizer = load(tmp_path)
    assert probe.verify_probe(tmp_path, model, tokenizer) is None
