"""Each planted fault still has the code that it changes and tests that could catch it. ``make planted`` runs them."""

import shlex

import pytest

from tests.planted.faults import FAULTS
from tests.planted.run import ROOT, SOURCE, Caught, arguments, main, plant


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_changes_one_place_of_the_source(fault):
    text = (SOURCE / "tunesmith" / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    assert fault.new != fault.old


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_tests_of_a_fault_exist(fault):
    assert all((ROOT / word).exists() for word in shlex.split(fault.tests) if word.startswith("tests/"))
    assert arguments(fault)


def test_there_are_at_least_forty_claims():
    assert len({fault.name for fault in FAULTS}) == len({fault.claim for fault in FAULTS}) == len(FAULTS) >= 40


def test_a_fault_is_planted_in_a_copy(tmp_path):
    fault = FAULTS[0]
    plant(fault, tmp_path)
    assert fault.new in (tmp_path / "src" / "tunesmith" / fault.file).read_text(encoding="utf-8")
    assert fault.old in (SOURCE / "tunesmith" / fault.file).read_text(encoding="utf-8")


def test_a_fault_that_no_test_catches_is_reported(monkeypatch, capsys):
    missed = Caught(FAULTS[0].name, FAULTS[0].claim, None, 1.0, "")
    monkeypatch.setattr("tests.planted.run.catch", lambda fault: missed)
    assert main([FAULTS[0].name]) == 1
    assert "NOT CAUGHT" in capsys.readouterr().err
