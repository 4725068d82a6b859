"""report.html of an evaluation of labels, tags, answers or rewards: figures, charts, and the worst mistakes.

One self-contained page in the style, and under the rules, of a run's report (``run_page``).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tunesmith
from tunesmith.files import replace_file
from tunesmith.json_types import JsonObject
from tunesmith.report import charts, pages
from tunesmith.report.language import recorded, sentence, t
from tunesmith.report.pages import Tile, heading, interval
from tunesmith.runs.figure_format import is_number, label, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADLINES = (
    "accuracy", "micro_f1", "exact_match", "f1", "precision", "recall", "macro_f1", "auroc", "token_accuracy", "rmse", "mae",
    "pearson", "margin",
)  # fmt: skip
"""The first three of these that were measured are the headline figures."""
_MEASURES = {"loss": "loss", "f1": "F1"}
_MOST_OPEN_ROWS = 30  # a longer table is folded away
_MOST_TEXT = 1200  # characters of a text that are shown
_AROUND = 200  # characters shown on either side of the marks in a longer text
_MOST_PROBABLE = 5


def write(
    folder: str | Path,
    title: str,
    figures: JsonObject,
    mistakes: Sequence[JsonObject] = (),
    facts: JsonObject | None = None,
    assessment: JsonObject | None = None,
) -> Path:
    """Write report.html, and each chart as a PNG, into ``folder``; return the report's path.

    ``figures``: the result of ``tunesmith.metrics`` (``classes.single``, ``multi``, ``regression``,
    ``entities.score``, ``squad.score``) and single figures of any name. ``confusion``, ``curves``,
    ``calibration`` and ``per_class`` or ``by_type`` become charts. ``facts``: model, data, rows ... as a
    list; ``notes`` in it are lines at the top of the page, ``command`` is shown below the title.
    ``assessment``: the verdict, the intervals and the baselines of ``runs.assessment.assess``.

    ``mistakes``: the worst first, each {"where": "file:row", "gold": ..., "prediction": ...} (a string, a
    number, a list of strings; None or empty = none). These keys are optional:

    - ``text``, ``text_pair``, ``question``: the input. A long text is cut around its marks;
    - ``probabilities`` {name: share}: the page shows the likeliest and the true ones;
    - ``gold_spans``, ``predicted_spans`` [{"start", "end", "type"}] in characters of ``text``, ``type``
      optional: entities or answers. The text is shown twice, with the true and with the predicted spans
      marked;
    - ``loss`` or ``f1``: how wrong the prediction is; ``alike``: rows with the same mistake;
    - ``rewards``: then ``gold`` is the better answer and ``prediction`` the one with the highest reward of the
      others, which the model prefers unless it is ``right``.

    Files are replaced atomically. Raises DiskFullError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(figures)
    for picture in pictures:
        replace_file(folder / f"{picture.name}.png", picture.png)
    facts = dict(facts or {})
    notes, command = facts.pop("notes", None) or (), facts.pop("command", None)
    class_word = "class" if "per_class" in figures else "type"
    by_class = enumerate(_by_class(figures).items())
    classes = [{"#": index, class_word: name, **measures} for index, (name, measures) in by_class]
    several = {key for key, value in figures.items() if isinstance(value, dict | list)} - {"baseline_labels"}
    assessed = (assessment or {}).get("figures") or {}
    several |= {name.removeprefix("eval_") for name in assessed}
    single = {key: value for key, value in figures.items() if key not in several}
    verdict = [sentence(line) for line in (assessment or {}).get("verdict") or ()]
    return pages.save(
        folder / "report.html",
        "task.html",
        title=title,
        version=tunesmith.__version__,
        command=str(command or ""),
        tiles_shown=_tiles(figures),
        notes_shown=[*verdict, *(recorded(str(note)) for note in notes)],
        figures=single,
        assessed=[_assessed_row(name, one) for name, one in assessed.items()],
        class_word=class_word,
        classes=sorted(classes, key=lambda row: -row["support"]),
        is_folded=len(classes) > _MOST_OPEN_ROWS,
        pictures=pictures,
        mistakes=[mistake_card(one) for one in mistakes],
        facts_shown=facts,
    )


