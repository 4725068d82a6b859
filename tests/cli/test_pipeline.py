"""``tunesmith pipeline`` on the command line: the plan, one JSON object, exit codes."""

from __future__ import annotations

import json

import pytest

from tests.pipeline import stages
from tunesmith.cli.main import main


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return stages.write(tmp_path_factory.mktemp("pipeline"))


def test_a_dry_run_prints_the_plan_and_writes_nothing(file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pipeline", str(file), "--dry-run", "--until", "reward"]) == 0
    printed = capsys.readouterr()
    assert [line.split()[:2] for line in printed.out.splitlines()] == [["sft", "train"], ["reward", "train"], ["dpo", "not"]]
    assert "checking 2 of 3 stages" in printed.err and not (tmp_path / "runs").exists()


def test_one_stage_is_trained_and_the_summary_is_one_object(file, tmp_path, capsys):
    arguments = ["pipeline", str(file), "--out", str(tmp_path / "out"), "--until", "sft", "sft.train.max_steps=1"]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(one["stage"], one["action"], one["current"]) for one in facts["stages"]] == [
        ("sft", "train", True), ("reward", "not run", False), ("dpo", "not run", False),
    ]  # fmt: skip
    assert facts["stages"][0]["steps"] == 1
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "unchanged" in printed and str(tmp_path / "out" / "report.html") in printed


def test_a_wrong_pipeline_is_the_users(file, tmp_path, capsys):
    assert main(["pipeline", str(file), "--out", str(tmp_path / "out"), "dpo.beta=1"]) == 2
    assert "stage dpo" in capsys.readouterr().err and not (tmp_path / "out").exists()
