"""report.html of a judged comparison: verdicts in words, win rates, the examination of the judge, judged answers."""

from __future__ import annotations

from pathlib import Path

import tunesmith
from tunesmith.json_types import JsonObject
from tunesmith.report import pages
from tunesmith.report.language import recorded, t
from tunesmith.report.pages import Tile


def write(folder: str | Path, result: JsonObject) -> Path:
    """Write report.html into ``folder``; return its path. ``result``: as ``judge_run.judge`` returns it."""
    examined = result["examination"]
    notes = [recorded(one["verdict"]) for one in result["comparisons"]]
    notes += [
        t("the judge failed its examination: {failure}", failure=recorded(failure))
        for failure in examined["failures"]
    ]
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
        title=t(" or ").join(result["systems"]),
        version=tunesmith.__version__,
        tiles_shown=_tiles(result),
        notes_shown=notes,
        judge=result["judge"],
        rates=rates,
        examined=[
            {"figure": recorded(name), "value": recorded(value), "expected": recorded(expected)}
            for name, value, expected in examination_rows(examined)
        ],
        comparisons=[{**one, "length": recorded(one["length"])} for one in result["comparisons"]],
        cost=result["cost"],
    )


def examination_rows(examined: JsonObject) -> list[tuple[str, str, str]]:
    """Return (figure, value, expected) of each figure of the examination."""
    kappa = f"{examined['kappa']:.2f} ({examined['kappa_low']:.2f} to {examined['kappa_high']:.2f})"
    return [
        (f"kappa with {examined['pairs']} known answers", kappa, "at least 0.4"),
        ("prefers the answer read first", f"{examined['first']:.0%}", "50%"),
        ("prefers the longer answer", f"{examined['longer']:.0%}", f"{examined['longer_is_better']:.0%}"),
        ("repeats its verdict", f"{examined['retest']:.0%}", "at least 90%"),
        ("no verdict", f"{examined['missing']:.0%}", "at most 10%"),
    ]


def _tiles(result: JsonObject) -> list[Tile]:
    """One tile for each pair of systems, and one for the judge."""
    examined = result["examination"]
    tiles = [
        Tile(
            t("{second} against {first}", second=one["second"], first=one["first"]),
            _share(one["win_rate"]),
            t("of {pairs} pairs won", pairs=one["pairs"]),
        )
        for one in result["comparisons"][:3]
    ]
    word = t("passed") if examined["passed"] else t("failed")
    return [
        *tiles,
        Tile(t("Examination of the judge"), word, t("kappa {value}", value=f"{examined['kappa']:.2f}")),
    ]


def _share(interval: JsonObject | None) -> str:
    return "-" if interval is None else f"{interval['value']:.0%}"


def _interval(interval: JsonObject | None) -> str:
    if interval is None:
        return "-"
    ends = recorded(f"{interval['low']:.0%} to {interval['high']:.0%}")
    return f"{interval['value']:.0%} ({ends})"