def _assessed_row(name: str, one: JsonObject) -> JsonObject:
    """Return a figure with its interval and its baseline, as a row of the page's table."""
    baseline = one.get("baseline")
    return {
        "figure": recorded(label(name)),
        "value": one.get("value"),
        "95% interval": interval(one) if "low" in one else None,
        "baseline": f"{number(baseline['value'])}, {recorded(baseline['words'])}" if baseline else None,
    }


def _by_class(figures: JsonObject) -> dict[str, JsonObject]:
    return figures.get("per_class") or figures.get("by_type") or {}


@dataclass(frozen=True)
class Picture:
    """A chart: its file name without ``.png``, the line above it, and its description in words."""

    name: str
    caption: str
    png: bytes
    detail: str = ""

    @property
    def alt(self) -> str:
        return f"{self.caption}. {self.detail}" if self.detail else self.caption

    @property
    def width(self) -> int:
        """Half the width in the PNG's header: the charts are drawn for screens with two dots a pixel."""
        return int.from_bytes(self.png[16:20]) // 2

    @property
    def source(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


def _pictures(figures: JsonObject) -> list[Picture]:
    pictures = []
    classes = _by_class(figures)

    def add(name: str, caption: str, figure: Figure, detail: str = "") -> None:
        pictures.append(Picture(name, caption, charts.png(figure), detail))

    if counts := figures.get("confusion"):
        names = list(classes)
        caption = t("Confusion matrix: counts, coloured by the share of the row")
        add("confusion", caption, charts.confusion(counts, names), _worst_confusions(counts, names))
    if classes:
        detail = t("The figures are in the table above.")
        add("per-class", t("Precision, recall and F1"), charts.per_class(classes), detail)
    if any((figures.get("curves") or {}).values()):
        by_support = sorted(figures["curves"], key=lambda name: -classes.get(name, {}).get("support", 0))
        curves = {name: figures["curves"][name] for name in by_support}
        add("precision-recall", t("Precision and recall at every threshold"), charts.precision_recall(curves))
    if bins := figures.get("calibration"):
        caption = t("Calibration: how confident the model is, and how often it is right")
        parts = (
            t(
                "{share} are right at a confidence of {confidence}",
                share=number(one["accuracy"]),
                confidence=number(one["confidence"]),
            )
            for one in bins
        )
        detail = "; ".join(parts)
        add("calibration", caption, charts.calibration(bins), detail)
    if buckets := figures.get("by_length"):
        caption = t("Accuracy by how much longer the better answer is: does the model only measure length?")
        detail = "; ".join(f"{name}: {number(one['accuracy'])}" for name, one in buckets.items())
        add("by-length", caption, charts.accuracy_by_bucket(buckets, 0.5), detail)
    return pictures


def _worst_confusions(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Return the three most frequent confusions in words."""
    confusions = [
        (count, true, predicted)
        for row, true in zip(counts, names)
        for count, predicted in zip(row, names)
        if count and true != predicted
    ]
    worst = sorted(confusions, key=lambda confusion: -confusion[0])[:3]
    texts = (
        t("{true} is predicted as {predicted} {count} times", true=true, predicted=predicted, count=count)
        for count, true, predicted in worst
    )
    return "; ".join(texts) or t("No confusions")


def _tiles(figures: JsonObject) -> list[Tile]:
    same = {"micro_f1"} if "accuracy" in figures else set()  # equal to accuracy with one class for each row
    shown = [name for name in _HEADLINES if is_number(figures.get(name)) and name not in same][:3]
    baseline, longer = figures.get("baseline"), figures.get("longer_is_better")
    tiles = []
    for name in shown:
        note = ""
        if name in ("accuracy", "micro_f1") and name == shown[0] and is_number(baseline):
            note = t("{value} by always predicting the same", value=number(baseline))
        if name == "accuracy" and is_number(longer):
            rule = "{value} by always taking the longer one"
            if longer < 0.5:
                rule = "{value} by always taking the shorter one"
            note = t(rule, value=number(max(longer, 1 - longer)))
        tiles.append(Tile(heading(name), number(figures[name]), note))
    return tiles


@dataclass(frozen=True)
class Piece:
    """A stretch of a text, marked if ``kind`` is ``right`` or ``wrong``."""

    text: str
    kind: str = ""
    type: str = ""


@dataclass(frozen=True)
class Side:
    """The true or the predicted side of a mistake. ``text`` is None where the marked text has all of it."""

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


def mistake_card(mistake: JsonObject) -> Mistake:
    """Return the values of the page's card for one example; ``write`` describes the keys of ``mistake``."""
    values = {name: mistake.get(key) for key, name in _MEASURES.items()}
    measures = [f"{recorded(name)} {number(value)}" for name, value in values.items() if is_number(value)]
    if is_number(alike := mistake.get("alike")) and alike > 1:
        measures.append(t("and {count} more rows with the same mistake", count=f"{alike - 1:,}"))
    gold, predicted = mistake.get("gold_spans") or [], mistake.get("predicted_spans") or []
    is_typed = any(span.get("type") for span in [*gold, *predicted])
    names = (t("true"), t("predicted"))
    if "rewards" in mistake:
        names = (
            (t("better, preferred by the model"), t("other"))
            if mistake.get("right")
            else (t("better answer"), t("preferred by the model"))
        )

    def side(name: str, key: str, spans: list[JsonObject], others: list[JsonObject]) -> Side:
        kind = "after" if key == "prediction" else ""
        is_marked = is_typed or bool(spans)
        text = str(mistake.get("text", ""))
        marked = _mark(text, spans, set(map(_position, others))) if is_marked else []
        probabilities = mistake.get("probabilities") if kind and not is_marked else None
        likely = _likeliest(probabilities, mistake.get("gold")) if probabilities else ""
        return Side(name, kind, None if is_typed else _value(mistake.get(key)), marked, likely)

    read = ["question"] if gold or predicted else ["question", "text", "text_pair"]
    return Mistake(
        label=" · ".join([str(mistake.get("where", "")), *measures]),
        read=[_shorten(str(mistake[key])) for key in read if mistake.get(key)],
        sides=[side(names[0], "gold", gold, predicted), side(names[1], "prediction", predicted, gold)],
    )


def _value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " | ".join(map(str, value))
    return number(value) if is_number(value) else _shorten(str(value))


def _likeliest(probabilities: Mapping[str, float], gold: object) -> str:
    true = set(gold) if isinstance(gold, list | tuple) else {gold}
    ordered = sorted(probabilities, key=lambda name: -probabilities[name])
    shown = [name for rank, name in enumerate(ordered) if rank < _MOST_PROBABLE or name in true]
    return " · ".join(f"{name} {number(probabilities[name])}" for name in shown)


def _position(span: JsonObject) -> tuple[int, int, str | None]:
    return span["start"], span["end"], span.get("type")


def _shorten(text: str) -> str:
    rest = len(text) - _MOST_TEXT
    return text if rest <= 0 else f"{text[:_MOST_TEXT]}… " + t("({count} more characters)", count=f"{rest:,}")


def _mark(text: str, spans: list[JsonObject], others: set[tuple[int, int, str | None]]) -> list[Piece]:
    """Mark the spans in ``text``, right if the other side has the same. A long text is cut around them."""
    first, last = 0, len(text)
    if len(text) > _MOST_TEXT:
        start = min((span["start"] for span in spans), default=0)
        end = max((span["end"] for span in spans), default=0)
        first = max(0, start - _AROUND)
        last = min(len(text), max(end + _AROUND, first + 2 * _AROUND), first + _MOST_TEXT)
    pieces, done = [Piece("…")] if first else [], first
    for span in sorted(spans, key=lambda span: span["start"]):
        start, end = max(span["start"], done), min(span["end"], last)
        if start >= end:  # inside another span, or cut away
            continue
        kind = "right" if _position(span) in others else "wrong"
        pieces += [Piece(text[done:start]), Piece(text[start:end], kind, str(span.get("type") or ""))]
        done = end
    return [*pieces, Piece(text[done:last]), *([Piece("…")] if last < len(text) else [])]
