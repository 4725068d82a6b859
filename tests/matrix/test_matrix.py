"""Each cell trains two steps, and then: the right parameters moved and no others; what is saved is what was trained, in a fresh
process too; switched off, merged or resumed it is what it should be; and batches are laid out as the README says."""

import hashlib
import math
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import tunesmith
from tests.matrix import table
from tests.matrix.cells import (
    ADAPTATIONS,
    ARCHITECTURES,
    CANCELS,
    CELLS,
    EVERY,
    HEADS,
    IDS,
    MERGES,
    OBJECTIVES,
    ON_ITS_BASE,
    REFUSED,
    STEPS,
    TRAINS,
    Cell,
    logits,
    of,
    run,
    trains,
    why_not,
)
from tests.runs import killed_before, model_folder
from tests.tiny import TINY
from tunesmith import adaptations, objectives
from tunesmith.errors import UserError
from tunesmith.train import setup


def files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def close(ours, theirs):
    """Within 1e-5 of the largest logit."""
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp_min(1.0))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell, tmp_path):
    untouched = files(model_folder(tmp_path, cell.architecture))
    ran = run(cell, tmp_path)

    assert len(ran.losses) == STEPS and all(math.isfinite(loss) for loss in ran.losses)
    assert ran.trained == {name for name in ran.names if trains(cell, name)} != set()
    assert ran.still <= CANCELS.get(cell.objective, set()), "was to be trained and did not move"
    assert not ran.touched, "was frozen and moved"
    assert files(ran.base) == untouched

    model, _ = tunesmith.load(ran.model)
    assert close(logits(model), ran.at_last) and not close(ran.at_first, ran.at_last)
    if cell.adaptation in ON_ITS_BASE and cell.objective not in HEADS:  # a base alone has no such head
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

    assert ran.batches == table.parse(table.shown())[cell], "run `python -m tests.matrix.table --write`"


@pytest.mark.parametrize("cell", REFUSED, ids=str)
def test_what_makes_no_sense_is_refused_before_weights_load(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "build", lambda *arguments: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=why_not(cell)):
        tunesmith.train(of(cell, tmp_path), out=tmp_path / "run")


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name in TINY])
def test_a_killed_run_goes_on_as_if_nothing_had_been(architecture, adaptation, tmp_path):
    cell = Cell(architecture, "sft", adaptation)
    made = {**of(cell, tmp_path), "train": {**of(cell, tmp_path)["train"], "save_steps": 1}}
    tunesmith.train(made, out=tmp_path / "straight")
    killed_before(2, made, tmp_path / "killed")
    tunesmith.train(made, out=tmp_path / "killed", resume=True)
    ours, theirs = (
        load_file(tmp_path / name / "checkpoints" / f"step-{STEPS}" / "state.safetensors") for name in ("killed", "straight")
    )
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)


FRESH = """
import sys, torch, tunesmith
from tunesmith.models.load import head_loading
from safetensors.torch import save_file
answers = {}
for place in sys.argv[2:]:
    model, _ = tunesmith.load(place)
    with torch.no_grad():
        answers[place] = head_loading.row_logits(model, torch.tensor(IDS)).float()
save_file(answers, sys.argv[1])
""".replace("IDS", repr(IDS))


@pytest.mark.parametrize("objective", ["sft", *HEADS])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_process_finds_what_was_trained(architecture, objective, tmp_path):
    expected = {}
    chosen = [cell for cell in CELLS if (cell.architecture, cell.objective) == (architecture, objective)]
    for cell in chosen:
        (tmp_path / cell.adaptation).mkdir()
        ran = run(cell, tmp_path / cell.adaptation)
        expected[str(ran.model)] = ran.at_last
    if not chosen:
        return
    out = tmp_path / "answers.safetensors"
    done = subprocess.run([sys.executable, "-c", FRESH, str(out), *expected], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = load_file(out)
    for place, said in expected.items():
        assert close(answers[place], said), place


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
