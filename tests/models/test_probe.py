"""The probe written beside weights notices another base, other weights and another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.models.adapters import base_and_adapter
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tunesmith.errors import ModelError
from tunesmith.models import probe
from tunesmith.models.load import load


def test_the_fingerprint_is_of_the_weights_not_of_the_shards(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert probe.fingerprint(tmp_path / "one") == probe.fingerprint(tmp_path / "many")
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    assert probe.fingerprint(tmp_path / "one") != probe.fingerprint(tmp_path / "other")


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
    with pytest.raises(ModelError, match="does not answer as it did"):
        load(tmp_path)


def test_another_tokenizer_fails_the_probe(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    probe.write_probe(tmp_path, tiny_model("llama"), tiny_tokenizer("chatml"))
    record = json.loads((tmp_path / probe.FILE).read_text())
    record["probe"]["answers"][0]["input_ids"][0] += 1
    (tmp_path / probe.FILE).write_text(json.dumps(record))
    with pytest.raises(ModelError, match="the tokenizer turns"):
        load(tmp_path)


def test_a_foreign_folder_has_no_probe(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, tokenizer = load(tmp_path)
    assert probe.verify_probe(tmp_path, model, tokenizer) is None
