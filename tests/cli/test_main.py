import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tunesmith import errors
from tunesmith.cli import main as cli

RECIPE = "model: m\ndata:\n  train: [{path: x.json}]\n"


@pytest.fixture
def train_raises(monkeypatch, tmp_path):
    """Run `tunesmith train` with a training that raises what is given; returns the exit code."""
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)

    def run(error, *options):
        def train(recipe, **_):
            raise error

        monkeypatch.setattr(importlib.import_module("tunesmith.train"), "run", SimpleNamespace(train=train), raising=False)
        return cli.main(["train", str(path), *options])

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RecipeError("x"), 2),
        (errors.DataError("x"), 2),
        (errors.ModelError("x"), 2),
        (errors.NonFiniteError("x"), 3),
        (errors.DiskFullError("x"), 3),
        (errors.Interrupted("x"), 130),
        (errors.TunesmithError("x"), 1),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_exit_codes(train_raises, capsys, error, code):
    assert train_raises(error, "--json") == code
    caught = capsys.readouterr()
    assert json.loads(caught.out)["error"]["exit_code"] == code
    assert "error: " in caught.err


def test_a_bug_is_called_a_bug_and_its_traceback_is_kept(train_raises, capsys):
    train_raises(ZeroDivisionError("of no number"))
    message = capsys.readouterr().err
    assert "ZeroDivisionError: of no number" in message and "bug in tunesmith" in message
    assert "Traceback" not in message
    path = message.partition("traceback in ")[2].partition(", the command line")[0]
    with open(path) as file:
        assert "ZeroDivisionError: of no number" in file.read()


def test_debug_shows_the_traceback(train_raises, capsys, monkeypatch):
    monkeypatch.setenv("TUNESMITH_DEBUG", "1")
    train_raises(ZeroDivisionError("of no number"))
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["trian"], ["train"], ["train", "r.yaml", "--nope"], ["evaluate", "m"], ["data"], []])
def test_wrong_usage_is_exit_2(args, capsys):
    assert cli.main(args) == 2


def test_wrong_usage_under_json(capsys):
    assert cli.main(["train", "r.yaml", "--nope", "--json"]) == 2
    assert "--nope" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_an_unknown_verb_names_the_nearest(capsys):
    cli.main(["trian"])
    assert "'train'" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


HELP = """
import contextlib, io, sys, time
from tunesmith.cli.main import VERBS, main
imported = time.process_time()
for verb in [[], *([name] for name in VERBS)]:
    before, out = time.process_time(), io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*verb, "--help"])
    seconds = imported + time.process_time() - before
    heavy = {"torch", "transformers", "peft", "numpy", "matplotlib"} & set(sys.modules)
    assert code == 0 and "Usage" in out.getvalue() and not heavy and seconds < 0.6, (verb, code, heavy, seconds)
"""


def test_help_is_quick_and_loads_nothing_heavy():
    """Processor time is measured, which a busy machine stretches less than wall time. One process runs the help of all verbs."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_list_of_verbs_has_the_help_line_of_each_verb():
    for verb, (_, line) in cli.VERBS.items():
        command = cli.load(verb)
        assert command.name == verb
        assert command.help and line.endswith(".")


@pytest.mark.parametrize("line", [["-h"], ["train", "-h"], ["data", "lint", "-h"]])
def test_the_short_way_to_ask_for_help(capsys, line):
    assert cli.main(line) == 0
    assert "Usage: tunesmith" in capsys.readouterr().out
