"""The support tables of the pages are those of the declared cells. (``test_matrix`` runs the cells.)"""

import pytest

from tests.matrix import table
from tests.matrix.cells import EVERY, why_not


@pytest.mark.parametrize("page", table.FOLDED, ids=lambda page: page.name)
def test_the_folded_table_is_that_of_the_declared_cells(page):
    assert table.shown(page) == table.fold(*table.FOLDED[page]), "run `python -m tests.matrix.table --fold`"


def test_the_full_table_refuses_exactly_the_declared_cells():
    assert {cell for cell, batches in table.parse(table.shown()).items() if batches == "-"} == {
        cell for cell in EVERY if why_not(cell) is not None
    }
