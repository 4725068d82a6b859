"""A run is resumed on the base model, tokenizer and template that it was started with, whatever its objective."""

import json
import shutil
from itertools import product

import pytest
from safetensors.torch import load_file, save_file

import tunesmith
from tests.matrix.cells import OBJECTIVES
from tests.runs import history, killed_before, recipe
from tunesmith.errors import RecipeError
from tunesmith.train.starting_point import _template_difference


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(recipe, folder of the killed run) for an objective, each made once."""
    made = {}

    def make(objective):
        if objective not in made:
            folder = tmp_path_factory.mktemp(objective)
            adaptation = {"type": "lora", "r": 2} if objective == "sft" else "full"
            settings = recipe(folder, "llama", OBJECTIVES[objective], adaptation, save_steps=1, max_steps=2)
            killed_before(2, settings, folder / "run")
            made[objective] = settings, folder
        return made[objective]

    return make


def change_weights(model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_json(name, **keys):
    def change(model):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(content | keys))

    return change


def change_merges(model):
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(content))


def change_template(model):
    file = model / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>assistant", "<|im_start|>helper"))


def flip_one_bit(model):
    """Flip a bit in a part of the embedding that the fingerprint does not sample."""
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) - 100_000] ^= 1
    file.write_bytes(content)


CHANGES = {
    "one bit": (flip_one_bit, r"model.safetensors: the content differs"),
    "weights": (change_weights, r"safetensors: the content differs"),
    "config": (change_json("config.json", rms_norm_eps=0.5), r"config.json: rms_norm_eps: was 1e-06, is 0.5"),
    "generation": (change_json("generation_config.json", eos_token_id=7), r"generation_config.json: eos_token_id: was 4, is 7"),
    "merges": (change_merges, r"tokenizer: model differs"),
    "end token": (change_json("tokenizer_config.json", eos_token="</s>"), r"tokenizer: eos_token: was '<.im_end.>', is '</s>'"),
    "template": (change_template, r"chat template: line 3: was .*<.im_start.>assistant.*, is .*<.im_start.>helper"),
}


@pytest.mark.parametrize(
    ("objective", "what"),
    [*product(("sft", "dpo", "classify"), CHANGES), *product(("kto", "grpo", "ppo", "reward", "cpt"), ("template", "one bit"))],
)
def test_a_changed_base_is_refused_with_what_changed(what, objective, killed, tmp_path):
    made, folder = killed(objective)
    change, told = CHANGES[what]
    model = folder / "model-llama"
    shutil.copytree(model, tmp_path / "before")
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    try:
        change(model)
        with pytest.raises(RecipeError, match=rf"the base model changed since the run was started[\s\S]*{told}"):
            tunesmith.train(made, out=folder / "run", resume=True)
    finally:
        shutil.rmtree(model)
        shutil.copytree(tmp_path / "before", model)
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before


def test_the_adapter_below_a_continued_run_is_part_of_it(tmp_path):
    first = recipe(tmp_path, adaptation={"type": "lora", "r": 2}, max_steps=1)
    tunesmith.train(first, out=tmp_path / "first")
    made = {**first, "model": str(tmp_path / "first"), "adapter": "continue"}
    made["train"] = {**first["train"], "max_steps": 2, "save_steps": 1}
    killed_before(2, made, tmp_path / "run")
    tunesmith.train({**first, "seed": 1}, out=tmp_path / "other")
    file = tmp_path / "first" / "model"
    shutil.move(file, tmp_path / "kept")
    shutil.copytree(tmp_path / "other" / "model", file)
    with pytest.raises(RecipeError, match=r"adapter/adapter_model.safetensors: the content differs"):
        tunesmith.train(made, out=tmp_path / "run", resume=True)
    shutil.rmtree(file)
    shutil.move(tmp_path / "kept", file)
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert [record["step"] for record in history(tmp_path / "run")] == [1, 2]


def test_a_model_that_was_moved_is_the_same_model(tmp_path):
    """The hashes go by content; a path may change, as long as the recipe finds the model."""
    made = recipe(tmp_path, save_steps=1, max_steps=2)
    killed_before(2, made, tmp_path / "run")
    model = tmp_path / "model-llama"
    shutil.move(model, tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    assert tunesmith.train(made, out=tmp_path / "run", resume=True)["steps"] == 2


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("{{ a }}", "{{ b }}", "line 1: was '{{ a }}', is '{{ b }}'"),
        ("a\nb\nc", "a\nc", "line 2: was 'a\\nb\\nc', is 'a\\nc'"),
        ("x" * 100 + "a" + "y" * 100, "x" * 100 + "y" * 100, f"line 1: was '{'x' * 24}a{'y' * 24}', is '{'x' * 24}{'y' * 24}'"),
        ("", "z" * 500, f"line 1: was '', is '{'z' * 159}…'"),
        (None, "a", "was 'None', is 'a'"),
    ],
)
def test_the_part_of_a_template_that_differs_is_shown(old, new, told):
    assert _template_difference(old, new) == told
