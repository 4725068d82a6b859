"""``tunesmith runs``: list runs with their states, compare them, and reproduce one."""

import json
import shutil

import pytest

import tunesmith
from tests.runs import recipe
from tunesmith.cli.main import main
from tunesmith.data.store import hold_out
from tunesmith.errors import NonFiniteError
from tunesmith.models.heads import lm_head
from tunesmith.runs import metrics_file, run_folder, run_list
from tunesmith.train import reproduce


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs under ``runs``: full and LoRA, on the same rows."""
    place = tmp_path_factory.mktemp("runs")
    for name, adaptation in (("a", "full"), ("b", {"type": "lora", "r": 4})):
        one = recipe(place, adaptation=adaptation, eval_steps=2, count=40)
        one["data"]["eval"] = {"fraction": 0.3}
        tunesmith.train(one, out=place / "runs" / name)
    return place / "runs"


def answered(capsys, *words):
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_list_shows_state_and_result_of_each_run(made, capsys):
    listed = answered(capsys, "runs", "list", made)["runs"]
    assert [run["adaptation"] for run in listed] == ["full", "lora"]
    result = json.loads((made / "a" / "manifest.json").read_text())["result"]
    assert listed[0]["state"] == "done" and listed[0]["eval_loss"] == result["eval_loss"]
    assert main(["runs", "list", str(made)]) == 0
    shown = capsys.readouterr().out
    assert "done" in shown and "lora" in shown


def test_a_locked_run_is_shown_as_running_and_a_killed_one_as_killed(made, tmp_path):
    assert run_list.read(made / "a").state == "done"
    held = run_folder.claim(tmp_path / "run")
    held.begin({"model": "m"})
    assert run_list.read(tmp_path / "run").state == "running"
    held.close()
    assert run_list.read(tmp_path / "run").state == "killed"


def test_a_run_that_stopped_itself_shows_why_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    loss = lm_head.lm_loss
    monkeypatch.setattr(lm_head, "lm_loss", lambda model, batch: loss(model, batch) * (float("nan") if model.training else 1.0))
    with pytest.raises(NonFiniteError):
        tunesmith.train(recipe(tmp_path), out=tmp_path / "run")
    assert main(["runs", "show", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "stopped" in shown and "NonFiniteError" in shown and "--resume" in shown


def test_show_opens_the_model_folder_of_a_run_too(made, capsys):
    found = answered(capsys, "runs", "show", made / "b" / "model")
    assert found["adaptation"] == "lora"
    assert main(["runs", "show", str(made / "b" / "model")]) == 0
    (line, *_) = found["manifest"]["result"]["assessment"]["verdict"]
    assert f"verdict     {line}" in capsys.readouterr().out


def test_compare_names_exactly_the_keys_that_differ_and_draws_a_picture(made, tmp_path, capsys):
    found = answered(capsys, "runs", "compare", made / "a", made / "b", "--out", tmp_path / "c.png")
    assert found["differences"]["adaptation.type"] == ["full", "lora"]
    assert all(key.startswith("adaptation.") for key in found["differences"])
    assert found["cautions"] == []
    (change,) = found["changes"]  # of the same held-out rows
    losses = [run["eval_loss"] for run in found["runs"]]
    assert change["eval_loss"]["value"] == pytest.approx(losses[1] - losses[0], abs=1e-6)
    assert change["eval_loss"]["low"] < change["eval_loss"]["high"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_compare_warns_when_losses_are_not_comparable(made, tmp_path, capsys):
    other = recipe(tmp_path, count=20, eval_steps=2)
    other["data"]["eval"] = {"fraction": 0.3}
    tunesmith.train(other, out=tmp_path / "run")
    found = answered(capsys, "runs", "compare", made / "a", tmp_path / "run", "--out", tmp_path / "c.png", "--by", "tokens")
    assert any("the evaluation rows differ" in line for line in found["cautions"])
    assert found["changes"] == [{}]


@pytest.mark.parametrize("words", [["a"], ["a", "b", "--by", "epoch"], ["a", "b", "--out", "c.svg"], ["a", "nowhere"]])
def test_bad_comparisons_are_refused(words, made, capsys, monkeypatch):
    monkeypatch.chdir(made)
    assert main(["runs", "compare", *words]) == 2
    assert not list(made.glob("c.*"))


def test_a_run_is_reproduced_bit_for_bit(made, tmp_path, capsys):
    found = answered(capsys, "runs", "reproduce", made / "b", "--out", tmp_path / "again")
    assert found["equal"] and found["weights_equal"] and found["difference"] is None
    assert found["machine"] == {} and found["records"] == len(metrics_file.read(made / "b" / "metrics.jsonl"))


def test_changed_data_is_refused_before_training_with_what_changed(made, tmp_path, capsys):
    shutil.copytree(made / "a", tmp_path / "run")
    old, file = made.parent / "rows.jsonl", tmp_path / "rows.jsonl"
    shutil.copy(old, file)
    for name in ("recipe.yaml", "manifest.json"):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        (tmp_path / "run" / name).write_text(text.replace(str(old), str(file)), encoding="utf-8")
    file.write_text("\n".join([*file.read_text().splitlines(), json.dumps({"prompt": "new", "completion": " row"})]))
    assert main(["runs", "reproduce", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err
    assert "rows.jsonl: sha256 was" in said and "40 rows" in said and "41 rows" in said
    assert not (tmp_path / "again").exists()


def test_held_out_rows_that_a_version_chose_otherwise_are_refused_before_training(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hold_out, "hashes", lambda keys, seed: keys)
    assert main(["runs", "reproduce", str(made / "a"), "--out", str(tmp_path / "again")]) == 2
    assert "holds out other rows" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_a_run_that_came_out_otherwise_names_the_first_difference(made, tmp_path, capsys, monkeypatch):
    loss = lm_head.lm_loss
    monkeypatch.setattr(lm_head, "lm_loss", lambda model, batch: loss(model, batch) * 1.001)
    assert main(["runs", "reproduce", str(made / "a"), "--out", str(tmp_path / "again")]) == 3
    assert "first difference at step 1: loss was" in capsys.readouterr().out


def test_an_unfinished_run_cannot_be_reproduced(tmp_path, capsys):
    begun = run_folder.claim(tmp_path / "run")
    begun.begin({"model": "m"})
    begun.close()
    assert main(["runs", "reproduce", str(tmp_path / "run")]) == 2
    assert "killed" in capsys.readouterr().err


def test_a_figure_that_is_not_a_number_is_the_same_as_itself():
    record = {"step": 1, "loss": float("nan")}
    assert reproduce.first_difference([record], [{"step": 1, "loss": float("nan")}]) is None
    assert reproduce.first_difference([record], [])["figure"] == "records"
