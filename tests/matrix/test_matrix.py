"""Each cell trains two steps: finite, the right parameters and no others, saved so that it loads, laid out as the README says."""

import hashlib
import math

import pytest
import torch

import tunesmith
from tests.matrix import table
from tests.matrix.cells import ADAPTATIONS, CELLS, OBJECTIVES, STEPS, TRAINS, Cell, run
from tests.runs import model_folder
from tunesmith import adaptations, objectives


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def parameters(folder):
    model, _ = tunesmith.load(folder)
    return model, dict(model.named_parameters())


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell, tmp_path):
    untouched = digests(model_folder(tmp_path, cell.architecture))
    ran = run(cell, tmp_path)

    assert len(ran.losses) == STEPS and all(math.isfinite(loss) for loss in ran.losses)

    _, before = parameters(ran.base)
    model, after = parameters(ran.model)
    trains = TRAINS[cell.adaptation]
    trained = {name for name in after if trains(name)}
    assert ran.masters.keys() == trained != set()
    for name, value in after.items():
        original = before.get(name.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if not value.is_floating_point():
            assert name not in trained  # 4 or 8 bits: tests/adaptations/test_qlora.py compares them
        elif name not in trained:
            assert value.equal(original), f"{name} was not to be trained"
        elif original is not None:
            assert not value.equal(original), f"{name} was not trained"
        else:
            assert value.equal(ran.masters[name]) and value.any(), f"{name} is not what was trained"
    assert digests(ran.base) == untouched

    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.isfinite().all()

    assert ran.batches == table.parse(table.shown())[cell], "run `python -m tests.matrix.table --write`"


def test_the_table_has_every_cell():
    assert table.parse(table.shown()).keys() == set(CELLS)
    assert table.shown() == table.render(table.parse(table.shown()))


def test_every_objective_and_adaptation_has_a_row():
    assert sorted(OBJECTIVES) == objectives.names()
    assert sorted(ADAPTATIONS) == sorted(TRAINS) == adaptations.names()


def test_a_table_is_read_as_it_is_written():
    said = {cell: "packed" if cell.adaptation == "full" else "padded" for cell in CELLS}
    assert table.parse(table.render(said)) == said
    assert Cell("llama", "sft", "full") in said
