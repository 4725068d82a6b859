"""A model that has a head already, and rows with other labels: what goes on, what is drawn anew, what is refused."""

import json

import pytest
import torch

import tunesmith
from tests.runs import LABELS, labelled, recipe, tagged
from tunesmith.errors import RecipeError

KNOWN = sorted(LABELS)


def on_other_labels(tmp_path, adaptation, names, name="bert"):
    """(folder of a first model, recipe of a second run on it, which learns next to nothing, whose rows have the labels ``names``)."""
    made = recipe(tmp_path, name, "classify", adaptation, max_steps=1)
    first = tunesmith.train(made, out=tmp_path / "first")
    rows = [{**row, "label": names[n % len(names)]} for n, row in enumerate(labelled(12))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made["train"] |= {"learning_rate": 1e-12}
    return first["model_dir"], {**made, "model": first["model_dir"]}


def notes(tmp_path):
    return [
        one for one in json.loads((tmp_path / "second" / "manifest.json").read_text())["notes"] if "a new one is drawn" in one
    ]


def head_of(model):
    """The weight of the layer that knows the labels."""
    return {
        name.rpartition(".")[2]: value for name, value in model.named_parameters() if "classifier" in name or "score" in name
    }["weight"]


@pytest.mark.parametrize("names", [["x", "y", "z"], ["bad", "good"], ["a", "bad", "good", "so so"]])
def test_an_adapter_is_not_trained_on_with_other_labels(names, tmp_path):
    _, second = on_other_labels(tmp_path, {"type": "lora", "r": 2}, names)
    with pytest.raises(
        RecipeError, match=rf"head for the labels bad, good, so so, and is to learn {', '.join(names)}\.\n.*merge"
    ):
        tunesmith.check({**second, "adapter": "continue"})


def test_an_adapter_is_not_trained_on_for_another_task(tmp_path):
    _, second = on_other_labels(tmp_path, {"type": "lora", "r": 2}, KNOWN)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged(4)))
    with pytest.raises(RecipeError, match="trained with a head for rows, and the objective needs a head for words"):
        tunesmith.check({**second, "adapter": "continue", "objective": "tag"})


@pytest.mark.parametrize("names", [["x", "y", "z"], ["bad", "good"], KNOWN])
@pytest.mark.parametrize("name", ["bert", "llama", "roberta"])
def test_a_head_goes_on_with_its_own_labels_only(name, names, tmp_path):
    """With others, as many or not, it is drawn anew, and that is said."""
    first, second = on_other_labels(tmp_path, "full", names, name)
    outcome = tunesmith.train(second, out=tmp_path / "second")
    before, after = (head_of(tunesmith.load(folder)[0]) for folder in (first, outcome["model_dir"]))
    goes_on = before.shape == after.shape and torch.allclose(before, after, atol=1e-6)
    assert goes_on is (names == KNOWN) and len(notes(tmp_path)) == (not goes_on)
    if not goes_on:
        assert 0.01 < float(after.std()) < 0.04  # as transformers draws it, initializer_range 0.02
        assert f"for the labels {', '.join(KNOWN)}: a new one is drawn, for {', '.join(names)}" in notes(tmp_path)[0]


@pytest.mark.parametrize("names", [["x", "y", "z"], KNOWN[::-1]])
def test_a_merged_adapter_hands_its_head_on_with_its_own_labels_only(names, tmp_path):
    _, second = on_other_labels(tmp_path, {"type": "lora", "r": 2}, names)
    outcome = tunesmith.train({**second, "adapter": "merge"}, out=tmp_path / "second")
    base, _ = tunesmith.load(tmp_path / "second" / "base")
    model, _ = tunesmith.load(outcome["model_dir"])
    (after,) = [value for key, value in model.named_parameters() if key.endswith("classifier.modules_to_save.default.weight")]
    goes_on = set(names) == set(KNOWN)
    assert torch.allclose(head_of(base), after, atol=1e-6) is goes_on and len(notes(tmp_path)) == (not goes_on)
    assert list(model.config.id2label.values()) == (KNOWN if goes_on else names)


def test_a_tagger_s_layer_does_not_classify(tmp_path):
    """The classes call it by one name, and it may have as many outputs."""
    made = recipe(tmp_path, "bert", "tag", "full", max_steps=1)
    first = tunesmith.train(made, out=tmp_path / "first")
    second = {
        **recipe(tmp_path, "bert", {"type": "classify", "labels": ["O", "B-LOC"]}, "full", learning_rate=1e-12),
        "model": first["model_dir"],
    }
    rows = [{**row, "label": ["O", "B-LOC"][n % 2]} for n, row in enumerate(labelled(12))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = tunesmith.train(second, out=tmp_path / "second")
    before, after = (head_of(tunesmith.load(folder)[0]) for folder in (first["model_dir"], outcome["model_dir"]))
    assert not torch.allclose(before, after, atol=1e-3) and "(a head for words)" in notes(tmp_path)[0]
