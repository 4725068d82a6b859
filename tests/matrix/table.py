"""The support table of the README.

python -m tests.matrix.table           # print it, as the runs say
python -m tests.matrix.table --write   # put it into the README
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.matrix.cells import ADAPTATIONS, ARCHITECTURES, EVERY, OBJECTIVES, Cell, run, why_not

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- support table: begin -->\n", "<!-- support table: end -->"


def render(batches: Mapping[Cell, str]) -> str:
    """Rows are pairs of objective and adaptation, columns architectures."""
    pairs = [(objective, adaptation) for objective in OBJECTIVES for adaptation in ADAPTATIONS]
    rows = [["", *ARCHITECTURES], ["---"] * (len(ARCHITECTURES) + 1)]
    rows += [[" + ".join(pair), *(batches[Cell(name, *pair)] for name in ARCHITECTURES)] for pair in pairs]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def parse(table: str) -> dict[Cell, str]:
    """What a rendered table says of each cell."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    said = {}
    for row in rows[2:]:
        objective, adaptation = row[0].split(" + ")
        said |= {Cell(name, objective, adaptation): batches for name, batches in zip(rows[0][1:], row[1:], strict=True)}
    return said


def shown() -> str:
    """The table that stands in the README."""
    return README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def measured() -> dict[Cell, str]:
    """Run every cell: half a minute."""
    found = {}
    with tempfile.TemporaryDirectory() as home:
        os.environ["TUNESMITH_HOME"] = home
        for cell in EVERY:
            with tempfile.TemporaryDirectory() as folder:
                found[cell] = run(cell, Path(folder)).batches if why_not(cell) is None else "-"
    return found


def main() -> None:
    table = render(measured())
    if "--write" in sys.argv[1:]:
        before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        README.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    main()
