"""compare.html: models on the same rows. The verdict in words, differences with intervals, rows that changed most."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tunesmith
from tunesmith.files import replace_file
from tunesmith.json_types import JsonObject
from tunesmith.report import charts, pages
from tunesmith.report.language import recorded, t
from tunesmith.report.pages import Tile, interval
from tunesmith.report.task_page import Picture, Piece
from tunesmith.runs.figure_format import count, label, number

_WORDS = {True: "better", False: "worse", None: "no difference seen"}
"""A word for each verdict on a figure, True = it got better; ``t`` translates it into the language of the page."""


def write(folder: str | Path, result: JsonObject) -> Path:
    """Write compare.html, and a PNG of each pair's differences, into ``folder``; return the page's path.

    ``result``: as ``evaluate.compare_models.compare`` returns it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return pages.save(
        folder / "compare.html",
        "compare.html",
        title=t(" or ").join(system["name"] for system in result["systems"]),
        version=tunesmith.__version__,
        tiles_shown=_tiles(result),
        notes_shown=[
            recorded(line) for line in (*(pair["verdict"] for pair in result["pairs"]), *result["cautions"])
        ],
        systems=_systems(result["systems"]),
        pairs=[
            {
                "names": f"{pair['first']} → {pair['second']}",
                "picture": _picture(folder, number_, pair),
                "figures": [_difference(name, one) for name, one in pair["figures"].items()],
                "changed": [
                    (t("Rows that got worse most"), [_row(pair, row) for row in pair["worse_rows"]]),
                    (t("Rows that got better most"), [_row(pair, row) for row in pair["better_rows"]]),
                ],
            }
            for number_, pair in enumerate(result["pairs"], 1)
        ],
        data=t(
            "{rows} rows of {data} with {prompts} different prompts",
            rows=f"{result['rows']:,}",
            data=result["data"],
            prompts=f"{result['prompts']:,}",
        ),
    )


def _picture(folder: Path, number_: int, pair: JsonObject) -> Picture | None:
    """Draw the differences of a pair, and write them as a PNG; None if none of them has an interval."""
    known = {_label(name): one for name, one in pair["figures"].items() if one["low"] is not None}
    if not known:
        return None
    caption = t(
        "{second} minus {first}, in half-widths of the 95% interval",
        second=pair["second"],
        first=pair["first"],
    )
    detail = t("A bar that does not touch zero is a difference that chance alone seldom makes")
    picture = Picture(f"differences-{number_}", caption, charts.png(charts.differences(known)), detail)
    replace_file(folder / f"{picture.name}.png", picture.png)
    return picture


def _tiles(result: JsonObject) -> list[Tile]:
    """The deciding figure of each pair."""
    tiles = []
    for pair in result["pairs"][:3]:
        one = pair["figures"].get(result["decides"])
        if one is None:
            continue
        trend = {True: "good", False: "bad", None: ""}[one["better"]]
        change = f"{one['value']:+.4g} ({interval(one)})"
        note = f"{pair['second']}: {t(_WORDS[one['better']])}"
        tiles.append(
            Tile(_label(result["decides"]), number(one["after"]), note, number(one["before"]), change, trend)
        )
    return tiles


def _label(name: str) -> str:
    return recorded(label(name))


def _systems(systems: Sequence[JsonObject]) -> list[JsonObject]:
    """Return a row for each fact and figure, with a column for each model."""
    facts = [
        {
            "parameters": count(one["parameters"]), "size": count(one["bytes"]) + "B",
            "tokens/s": number(one["tokens_per_second"]),
            **{_label(name): f"{number(known['value'])} ({interval(known)})" for name, known in one["figures"].items()},
        }
        for one in systems
    ]  # fmt: skip
    names = dict.fromkeys(name for known in facts for name in known)
    return [
        {
            "figure": recorded(name),
            **{one["name"]: known.get(name, "-") for one, known in zip(systems, facts)},
        }
        for name in names
    ]


def _difference(name: str, one: JsonObject) -> JsonObject:
    return {
        "figure": _label(name), "before": number(one["before"]), "after": number(one["after"]),
        "difference": number(one["value"]), "95% interval": interval(one),
        "p": f"{one['p']:.2g}", "": t(_WORDS[one["better"]]), "visible from": number(one["detectable"]),
    }  # fmt: skip


@dataclass(frozen=True)
class ChangedRow:
    """``sides``: (model, pieces of its answer); the pieces that differ are marked."""

    title: str
    text: str
    sides: list[tuple[str, list[Piece]]]


def _row(pair: JsonObject, row: JsonObject) -> ChangedRow:
    title = t(
        "row {row}: {change}", row=row["row"], change=f"{number(row['before'])} → {number(row['after'])}"
    )
    answers = row.get("answers")
    sides = []
    if answers:
        marked = zip((pair["first"], pair["second"]), word_differences(*answers), strict=True)
        sides = list(marked)
    return ChangedRow(title, str(row.get("text", "")), sides)


def word_differences(before: str, after: str) -> tuple[list[Piece], list[Piece]]:
    """Return both texts as pieces; words that only one of them has are marked."""
    words = _words(before), _words(after)
    matcher = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False)
    sides: tuple[list[Piece], list[Piece]] = ([], [])
    for tag, first, first_end, second, second_end in matcher.get_opcodes():
        kinds = ("", "") if tag == "equal" else ("wrong", "right")
        spans = ((first, first_end), (second, second_end))
        for side, kind, (start, end), all_words in zip(sides, kinds, spans, words, strict=True):
            if end > start:
                side.append(Piece("".join(all_words[start:end]), kind))
    return sides


def _words(text: str) -> Sequence[str]:
    """Return the words of a text, each with the white space before it."""
    return re.findall(r"\s*\S+|\s+$", text)
