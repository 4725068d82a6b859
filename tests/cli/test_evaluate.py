import importlib
import json
from types import SimpleNamespace

import pytest

from tunesmith.cli.main import main
from tunesmith.cli.options import parse_columns
from tunesmith.evaluate.evaluate_options import EvaluateOptions

FIGURES = {
    "eval_loss": 1.5,
    "perplexity": 4.4817,
    "tokens": 1000,
    "supervised_tokens": 400,
    "rows": 10,
    "tokens_per_second": 250.0,
    "seconds": 4.0,
}


@pytest.fixture
def calls(monkeypatch):
    seen = []
    fake = SimpleNamespace(evaluate=lambda *args, **keys: seen.append((args, keys)) or FIGURES)
    monkeypatch.setattr(importlib.import_module("tunesmith.evaluate"), "evaluate_model", fake, raising=False)
    return seen


def test_options_arrive(calls, capsys):
    options = [
        "--column",
        "prompt=q",
        "--column",
        "completion=a",
        "--limit",
        "5",
        "--template",
        "korean",
        "--separator",
        "|",
        "--json",
    ]
    assert main(["evaluate", "m", "--data", "x.csv", *options]) == 0
    ((*args, chosen), _), *_ = calls
    assert args == ["m", "x.csv"]
    columns = {"prompt": "q", "completion": "a"}
    assert chosen == EvaluateOptions(columns=columns, limit=5, template="korean", template_kwargs={}, separator="|")
    assert json.loads(capsys.readouterr().out) == FIGURES


def test_figures_for_people(calls, capsys):
    assert main(["evaluate", "m", "--data", "x.csv"]) == 0
    out = capsys.readouterr().out
    assert "1.5000" in out and "4.482" in out and "250 tokens/s" in out


def test_a_column_without_a_name_is_exit_2(calls, capsys):
    assert main(["evaluate", "m", "--data", "x.csv", "--column", "prompt"]) == 2
    assert calls == [] and "FIELD=COLUMN" in capsys.readouterr().err


def test_a_field_named_twice_gets_both_columns():
    assert parse_columns(["text=review", "labels=toxic", "labels=a=b"]) == {"text": "review", "labels": ["toxic", "a=b"]}
