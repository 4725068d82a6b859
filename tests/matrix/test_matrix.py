"""Each cell trains two steps, and then: the right parameters moved and no others; what is saved is what was trained, in a fresh
process too; switched off, merged or resumed it is what it should be; and batches are laid out as the README says."""

import hashlib
import json
import math
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import tunesmith
from tests.matrix import table
from tests.matrix.cells import (
    ADAPTATIONS,
    CANCELS,
    CELLS,
    EVERY,
    HEADS,
    IDS,
    MERGES,
    OBJECTIVES,
    ON_ITS_BASE,
    REFUSED,
    SHORT,
    STEPS,
    TRAINS,
    Cell,
    logits,
    of,
    pairs,
    run,
    trains,
    why_not,
)
from tests.runs import killed_before, model_folder
from tests.shortened import shortened
from tests.tiny import TINY
from tunesmith import adaptations, objectives
from tunesmith.errors import UserError
from tunesmith.train import setup


def resumes(cell):
    """Whether the test of a cell also kills and resumes its run; every objective resumes in ``test_every_objective``."""
    return cell.objective == "sft" and cell.architecture in TINY


def files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def close(ours, theirs):
    """Within 1e-5 of the largest logit."""
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp_min(1.0))


class Fresh:
    """A process that has trained nothing: it opens saved folders with tunesmith and gives their logits."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", FRESH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def logits(self, folder):
        out = folder.parent / "fresh.safetensors"
        print(json.dumps([str(folder), str(out)]), file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n", f"{folder} cannot be opened in a fresh process"
        return load_file(out)["logits"]


FRESH = f"""
import json, sys, torch, tunesmith
from safetensors.torch import save_file
from tunesmith.models.load import head_loading
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    folder, out = json.loads(line)
    with torch.no_grad():
        save_file({{"logits": head_loading.row_logits(tunesmith.load(folder)[0], torch.tensor({IDS!r})).float()}}, out)
    print("done", file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def fresh():
    """One fresh process for all cells: a second for each of them would be spent on imports."""
    started = Fresh()
    yield started
    started.process.stdin.close()
    assert started.process.wait() == 0


@pytest.mark.parametrize("cell", shortened(CELLS, SHORT), ids=str)
def test_cell(cell, tmp_path, fresh):
    untouched = files(model_folder(tmp_path, cell.architecture))
    ran = run(cell, tmp_path, **({"save_steps": 1} if resumes(cell) else {}))

    assert len(ran.losses) == STEPS and all(math.isfinite(loss) for loss in ran.losses)
    assert ran.trained == {name for name in ran.names if trains(cell, name)} != set()
    assert ran.still <= CANCELS.get(cell.objective, set()), "was to be trained and did not move"
    assert not ran.touched, "was frozen and moved"
    assert files(ran.base) == untouched

    assert close(fresh.logits(ran.model), ran.at_last), "a fresh process finds another model"
    assert not close(ran.at_first, ran.at_last)
    if cell.adaptation in ON_ITS_BASE and cell.objective not in HEADS:  # a base alone has no such head
        model, _ = tunesmith.load(ran.model)
        assert close(logits(model), ran.at_last)
        base, _ = tunesmith.load(ran.base)
        with model.disable_adapter():
            assert close(logits(model), logits(base))
        assert close(logits(model), ran.at_last), "switched on again it is what it was"

    if cell.adaptation in MERGES:
        tunesmith.merge(ran.model, tmp_path / "merged", dtype="float32")
        assert close(logits(tunesmith.load(tmp_path / "merged")[0]), ran.at_last)
    else:
        with pytest.raises(UserError, match="merge"):
            tunesmith.merge(ran.model, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    if resumes(cell):
        killed_before(2, ran.made, tmp_path / "killed")
        tunesmith.train(ran.made, out=tmp_path / "killed", resume=True)
        ours, theirs = (
            load_file(tmp_path / name / "checkpoints" / f"step-{STEPS}" / "state.safetensors") for name in ("killed", "run")
        )
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)

    assert ran.batches == table.parse(table.shown())[cell], "run `python -m tests.matrix.table --write`"


@pytest.mark.parametrize("cell", REFUSED, ids=str)
def test_what_makes_no_sense_is_refused_before_weights_load(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "build", lambda *arguments: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=why_not(cell)):
        tunesmith.train(of(cell, tmp_path), out=tmp_path / "run")


def test_make_test_runs_every_pair():
    """Every objective with every adaptation, every adaptation on every architecture, every objective on every architecture."""
    assert set().union(*map(pairs, SHORT)) == set().union(*map(pairs, CELLS))
    assert len(SHORT) < len(CELLS) / 4


def test_make_test_runs_every_kind_of_cell():
    """Batches of both kinds, adapters that merge and that do not, and a resume with every adaptation and on every decoder."""
    shown = table.parse(table.shown())
    assert {(cell.adaptation, shown[cell]) for cell in SHORT} == {(cell.adaptation, shown[cell]) for cell in CELLS}
    assert {(cell.objective, shown[cell]) for cell in SHORT} == {(cell.objective, shown[cell]) for cell in CELLS}
    assert {name for cell in SHORT if resumes(cell) for name in (cell.architecture, cell.adaptation)} == {*TINY, *ADAPTATIONS}


def test_the_table_has_every_cell():
    assert table.parse(table.shown()).keys() == set(EVERY)
    assert table.shown() == table.render(table.parse(table.shown()))


def test_every_objective_and_adaptation_has_a_row():
    assert sorted(OBJECTIVES) == objectives.names()
    assert sorted(ADAPTATIONS) == sorted(TRAINS) == adaptations.names()


def test_a_table_is_read_as_it_is_written():
    said = {cell: "packed" if cell.adaptation == "full" else "padded" for cell in EVERY}
    assert table.parse(table.render(said)) == said
    assert Cell("llama", "sft", "full") in said
