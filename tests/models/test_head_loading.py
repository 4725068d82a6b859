"""A saved head goes on with its own labels only: with others an untrained head replaces it, or the run is refused."""

import json

import pytest
import torch

import tunesmith
from tests.runs import LABELS, labelled, recipe, tagged
from tunesmith.errors import RecipeError
from tunesmith.models.find.locate import locate
from tunesmith.models.load import head_loading
from tunesmith.models.load.load import load_config, load_model

KNOWN = sorted(LABELS)
LORA = {"type": "lora", "r": 2}
OTHERS = [["x", "y", "z"], ["bad", "good"]]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A function that returns the model folder of a run; each (network, objective, adaptation) is trained once."""
    saved = {}

    def train(name="bert", objective="classify", adaptation="full"):
        key = (name, objective, str(adaptation))
        if key not in saved:
            folder = tmp_path_factory.mktemp("first")
            made = recipe(folder, name, objective, adaptation, max_steps=1)
            saved[key] = tunesmith.train(made, out=folder / "run")["model_dir"]
        return saved[key]

    return train


def second(tmp_path, model, names, adaptation="full", objective="classify"):
    """Return a recipe on ``model`` with a very small learning rate and rows of the labels ``names``."""
    made = recipe(tmp_path, "bert", objective, adaptation, max_steps=1, learning_rate=1e-12)
    rows = [{**row, "label": names[n % len(names)]} for n, row in enumerate(labelled(12))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**made, "model": model}


def notes(run):
    manifest = json.loads((run / "manifest.json").read_text())
    return [note for note in manifest["notes"] if "an untrained head" in note]


def head_of(model):
    """The weight of the layer with one output per label."""
    weights = {
        name.rpartition(".")[2]: value for name, value in model.named_parameters() if "classifier" in name or "score" in name
    }
    return weights["weight"]


@pytest.mark.parametrize("names", [*OTHERS, ["a", "bad", "good", "so so"]])
def test_an_adapter_is_not_continued_with_other_labels(names, first, tmp_path):
    made = second(tmp_path, first(adaptation=LORA), names, LORA)
    words = rf"head for the labels bad, good, so so, and the data have the labels {', '.join(names)}\.\n.*merge"
    with pytest.raises(RecipeError, match=words):
        tunesmith.check({**made, "adapter": "continue"})


def test_an_adapter_is_not_continued_for_another_task(first, tmp_path):
    made = second(tmp_path, first(adaptation=LORA), KNOWN, LORA, "tag")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged(4)))
    words = "trained with a sequence-classification head, and the objective needs a token-classification head"
    with pytest.raises(RecipeError, match=words):
        tunesmith.check({**made, "adapter": "continue"})


@pytest.mark.parametrize("names", [*OTHERS, KNOWN])
@pytest.mark.parametrize("name", ["bert", "llama", "roberta"])
def test_a_head_is_loaded_for_its_own_labels_only(name, names, first):
    """With other labels, as many or not, its weights are drawn as transformers draws them, and a note says so."""
    folder = locate(first(name))
    wanted = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {label: n for n, label in enumerate(names)},
    }
    said = head_loading.replace_head_config(load_config(folder), folder, None, "score", wanted)
    torch.manual_seed(0)
    before, after = head_of(load_model(folder)), head_of(load_model(folder, head="score", head_config=wanted))
    goes_on = names == KNOWN
    assert (before.shape == after.shape and torch.equal(before, after)) is goes_on and len(said) == (not goes_on)
    if not goes_on:
        assert 0.01 < float(after.std()) < 0.04  # initializer_range 0.02
        assert (
            f"a head for the labels {', '.join(KNOWN)}: an untrained head for the labels {', '.join(names)} replaces it"
            in said[0]
        )


@pytest.mark.parametrize("names", [OTHERS[0], KNOWN])
def test_a_run_trains_the_head_that_its_labels_ask_for(names, first, tmp_path):
    outcome = tunesmith.train(second(tmp_path, first(), names), out=tmp_path / "second")
    before, after = (head_of(tunesmith.load(folder)[0]) for folder in (first(), outcome["model_dir"]))
    goes_on = names == KNOWN
    assert torch.allclose(before, after, atol=1e-6) is goes_on and len(notes(tmp_path / "second")) == (not goes_on)


@pytest.mark.parametrize("names", [OTHERS[0], KNOWN[::-1]])
def test_a_merged_adapter_passes_its_head_on_with_its_own_labels_only(names, first, tmp_path):
    made = second(tmp_path, first(adaptation=LORA), names, LORA)
    outcome = tunesmith.train({**made, "adapter": "merge"}, out=tmp_path / "second")
    base, _ = tunesmith.load(tmp_path / "second" / "base")
    model, _ = tunesmith.load(outcome["model_dir"])
    (after,) = [value for key, value in model.named_parameters() if key.endswith("classifier.modules_to_save.default.weight")]
    goes_on = set(names) == set(KNOWN)
    assert torch.allclose(head_of(base), after, atol=1e-6) is goes_on and len(notes(tmp_path / "second")) == (not goes_on)
    assert list(model.config.id2label.values()) == (KNOWN if goes_on else names)


def test_a_tagger_s_layer_does_not_classify(first, tmp_path):
    """Both classes of transformers use the same name for it, and it may have the same number of outputs."""
    tagger, labels = first(objective="tag"), ["O", "B-LOC", "I-LOC"]
    made = second(tmp_path, tagger, labels, objective={"type": "classify", "labels": labels})
    outcome = tunesmith.train(made, out=tmp_path / "second")
    before, after = (head_of(tunesmith.load(folder)[0]) for folder in (tagger, outcome["model_dir"]))
    assert not torch.allclose(before, after, atol=1e-3)
    assert "has a token-classification head" in notes(tmp_path / "second")[0]
