import json
from types import SimpleNamespace

import pytest

from tunesmith import engine
from tunesmith.cli.main import main

FOUND = {
    "rows": {"train": 1200, "eval": 60},
    "sources": [{"path": "a.json", "rows": 900}, {"path": "b.csv", "rows": 360}],
    "packed": True,
    "memory_bytes": 3 * 2**20,
    "share_supervised": 0.41234567,
    "warnings": ["one", "two"],
    "max_length": None,
}


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "run", SimpleNamespace(check=lambda recipe: FOUND), raising=False)
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata:\n  train: [{path: x.json}]\n")
    return str(path)


def test_json(recipe, capsys):
    assert main(["check", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == FOUND


def test_figures_for_people(recipe, capsys):
    assert main(["check", recipe]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "rows",
        "train 1,200",
        "eval 60",
        "sources",
        "- path a.json",
        "rows 900",
        "- path b.csv",
        "rows 360",
        "packed yes",
        "memory bytes 3 MiB",
        "share supervised 0.4123",
        "warnings one, two",
        "max length -",
    ]


def test_a_wrong_recipe_is_exit_2(recipe):
    assert main(["check", recipe, "objective=nope"]) == 2
