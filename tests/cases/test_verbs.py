"""Files of the kinds that users bring: every verb takes them or refuses them, in every format with the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cases.verbs import CASES, WRITERS, Case, examples, outcomes, rows_of

TRAINED = [case for case in CASES if not case.refused]
REFUSED = [case for case in CASES if case.refused]


@pytest.fixture
def file(request: pytest.FixtureRequest, shared: Path) -> Path:
    path = shared / "cases" / request.getfixturevalue("case").file
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_a_good_file_goes_through_every_verb(case: Case, file: Path, tmp_path: Path):
    done = outcomes(case, file, tmp_path)
    listed = {"lint"} if case.data.get("bad_rows") == "skip" else set()  # lint lists the rows that training skips
    assert {verb: outcome.line for verb, outcome in done.items() if outcome.code and verb not in listed} == {}
    assert {"generate", "evaluate"} & done.keys()
    printed = done["lint"].text + done["preview"].text + done["check"].text
    assert [words for words in case.reported if words not in printed] == []


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_bad_file_is_refused_by_lint_check_and_train_for_its_own_reason(case: Case, file: Path, tmp_path: Path):
    done = outcomes(case, file, tmp_path)
    for verb in ("lint", "check", "train"):
        assert done[verb].code == 2, (verb, done[verb].text)
        missing = [words for words in case.refused if words not in done[verb].text]
        assert missing == [], (verb, done[verb].text)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("case", [case for case in TRAINED if case.twins], ids=lambda case: case.name)
def test_each_format_trains_the_same_tokens(case: Case, file: Path, tmp_path: Path):
    rows = rows_of(file)
    expected = examples(case, file, tmp_path)
    for kind in case.twins:
        twin = tmp_path / f"rows.{kind}"
        WRITERS[kind](rows, twin)
        got = examples(case, twin, tmp_path)
        assert len(got) == len(expected), kind
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.keys() == theirs.keys(), kind
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours), (kind, ours, theirs)


def test_every_file_of_the_folder_has_a_case(shared: Path):
    folder = shared / "cases"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    assert {path.name for path in folder.iterdir()} - {"README.md"} == {case.file for case in CASES}
