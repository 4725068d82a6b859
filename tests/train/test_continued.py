"""A run that continues an adapter takes the keys that made it; other keys are refused."""

import shutil

import pytest
import yaml

import tunesmith
from tests.runs import apart, recipe, weights
from tunesmith.errors import RecipeError
from tunesmith.models.find import record
from tunesmith.train import reproduce

KINDS = {
    "lora": ({"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}, {"r": 3}),
    "pissa": ({"type": "lora", "r": 4, "init_lora_weights": "pissa"}, {"r": 16}),
    "int8": ({"type": "qlora", "r": 4, "quant_type": "int8"}, {"quant_type": "fp4"}),
    "bottleneck": ({"type": "bottleneck", "reduction_factor": 4}, {"reduction_factor": 2}),
    "prompt": ({"type": "prompt", "num_virtual_tokens": 3, "prompt_tuning_init_text": "a b c"}, {"prompt_tuning_init_text": "b"}),
}


@pytest.fixture(scope="module", params=KINDS)
def first(request, tmp_path_factory):
    """(recipe, folder of its run, keys of another adapter)."""
    keys, other = KINDS[request.param]
    if keys["type"] == "qlora":
        pytest.importorskip("bitsandbytes")
    place = tmp_path_factory.mktemp("first")
    made = recipe(place, adaptation=keys, max_steps=1)
    tunesmith.train(made, out=place / "run")
    return made, place / "run", other


def on(first, **changes):
    made, folder, _ = first
    adaptation = {**made["adaptation"], **changes}
    return {**made, "model": str(folder / "model"), "adapter": "continue", "adaptation": adaptation}


def test_the_keys_that_made_an_adapter_train_it_on_and_others_do_not(first, tmp_path):
    tunesmith.train(on(first), out=tmp_path / "on")
    resolved = yaml.safe_load((tmp_path / "on" / "recipe.yaml").read_text())
    tunesmith.check({**resolved, "model": str(tmp_path / "on" / "model")})  # the second generation still knows them
    with pytest.raises(RecipeError, match=rf"names another {'|'.join(first[2])} \(it has"):
        tunesmith.check(on(first, **first[2]))


@pytest.mark.parametrize(
    "first",
    ["lora", "pissa", "prompt", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("int8", "bottleneck"))],
    indirect=True,
)
def test_a_run_goes_on_and_is_repeated_from_its_own_recipe(first, tmp_path):
    _, folder, _ = first
    bare = {**on(first), "adaptation": first[0]["adaptation"]["type"]}  # all keys at defaults that the adapter does not have
    for name, start in (("new", folder), ("on", None)):
        if start is None:
            tunesmith.train(bare, out=tmp_path / name)
        else:
            shutil.copytree(folder, tmp_path / name)
        again = reproduce.reproduce(tmp_path / name)
        assert again["weights_equal"], name
        tunesmith.train(str(tmp_path / name / "recipe.yaml"), out=tmp_path / name, resume=True)


def test_an_adapter_without_a_record_is_compared_by_pefts_config(tmp_path):
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 4, "init_lora_weights": "pissa"}, max_steps=1)
    outcome = tunesmith.train(made, out=tmp_path / "run")
    record.write(tmp_path / "run" / "model", record.read(tmp_path / "run" / "model") | {"adaptation": None})
    further = {**made, "model": outcome["model_dir"], "adapter": "continue"}
    second = tunesmith.train({**further, "adaptation": "lora"}, out=tmp_path / "second")
    assert apart(weights(outcome["model_dir"]), weights(second["model_dir"])) > 0
    with pytest.raises(RecipeError, match=r"names another r \(it has 8\)"):
        tunesmith.check({**further, "adaptation": {"type": "lora", "r": 4}})
