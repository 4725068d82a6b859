"""report.html of a judged comparison: verdicts in words, win rates, the examination of the judge, judged answers."""

from __future__ import annotations

from pathlib import Path

import tunesmith
from tunesmith.json_types import JsonObject
from tunesmith.report import pages
from tunesmith.report.pages import Tile


def write(folder: str | Path, result: JsonObject) -> Path:
    """Write report.html into ``folder``; return its path. ``result``: as ``judge_run.judge`` returns it."""
    examined = result["examination"]
    notes = [one["verdict"] for one in result["comparisons"]]
    notes += [f"the judge failed its examination: {failure}" for failure in examined["failures"]]
    rates = [
        {
            "first": one["first"], "second": one["second"], "second wins": one["wins"], "ties": one["ties"],
            "first wins": one["losses"], "missing": one["missing"], "win rate": _interval(one["win_rate"]),
            "equal length": _interval(one["length_controlled"]),
        }
        for one in result["comparisons"]
    ]  # fmt: skip
    return pages.save(
        Path(folder) / "report.html",
        "judge.html",
        title=" or ".join(result["systems"]),
        version=tunesmith.__version__,
        tiles_shown=_tiles(result),
        notes_shown=notes,
        judge=result["judge"],
        rates=rates,
        examined={key: value for key, value in examined.items() if key != "failures"},
        comparisons=result["comparisons"],
        cost=result["cost"],
    )


def _tiles(result: JsonObject) -> list[Tile]:
    """One tile for each pair of systems, and one for the judge."""
    examined = result["examination"]
    tiles = [
        Tile(
            f"{one['second']} against {one['first']}", _share(one["win_rate"]), f"of {one['pairs']} pairs won"
        )
        for one in result["comparisons"][:3]
    ]
    word = "passed" if examined["passed"] else "failed"
    return [*tiles, Tile("Examination of the judge", word, f"kappa {examined['kappa']:.2f}")]


def _share(interval: JsonObject | None) -> str:
    return "-" if interval is None else f"{interval['value']:.0%}"


def _interval(interval: JsonObject | None) -> str:
    if interval is None:
        return "-"
    return f"{interval['value']:.0%} ({interval['low']:.0%} to {interval['high']:.0%})"
