"""The support tables: all cells in docs/support.md, folded over the architectures in README.md and README.ko.md.

python -m tests.matrix.table           # run every cell and print the full table
python -m tests.matrix.table --write   # and write all three tables
python -m tests.matrix.table --fold    # write the folded tables alone, from the declared cells; runs nothing
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.matrix.cells import ADAPTATIONS, ARCHITECTURES, EVERY, OBJECTIVES, Cell, run, why_not

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "docs" / "support.md"
FOLDED = {
    ROOT / "README.md": ("all {works}", "{works} (not {names})"),
    ROOT / "README.ko.md": ("{works}개 모두", "{works}개 ({names} 제외)"),
}
"""Page -> texts of a folded cell: when every architecture works, and when some do not."""
BEGIN, END = "<!-- support table: begin -->\n", "<!-- support table: end -->"


def render(batches: Mapping[Cell, str]) -> str:
    """Return the full table: a row for each objective + adaptation, a column for each architecture."""
    pairs = [(objective, adaptation) for objective in OBJECTIVES for adaptation in ADAPTATIONS]
    rows = [[" + ".join(pair), *(batches[Cell(name, *pair)] for name in ARCHITECTURES)] for pair in pairs]
    return _markdown(["", *ARCHITECTURES], rows)


def fold(all_work: str, some_fail: str) -> str:
    """Return the table of the declared cells: a row for each objective, a column for adaptations with equal entries.

    A pair that works on no architecture has "-"."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for adaptation in ADAPTATIONS:
        entries = []
        for objective in OBJECTIVES:
            fails = [name for name in ARCHITECTURES if why_not(Cell(name, objective, adaptation)) is not None]
            works = len(ARCHITECTURES) - len(fails)
            entry = all_work if not fails else some_fail if works else "-"
            entries.append(entry.format(works=works, names=", ".join(fails)))
        columns.setdefault(tuple(entries), []).append(adaptation)
    rows = [[objective, *entries] for objective, entries in zip(OBJECTIVES, zip(*columns), strict=True)]
    return _markdown(["", *map(", ".join, columns.values())], rows)


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in [heads, ["---"] * len(heads), *rows])


def parse(table: str) -> dict[Cell, str]:
    """Return the entry of each cell in a full table."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    found = {}
    for row in rows[2:]:
        objective, adaptation = row[0].split(" + ")
        found |= {Cell(name, objective, adaptation): batches for name, batches in zip(rows[0][1:], row[1:], strict=True)}
    return found


def shown(page: Path = SUPPORT) -> str:
    """Return the table of a page."""
    return page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def write(page: Path, table: str) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")


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
    if "--fold" not in sys.argv[1:]:
        table = render(measured())
        print(table, end="")
        if "--write" not in sys.argv[1:]:
            return
        write(SUPPORT, table)
    for page, texts in FOLDED.items():
        write(page, fold(*texts))


if __name__ == "__main__":
    main()
