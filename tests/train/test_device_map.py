"""device_map reaches transformers, decides where the run computes, and is refused where nothing could be trained."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import tunesmith
from tests.runs import apart, recipe, weights
from tests.tiny import tiny_model
from tunesmith.errors import RecipeError
from tunesmith.recipe import parse
from tunesmith.train import device_map, distributed, setup

CUDA = torch.device("cuda")


def built(tmp_path, monkeypatch, **keys):
    """What transformers was given for a run's network, and where we moved it."""
    ready = setup.read(parse({**recipe(tmp_path), **keys}), torch.device("cpu"), lambda line: None)
    given, moved = [], []
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def loaded(*args, **options):
        given.append(options.get("device_map"))
        model, report = from_pretrained(*args, **options)
        model.to = lambda *where: moved.append(where)
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    setup.build(ready, tmp_path)
    return given, moved


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_the_map_goes_to_transformers_and_the_run_moves_nothing(device_map, tmp_path, monkeypatch):
    assert built(tmp_path, monkeypatch, device_map=device_map) == ([device_map], [])


def test_without_a_map_the_run_moves_the_model(tmp_path, monkeypatch):
    assert built(tmp_path, monkeypatch) == ([None], [(torch.device("cpu"),)])


def test_a_run_with_a_map_is_the_run_without(tmp_path):
    given = recipe(tmp_path, adaptation={"type": "lora", "r": 4})
    plain = tunesmith.train(given, out=tmp_path / "plain")
    mapped = tunesmith.train({**given, "device_map": {"": "cpu"}}, out=tmp_path / "mapped")
    assert apart(weights(plain["model_dir"]), weights(mapped["model_dir"])) == 0


def test_the_named_device_is_the_one_that_batches_go_to(tmp_path):
    given = parse({**recipe(tmp_path), "device_map": {"": "cpu"}})
    assert setup.read(given, CUDA, lambda line: None).device == torch.device("cpu")
    assert device_map.device_of("auto", CUDA) == CUDA


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gpu", "'gpu' is no device"),
        ({"": "disk"}, "'disk' is no device"),
        ({}, "names no device"),
        ({"": 7}, "7: this machine has 1 GPUs"),
        ({"": "meta"}, "'meta': this machine"),
        ({"model": 0, "lm_head": "cpu"}, "mixes cpu and cuda"),
    ],
)
def test_a_map_that_cannot_work_is_refused(given, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match=words):
        device_map.device_of(given, CUDA)


def test_layers_that_are_not_where_the_others_are_are_refused():
    model = tiny_model("llama")
    device_map.check(model)
    model.model.layers[1].to("meta")
    with pytest.raises(RecipeError, match=r"layers\.1\.self_attn\.q_proj\.weight offloaded to memory"):
        device_map.check(model)


def test_several_processes_and_a_map_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "state", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(RecipeError, match="expected one process, found 2"):
        device_map.device_of("auto", CUDA)
