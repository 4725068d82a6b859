"""A LoRA that peft would not restore from its saved folder is refused before training, and where it is loaded."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tunesmith
from tests.matrix import architectures
from tests.runs import recipe
from tests.tiny import tiny_model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.adapters import restored_names

LOST = {"laguna": "mlp.shared_experts.down_proj", "inkling2_text": "self_attn.k_sconv.weight_proj"}
"""Architecture -> a layer whose name a pattern of transformers renames once more."""


def adapted(model, **keys):
    return get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear", **keys))


@pytest.fixture(scope="module", params=LOST)
def architecture(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    architectures.save(request.param, folder / "base")
    return request.param, folder


def test_training_is_refused_before_the_data_are_read(architecture, tmp_path):
    name, folder = architecture
    made = recipe(tmp_path, adaptation="lora")
    made |= {"model": str(folder / "base"), "data": {"train": [{"path": str(tmp_path / "absent.jsonl")}]}}
    with pytest.raises(RecipeError, match=f"peft would not restore the LoRA on .*{LOST[name]}") as error:
        tunesmith.train(made, out=tmp_path / "run")
    assert "Set adaptation.target_modules: [" in str(error.value) and not (tmp_path / "run" / "model").exists()


def test_the_other_layers_that_the_error_names_are_trained_and_loaded(architecture, tmp_path):
    _, folder = architecture
    made = recipe(tmp_path, adaptation="lora", max_steps=1)
    made["model"] = str(folder / "base")
    with pytest.raises(RecipeError) as error:
        tunesmith.train(made, out=tmp_path / "run")
    named = str(error.value).partition("target_modules: [")[2].partition("]")[0].split(", ")
    made["adaptation"] = {"type": "lora", "target_modules": named, "r": 4}
    tunesmith.load(tunesmith.train(made, out=tmp_path / "again")["model_dir"])


def test_an_adapter_that_peft_saved_is_refused_where_it_is_loaded(architecture, tmp_path):
    name, folder = architecture
    adapted(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=f"peft restores no LoRA on .*{LOST[name]}"):
        tunesmith.load(tmp_path / "adapter")


@pytest.mark.parametrize("keys", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_every_layer_of_an_ordinary_model_is_restored(keys):
    assert restored_names.unrestored_layers(adapted(tiny_model("llama", tie_word_embeddings=False), **keys)) == []
