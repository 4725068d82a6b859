"""report.html of an evaluation of labels, tags, answers or rewards: the figures, their charts, and the worst mistakes to read.

One self-contained page of the same style, and under the same rules, as the report of a run (``run_page``).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.files import replace_file
from tunesmith.report import charts, pages
from tunesmith.report.pages import Tile, titled
from tunesmith.runs.figure_format import is_number, number

_FIRST = (
    "accuracy", "micro_f1", "exact_match", "f1", "precision", "recall", "macro_f1", "auroc", "token_accuracy", "rmse", "mae",
    "pearson", "margin",
)  # fmt: skip
"""The first three of these that are there become the headline."""
_MEASURES = {"loss": "loss", "f1": "F1"}
_FOLDED = 30  # a longer table is folded away
_ROOM = 1200  # characters of a text that are shown
_AROUND = 200  # characters on either side of what is marked in a longer text
_PROBABLE = 5


def write(
    folder: str | Path,
    title: str,
    figures: Mapping[str, Any],
    mistakes: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.html, and each chart as a PNG, into ``folder`` (made if need be); return the report's path.

    ``title``: what was measured, text. ``figures``: what ``tunesmith.metrics`` returns (``classes``, ``entities.score``,
    ``squad.score``), with single figures of any name added. ``confusion``, ``curves``,
    ``calibration`` and ``per_class`` or ``by_type`` are drawn where they are there. ``facts``: model, data, rows ... as a list;
    ``notes`` in it are lines for the top of the page, ``command`` is shown as typed.

    ``mistakes``: the worst first, each {"where": "file:row", "gold": ..., "prediction": ...} (a string, a number, a list of
    strings; None or empty = none) and, as far as there are any:

    - ``text``, ``text_pair``, ``question``: what was read. A long text is cut, around what is marked in it if anything is;
    - ``probabilities`` {name: share}: the likeliest are shown, and the true ones;
    - ``gold_spans``, ``predicted_spans`` [{"start", "end", "type"}] in characters of ``text``, ``type`` optional: entities, or
      the places of answers. The text is shown twice, with the true and with the predicted spans marked in it;
    - ``loss`` or ``f1``: how bad it is;
    - ``rewards``: then ``gold`` is the better answer, ``prediction`` the one with the highest reward.

    Files are replaced in one piece. Raises DiskFullError when there is no room for them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(figures)
    for picture in pictures:
        replace_file(folder / f"{picture.name}.png", picture.png)
    rest = dict(facts or {})
    notes, command = rest.pop("notes", None) or (), rest.pop("command", None)
    classes = [
        {"#": place, _word(figures): name, **one}
        for place, (name, one) in enumerate(_by_class(figures).items())
    ]
    return pages.save(
        folder / "report.html",
        "task.html",
        title=title,
        version=tunesmith.__version__,
        command=str(command or ""),
        tiles_shown=_tiles(figures),
        notes_shown=[str(line) for line in notes],
        figures={
            k: v for k, v in figures.items() if not isinstance(v, Mapping | list) or k == "baseline_labels"
        },
        class_word=_word(figures),
        classes=sorted(classes, key=lambda row: -row["support"]),
        is_folded=len(classes) > _FOLDED,
        pictures=pictures,
        mistakes=[_mistake(one) for one in mistakes],
        facts_shown=rest,
    )


def _by_class(figures: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return figures.get("per_class") or figures.get("by_type") or {}


def _word(figures: Mapping[str, Any]) -> str:
    return "class" if "per_class" in figures else "type"


@dataclass(frozen=True)
class Picture:
    """A chart: its file's name without ``.png``, the line above it, and what it says to those who cannot see it."""

    name: str
    caption: str
    png: bytes
    detail: str = ""

    @property
    def alt(self) -> str:
        return f"{self.caption}. {self.detail}" if self.detail else self.caption

    @property
    def width(self) -> int:
        return (
            int.from_bytes(self.png[16:20]) // 2
        )  # of its header: drawn for twice the dots of a plain screen

    @property
    def source(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


def _pictures(figures: Mapping[str, Any]) -> list[Picture]:
    found = []
    classes = _by_class(figures)

    def add(name: str, caption: str, figure: Any, detail: str = "") -> None:
        found.append(Picture(name, caption, charts.png(figure), detail))

    if figures.get("confusion"):
        names, counts = list(classes), figures["confusion"]
        caption = "Confusion matrix: counts, coloured by the share of the row"
        add("confusion", caption, charts.confusion(counts, names), _confused(counts, names))
    if classes:
        add(
            "per-class",
            "Precision, recall and F1",
            charts.per_class(classes),
            "The figures are in the table above.",
        )
    if any((figures.get("curves") or {}).values()):
        by_support = sorted(figures["curves"], key=lambda name: -classes.get(name, {}).get("support", 0))
        curves = {name: figures["curves"][name] for name in by_support}
        add("precision-recall", "Precision and recall at every threshold", charts.precision_recall(curves))
    if bins := figures.get("calibration"):
        caption = "Calibration: how sure the model is, and how often it is right"
        told = (
            f"{number(one['accuracy'])} are right at a confidence of {number(one['confidence'])}"
            for one in bins
        )
        add("calibration", caption, charts.calibration(bins), "; ".join(told))
    if buckets := figures.get("by_length"):
        caption = "Accuracy by how much longer the better answer is: does the model only measure length?"
        told = (f"{name}: {number(one['accuracy'])}" for name, one in buckets.items())
        add("by-length", caption, charts.buckets(buckets, 0.5), "; ".join(told))
    return found


def _confused(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """The most frequent confusions in words."""
    pairs = [
        (count, true, said)
        for row, true in zip(counts, names)
        for count, said in zip(row, names)
        if count and true != said
    ]
    worst = sorted(pairs, key=lambda pair: -pair[0])[:3]
    return (
        "; ".join(f"{true} is predicted as {said} {count} times" for count, true, said in worst)
        or "No confusions"
    )


def _tiles(figures: Mapping[str, Any]) -> list[Tile]:
    same = {"micro_f1"} if "accuracy" in figures else set()  # with one class for each row they are equal
    shown = [name for name in _FIRST if is_number(figures.get(name)) and name not in same][:3]
    baseline, longer = figures.get("baseline"), figures.get("longer_is_better")
    tiles = []
    for name in shown:
        note = ""
        if name in ("accuracy", "micro_f1") and name == shown[0] and is_number(baseline):
            note = f"{number(baseline)} by always saying the same"
        if name == "accuracy" and is_number(longer):
            note = f"{number(max(longer, 1 - longer))} by always taking the {'longer' if longer >= 0.5 else 'shorter'} one"
        tiles.append(Tile(titled(name), number(figures[name]), note))
    return tiles


@dataclass(frozen=True)
class Piece:
    """A stretch of a text; marked where ``kind`` is ``right`` or ``wrong``."""

    text: str
    kind: str = ""
    type: str = ""


@dataclass(frozen=True)
class Side:
    """The true or the predicted side of a mistake. ``text`` is None where the marked text says it all."""

    name: str
    kind: str
    text: str | None
    marked: list[Piece]
    likely: str


@dataclass(frozen=True)
class Mistake:
    """``read``: the texts above the two sides."""

    label: str
    read: list[str]
    sides: list[Side]


def _mistake(mistake: Mapping[str, Any]) -> Mistake:
    measures = [
        f"{name} {number(mistake[key])}" for key, name in _MEASURES.items() if is_number(mistake.get(key))
    ]
    gold, predicted = mistake.get("gold_spans") or [], mistake.get("predicted_spans") or []
    is_typed = any(span.get("type") for span in [*gold, *predicted])
    names = ("better", "preferred") if "rewards" in mistake else ("true", "predicted")

    def side(
        name: str,
        kind: str,
        value: Any,
        spans: Sequence[Mapping[str, Any]],
        others: Sequence[Mapping[str, Any]],
    ) -> Side:
        is_marked = is_typed or bool(spans)
        marked = _marked(str(mistake.get("text", "")), spans, set(map(_place, others))) if is_marked else []
        chances = mistake.get("probabilities") if kind and not is_marked else None
        likely = _likely(chances, mistake.get("gold")) if chances else ""
        return Side(name, kind, None if is_typed else _value(value), marked, likely)

    read = ["question"] if gold or predicted else ["question", "text", "text_pair"]
    return Mistake(
        label=" · ".join([str(mistake.get("where", "")), *measures]),
        read=[_cut(str(mistake[key])) for key in read if mistake.get(key)],
        sides=[
            side(names[0], "", mistake.get("gold"), gold, predicted),
            side(names[1], "after", mistake.get("prediction"), predicted, gold),
        ],
    )


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " | ".join(map(str, value))
    return number(value) if is_number(value) else _cut(str(value))


def _likely(probabilities: Mapping[str, float], gold: Any) -> str:
    true = set(gold) if isinstance(gold, list | tuple) else {gold}
    ordered = sorted(probabilities, key=lambda name: -probabilities[name])
    shown = [name for place, name in enumerate(ordered) if place < _PROBABLE or name in true]
    return " · ".join(f"{name} {number(probabilities[name])}" for name in shown)


def _place(span: Mapping[str, Any]) -> tuple[int, int, Any]:
    return span["start"], span["end"], span.get("type")


def _cut(text: str) -> str:
    return text if len(text) <= _ROOM else f"{text[:_ROOM]}… ({len(text) - _ROOM:,} more characters)"


def _marked(text: str, spans: Sequence[Mapping[str, Any]], others: set[tuple[int, int, Any]]) -> list[Piece]:
    """``text`` with its spans marked: right where the other side has the same one. A long text is cut around them."""
    first, last = 0, len(text)
    if len(text) > _ROOM:
        starts, ends = [span["start"] for span in spans], [span["end"] for span in spans]
        first = max(0, min(starts, default=0) - _AROUND)
        last = min(len(text), max(max(ends, default=0) + _AROUND, first + 2 * _AROUND), first + _ROOM)
    pieces, done = [Piece("…")] if first else [], first
    for span in sorted(spans, key=lambda span: span["start"]):
        start, end = max(span["start"], done), min(span["end"], last)
        if start >= end:  # within another, or cut away
            continue
        kind = "right" if _place(span) in others else "wrong"
        pieces += [Piece(text[done:start]), Piece(text[start:end], kind, str(span.get("type") or ""))]
        done = end
    return [*pieces, Piece(text[done:last]), *([Piece("…")] if last < len(text) else [])]
