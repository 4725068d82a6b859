"""Run folders read back, whatever state they are in: written by hand, so that no model is trained."""

import json

import pytest

from tunesmith.cli.main import main
from tunesmith.engine import runs
from tunesmith.errors import UserError

RECIPE = "model: m\nobjective: {type: sft}\nadaptation: {type: lora}\n"
EVALS = [{"kind": "eval", "step": 0, "eval_loss": 3.5}]


def written(folder, manifest=None, records=(), recipe=RECIPE):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("metrics.jsonl", '{"kind": "eval", "step": 0}\nbroken\n{}\n', "metrics.jsonl, line 2"),
        ("manifest.json", "[", "manifest.json, line 1"),
        ("manifest.json", "[]", "manifest.json, line 1"),
        ("recipe.yaml", "model: m\nx: [", "recipe.yaml, line 2"),
        ("recipe.yaml", "- a", "recipe.yaml, line 1"),
    ],
)
def test_one_bad_folder_is_listed_as_unreadable_beside_the_others(tmp_path, capsys, file, content, told):
    written(tmp_path / "good", {"finished": "now"})
    (written(tmp_path / "bad", {"finished": "now"}) / file).write_text(content, encoding="utf-8")
    assert main(["runs", "list", str(tmp_path), "--json"]) == 0
    states = {run["run"].rpartition("/")[2]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert states["good"]["state"] == "done" and states["good"]["problem"] is None
    assert states["bad"]["state"] == "unreadable" and told in states["bad"]["problem"]
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert told in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"{told}[\s\S]*restore it"):
        runs.read(tmp_path / "bad")
