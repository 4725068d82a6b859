"""``score`` takes variables of the chat template, as ``generate`` and ``chat`` do."""

from __future__ import annotations

import json

import pytest

import tunesmith
from tests.runs import recipe
from tests.tiny import CHATML
from tunesmith.cli.main import main

TURNS = [{"role": "user", "content": "what is the capital?"}]
ROW = {"prompt": TURNS, "chosen": "Paris", "rejected": "a lazy dog"}


def rewards(capsys, model, rows, *more):
    assert main(["score", str(model), "--data", str(rows), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)["answers"][0]["rewards"]


def test_a_variable_of_the_template_reaches_the_rewards(tmp_path, capsys):
    made = recipe(tmp_path, objective="reward", max_steps=1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**ROW, "rejected": f"dog {n}"}) + "\n" for n in range(6)), encoding="utf-8")
    made["data"]["template"] = "{% if brief %}system answer short{% endif %}" + CHATML
    model = tunesmith.train(made, out=tmp_path / "run")["model_dir"]
    plain = rewards(capsys, model, rows)
    assert rewards(capsys, model, rows, "--template-kwarg", "brief=false") == pytest.approx(plain)
    assert rewards(capsys, model, rows, "--template-kwarg", "brief=true") != pytest.approx(plain, rel=1e-3)
    assert main(["score", str(model), "--data", str(rows), "--template-kwarg", "breif=true"]) == 2
    assert "'breif'" in capsys.readouterr().err
