"""The result of a run: the figure that chose its model, and the commands that use the model next."""

import json
from pathlib import Path

import pytest
import torch

import tunesmith
from tests.runs import recipe
from tunesmith import recipe as recipes
from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.find.locate import locate
from tunesmith.models.load.load import load
from tunesmith.runs import metrics_file


def evaluated(folder, **settings):
    plan = recipe(folder, "bert", "classify", **settings)
    return {**plan, "data": {**plan["data"], "eval": {"fraction": 0.4}}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A classifier whose model is chosen by a figure that is not its objective's own, evaluated at every step."""
    folder = tmp_path_factory.mktemp("chosen")
    steps = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "save_total_limit": 9}
    plan = evaluated(folder, adaptation="lora", metric_for_best_model="accuracy", **steps)
    return plan, tunesmith.train(plan, out=folder / "run")


def test_any_reported_figure_chooses_the_model(finished):
    _, outcome = finished
    records = [one for one in metrics_file.read(f"{outcome['run_dir']}/metrics.jsonl") if one["kind"] == "eval" and one["step"]]
    best = next(one["step"] for one in records if one["eval_accuracy"] == max(other["eval_accuracy"] for other in records))
    assert outcome["best_step"] == best


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["train.metric_for_best_model=acuracy"],
            "classify reports no figure 'acuracy' that can choose a model. Did you mean `accuracy`?",
        ),
        (["train.metric_for_best_model=accuracy", "data.eval.fraction=0"], "does nothing: no row is held out"),
        (["objective=dpo", "train.metric_for_best_model=kl"], "dpo reports no figure 'kl'"),
    ],
)
def test_a_figure_that_chooses_nothing_is_refused_with_the_recipe(tmp_path, overrides, said):
    plan = evaluated(tmp_path)
    with pytest.raises(RecipeError) as error:
        recipes.parse(plan, overrides)
    assert said in str(error.value)


def test_figures_of_sets_and_names_as_evaluations_write_them_are_known(tmp_path):
    plan = evaluated(tmp_path)
    for overrides in (
        ["train.metric_for_best_model=eval_macro_f1"],
        ["data.eval.sets.ko.path=x.json", "train.metric_for_best_model=ko_loss"],
    ):
        recipes.parse(plan, overrides)


def test_a_figure_that_these_rows_lack_stops_before_the_first_step(tmp_path):
    plan = evaluated(tmp_path, max_steps=2, metric_for_best_model="spearman")
    with pytest.raises(RecipeError, match=r"these rows have no figure 'spearman'.*accuracy"):
        tunesmith.train(plan, out=tmp_path / "run")
    assert all(one["kind"] != "train" for one in metrics_file.read(tmp_path / "run/metrics.jsonl"))


def test_a_finished_run_prints_how_to_train_its_model_further(finished, capsys):
    from rich.console import Console

    plan, outcome = finished
    tunesmith.train(plan, out=outcome["run_dir"], resume=True, console=Console(stderr=True, width=400))
    assert f"model={outcome['run_dir']} adapter=continue --out DIR" in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"This run is finished\. To train its model further"):
        tunesmith.train(plan, out=outcome["run_dir"], resume=True, overrides=["train.max_steps=9"])


@pytest.mark.parametrize("adaptation", ["full", "lora", "bottleneck"])
def test_a_checkpoint_opens_as_the_model_of_its_step(tmp_path, adaptation):
    """It answers as the model of a run that ends at that step."""
    plan = recipe(tmp_path, adaptation=adaptation, max_steps=3, save_steps=1, save_total_limit=9, lr_scheduler_type="constant")
    long = Path(tunesmith.train(plan, out=tmp_path / "long")["run_dir"])
    short = tunesmith.train(plan, out=tmp_path / "short", overrides=["train.max_steps=1"])["run_dir"]
    checkpoint = long / "checkpoints" / "step-1"
    (from_checkpoint, _), (expected, _), (last, _) = map(load, (checkpoint, short, long))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        logits = [model(ids).logits for model in (from_checkpoint, expected, last)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert locate(long / "checkpoints" / "step-3") == locate(long)  # the saved model is that of the last step
    with pytest.raises(ModelError, match=r"generate, chat, evaluate.*\n.*of step 3"):
        locate(checkpoint)  # merge, export, train
    state = checkpoint / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="does not match its checksum"):
        load(checkpoint)


def test_predict_reads_columns_and_length_as_the_training_did(tmp_path):
    plan = recipe(tmp_path, "bert", {"type": "classify", "overlong": "truncate"}, max_steps=1, max_length=8)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    moved = [{"said": row["text"], "text": "x", "mood": row["label"]} for row in rows]
    (tmp_path / "moved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in moved))
    plan["data"]["train"] = [{"path": str(tmp_path / "moved.jsonl"), "columns": {"text": "said", "label": "mood"}}]
    model = tunesmith.train(plan, out=tmp_path / "run")["model_dir"]
    notes = []
    by_memory = list(tunesmith.predict(model, tmp_path / "moved.jsonl", note=notes.append))
    told = {"columns": {"text": "said", "label": "mood"}, "max_length": 8}
    assert by_memory == list(tunesmith.predict(model, tmp_path / "moved.jsonl", **told)) and "8 tokens" in notes[0]
    assert by_memory != list(tunesmith.predict(model, tmp_path / "moved.jsonl", columns={"text": "text"}))
    (tmp_path / "plain.jsonl").write_text('{"text": "a lazy dog"}\n')  # without the columns of the training
    assert "label" in next(iter(tunesmith.predict(model, tmp_path / "plain.jsonl")))
