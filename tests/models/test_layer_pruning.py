"""A pruned model has the weights of fewer layers of another model, is made on this machine, and records how it was made."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.models.test_real import pulled
from tests.tiny import save_tiny
from tunesmith.cli.main import main
from tunesmith.errors import ModelError
from tunesmith.models.find import catalog, model_store
from tunesmith.models.find import pull as pulling
from tunesmith.models.find.folder_summary import show
from tunesmith.models.find.layer_pruning import copy_layers
from tunesmith.models.find.locate import locate
from tunesmith.models.load.load import load, load_model


def closed_form(config):
    """Parameters of a llama with tied embeddings and no biases."""
    width, dim = config["hidden_size"], config["head_dim"]
    attention = 2 * width * dim * (config["num_attention_heads"] + config["num_key_value_heads"])
    layer = attention + 3 * width * config["intermediate_size"] + 2 * width
    return config["vocab_size"] * width + config["num_hidden_layers"] * layer + width


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A catalog of a stored model ``base`` of four layers, and ``half``, every second of them."""
    model_store.models().mkdir(parents=True)
    model_store.install(
        save_tiny("llama", tmp_path / "made", num_hidden_layers=4), "base", {"kind": "hub", "repo": "a/b", "revision": "c" * 40}
    )
    entries = (
        catalog.Entry("base", "", 1, (catalog.Hub("a/b"),)),
        catalog.Entry("half", "a half", 1, (catalog.LayerSubset("base", (0, 2)),)),
    )
    monkeypatch.setattr(catalog, "CATALOG", {entry.name: entry for entry in entries})
    return model_store.folder_of("base")


def pull(name):
    said = []
    return pulling.pull(name, say=said.append), said


def test_the_layers_are_those_of_the_base_and_nothing_is_downloaded(known):
    path, said = pull("half")
    model, tokenizer = load("half")
    base, whole = load("base")
    base.model.layers = torch.nn.ModuleList([base.model.layers[0], base.model.layers[2]])
    base.config.num_hidden_layers = 2
    ids = torch.tensor([tokenizer.encode("the quick brown fox")])
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, base(ids, use_cache=False).logits)
    assert tokenizer.get_vocab() == whole.get_vocab() and said == ["making half of 2 layers of base"]
    config = json.loads((path / "config.json").read_text())
    assert show("half")["total_parameters"] == closed_form(config) == sum(p.numel() for p in model.parameters())


def test_how_it_was_made_is_written_down(known):
    path, _ = pull("half")
    source = (model_store.manifest(path) or {})["source"]
    weights = (model_store.manifest(known) or {})["files"]["model.safetensors"]["sha256"]
    assert source == {
        "kind": "cut", "of": "base", "layers": [0, 2], "of_source": {"kind": "hub", "repo": "a/b", "revision": "c" * 40},
        "of_weights": {"model.safetensors": weights},
    }  # fmt: skip


def test_it_is_made_the_same_again_and_mended(known):
    path, _ = pull("half")
    first = model_store.manifest(path)
    (path / "model.safetensors").write_bytes(b"")
    assert model_store.manifest(pull("half")[0]) == first


def test_the_base_is_pulled_when_it_is_not_here(known, monkeypatch):
    shutil.rmtree(known)
    monkeypatch.setattr("tunesmith.hub.ask.offline_by_user", lambda: True)
    with pytest.raises(ModelError, match=r"base could not be pulled"):
        pull("half")


def test_list_and_show_describe_a_pruned_model(known, capsys):
    pull("half")
    row = next(row for row in catalog.listing() if row["name"] == "half")
    assert (row["origin"], row["layers"], row["present"]) == ("layers 0, 2 of base", 2, True)
    assert row["parameters"] == show("half")["total_parameters"]
    assert main(["show", "half"]) == 0 and "layers 0, 2 of base" in capsys.readouterr().out
    assert main(["models", "list"]) == 0 and "layers 0, 2 of base" in " ".join(capsys.readouterr().out.split())


def test_consecutive_layers_are_printed_as_a_range():
    source = {"kind": "cut", "of": "base", "layers": [0, 1, 2, 5, 7, 8]}
    assert catalog.describe_source(source) == "layers 0-2, 5, 7-8 of base"


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "qwen3"])
def test_settings_of_single_layers_follow_in_other_architectures(architecture, tmp_path):
    base = save_tiny(architecture, tmp_path / "base")
    load_model(locate(copy_layers(base, [1], tmp_path / "cut")))
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config.get("layer_types") in (None, ["full_attention"])
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "base"))
    moved = {
        name.replace("layers.1.", "layers.0.").replace("h.1.", "h.0."): value
        for name, value in theirs.items()
        if ".0." not in name
    }
    assert ours.keys() == moved.keys() and all(torch.equal(ours[name], moved[name]) for name in ours)


def test_a_layer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match="has 2 layers"):
        copy_layers(save_tiny("llama", tmp_path / "base"), [0, 2], tmp_path / "cut")


@pytest.mark.real
def test_the_second_size_of_the_default_model():
    config = json.loads((pulled("smollm2-135m-15l") / "config.json").read_text())
    assert show(pulled("smollm2-135m-15l"))["total_parameters"] == closed_form({"head_dim": 64, **config}) == 81_413_568
