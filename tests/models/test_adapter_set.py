"""Adapters found under a folder, and several adapters on one base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config
from safetensors.torch import load_file, save_file

import tunesmith
from tests.models import virtual_tokens
from tests.models.adapters import save_adapter
from tests.runs import recipe
from tests.tiny import save_tiny
from tunesmith.errors import TunesmithError, UserError
from tunesmith.models.adapters import bottleneck_tuner
from tunesmith.models.adapters.adapter_set import find, load_adapters
from tunesmith.models.find import saved_files

IDS = torch.tensor([[5, 17, 80, 41, 300, 9]])


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    base = save_tiny("llama", folder / "base")
    save_adapter(base, folder / "one", seed=1)
    save_adapter(base, folder / "two", seed=2, r=2, modules_to_save=["norm"])
    return folder


def test_each_answers_as_it_does_alone(shelf):
    alone = {name: tunesmith.load(shelf / name)[0](IDS).logits for name in ("one", "two", "base")}
    several = load_adapters(shelf / "base", {"one": shelf / "one", "two": shelf / "two"})
    assert several.active == "one" and several.names == ["one", "two", "base"]
    for name in ("one", "two", "base", "two", "one"):
        assert several.switch(name) < 0.1
        assert several.active == name
        assert torch.equal(several.model(IDS).logits, alone[name]), name
    assert not any(parameter.requires_grad for parameter in several.model.parameters())


def test_the_base_of_an_adapter_will_do(shelf):
    assert load_adapters(shelf / "two", {"x": shelf / "one"}).active == "x"


def ia3(**keys):
    return IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **keys
    )


def bottleneck(**keys):
    bottleneck_tuner.register()
    return bottleneck_tuner.BottleneckConfig(task_type="CAUSAL_LM", **keys)


CONFIGS = {
    "ia3": (ia3, {}, {"exclude_modules": ["v_proj"]}),
    "bottleneck": (bottleneck, {"variant": "houlsby", "dropout": 0.1}, {"bottleneck_size": 8}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_other_kinds_too(kind, shelf, tmp_path):
    make, *variants = CONFIGS[kind]
    folders = {"a": tmp_path / "a", "b": tmp_path / "b"}
    for seed, (folder, keys) in enumerate(zip(folders.values(), variants, strict=True)):
        save_adapter(shelf / "base", folder, seed, make(**keys))
    alone = {name: tunesmith.load(folder)[0](IDS).logits for name, folder in {**folders, "base": shelf / "base"}.items()}
    several = load_adapters(shelf / "base", folders)
    for name in ("a", "b", "base", "b", "a"):
        several.switch(name)
        assert torch.equal(several.model(IDS).logits, alone[name]), name
    assert not torch.equal(alone["a"], alone["b"]) and not torch.equal(alone["a"], alone["base"])
    assert not any(parameter.requires_grad for parameter in several.model.parameters())


@pytest.mark.parametrize("kind", virtual_tokens.KINDS)
def test_virtual_tokens_are_loaded_alone(kind, shelf, tmp_path):
    model = virtual_tokens.adapted("llama", kind)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(shelf / "base")}))
    with pytest.raises(UserError, match=f"is a {kind}_tuning adapter; only lora, ia3, bottleneck adapters can be loaded"):
        load_adapters(shelf / "base", {"a": tmp_path})


def test_adapters_that_must_be_loaded_alone_are_refused(shelf, tmp_path):
    other = save_tiny("llama", tmp_path / "other", intermediate_size=48)
    save_adapter(other, tmp_path / "stranger")
    save_adapter(shelf / "base", tmp_path / "rows", trainable_token_indices=[3])
    save_adapter(shelf / "base", tmp_path / "short")
    tensors = load_file(tmp_path / "short" / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, tmp_path / "short" / "adapter_model.safetensors", metadata={"format": "pt"})
    saved_files.accept(tmp_path / "short")
    tunesmith.merge(shelf / "one", tmp_path / "merged")
    refused = {"stranger": "another model", "rows": "adds tokens", "short": "missing", "merged": "is a full model"}
    for name, message in refused.items():
        with pytest.raises(TunesmithError, match=message) as error:
            load_adapters(shelf / "base", {"one": shelf / "one", "x": tmp_path / name})
        assert error.value.exit_code == 2
    with pytest.raises(TunesmithError, match="no adapter called 'three'"):
        load_adapters(shelf / "base", {"one": shelf / "one"}).switch("three")


@pytest.mark.parametrize("order", [("whole", "factors"), ("factors", "whole")])
@pytest.mark.parametrize(("module", "layer"), [("embed_tokens", "embed_tokens"), ("mlp", "up_proj")])
def test_a_layer_is_trained_whole_or_has_factors(module, layer, order, shelf, tmp_path):
    save_adapter(shelf / "base", tmp_path / "whole", target_modules=["q_proj"], modules_to_save=[module])
    save_adapter(shelf / "base", tmp_path / "factors", target_modules=[layer, "q_proj"])
    with pytest.raises(UserError, match=rf"^whole trained the whole layer model\.\S*{layer} .* factors has parameters"):
        load_adapters(shelf / "base", {name: tmp_path / name for name in order})


def test_adapters_are_found_with_their_runs(tmp_path):
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 3}, save_steps=1, max_steps=1, count=6)
    made["data"]["eval"] = {"fraction": 0.3}
    outcome = tunesmith.train(made, out=tmp_path / "runs" / "first")
    save_adapter(save_tiny("llama", tmp_path / "base"), tmp_path / "runs" / "deep" / "other")
    other, first = find(tmp_path / "runs")
    assert first["run"] == str(tmp_path / "runs" / "first") and first["eval_loss"] == outcome["eval_loss"] is not None
    assert first["parameters"] == outcome["trainable_parameters"] and first["bytes"] > 4 * first["parameters"]
    assert (first["type"], first["r"], other["r"], other["eval_loss"]) == ("lora", 3, 4, None)
    assert find(tmp_path / "base") == []
    with pytest.raises(TunesmithError, match="no folder called"):
        find(tmp_path / "none")


def test_a_broken_folder_is_listed_with_its_problem(shelf, tmp_path, capsys):
    from tunesmith.cli.main import main

    for name in ("cut", "empty", "garbled", "whole"):
        shutil.copytree(shelf / "one", tmp_path / name)
    cut = tmp_path / "cut" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    (tmp_path / "garbled" / "adapter_config.json").write_text("{")
    said = {Path(one["path"]).name: one["problem"] for one in find(tmp_path)}
    assert said["whole"] is None
    assert "cut short" in said["cut"] and "has no weights" in said["empty"] and "not valid JSON" in said["garbled"]
    assert main(["adapters", "list", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("cannot be read") == 3 and "lora" in printed


def test_the_verbs(shelf, tmp_path, capsys, monkeypatch):
    import io

    from tunesmith.cli.main import main

    assert main(["adapters", "list", str(shelf), "--json"]) == 0
    assert [one["r"] for one in json.loads(capsys.readouterr().out)["adapters"]] == [4, 2]
    save_adapter(shelf / "base", tmp_path / "three", seed=3)
    parts = [str(shelf / "one"), str(tmp_path / "three")]
    assert main(["adapters", "combine", *parts, "--weights", "0.7,x", "--out", str(tmp_path / "sum")]) == 2
    assert main(["adapters", "combine", *parts, "--weights", "0.7,0.3", "--out", str(tmp_path / "sum"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["distances"]["cat"] < 1e-6
    given = ["--adapter", f"one={shelf / 'one'}", "--adapter", f"sum={tmp_path / 'sum'}"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/adapter sum\n/adapter who\n/adapter base\nHi\n"))
    assert main(["chat", str(shelf / "base"), *given, "--max-new-tokens", "3", "--temperature", "0", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["adapter"] == "base" and len(found["messages"]) == 4
    assert "adapter: one" in said.err and "adapter: sum" in said.err and "there are one, sum, base" in said.err
    assert main(["chat", str(shelf / "base"), "--adapter", "one"]) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err


def test_a_chat_with_an_adapter_begins_with_it(shelf, capsys, monkeypatch):
    import io

    from tunesmith.cli.main import main

    given = ["--max-new-tokens", "3", "--temperature", "0", "--json"]
    answers = {}
    for case, options in {
        "alone": [],
        "two": ["--adapter", f"two={shelf / 'two'}"],
        "one": ["--adapter", f"one={shelf / 'two'}"],
    }.items():
        monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
        assert main(["chat", str(shelf / "one"), *options, *given]) == 0
        said = capsys.readouterr()
        answers[case] = json.loads(said.out)
        names = {"two": "there are one, two, base", "one": "there are one_, one, base"}
        assert case == "alone" or names[case] in said.err
    assert answers["two"]["adapter"] == "one" and answers["one"]["adapter"] == "one_"
    assert answers["alone"]["messages"] == answers["two"]["messages"]
