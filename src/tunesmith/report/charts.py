"""Charts as matplotlib figures: one function each, data in, a ``Figure`` out. ``png`` draws the bytes of a
file.

A page embeds the same bytes. Curves over steps are the exception: a page has a ``curves.Plot``; this module
draws them for ``loss.png`` and ``runs compare``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tunesmith.report import language
from tunesmith.report.curves import MOST_MARKED, Curve, Points, smooth
from tunesmith.report.fonts import fit_names, fonts_of
from tunesmith.runs.figure_format import shorten_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0f8578", "#8a4fbf", "#a87900", "#c2185b", "#5b7d1c", "#6a6f78")
"""Line colours that are easy to distinguish; style.css calls them --set0 to --set5."""
BLUE, ORANGE, RED, GREY, TEAL = "#2f6db5", "#d2691e", "#c62828", COLOURS[-1], COLOURS[0]
MOST_CLASSES = 30
"""A figure has room for this many classes; it shows the most frequent ones."""
MOST_LINES = 2 * len(COLOURS)
"""Lines that can be distinguished: each colour, solid and dashed."""

_KOREAN = "가나다라"


def t(text: str, /, **values: object) -> str:
    """Return a text of a chart in the language of the page, or in English if no installed font has its letters."""
    english = text.format(**values) if values else text
    return language.t(text, **values) if language.current() == "en" or not fonts_of(_KOREAN)[1] else english


_Measures = Mapping[str, Mapping[str, Any]]
"""Name -> measure -> value."""


def over_steps(title: str, curves: Sequence[Curve]) -> Figure:
    """Draw the curves of one run."""
    figure, axes = _figure(8, 4.5)
    colours = {"train": BLUE, "eval": ORANGE}
    colours |= {f"set{index}": colour for index, colour in enumerate(COLOURS)}
    handles = []
    for curve in curves:
        dashes = "--" if "dashed" in curve.classes else "-"
        handles.append(_draw(axes, curve, colours[curve.classes.partition(" ")[0]], dashes))
    _label_axes(axes, t("step"), title)
    if curves:
        names = [curve.classes if fonts_of(curve.name)[1] else curve.name for curve in curves]
        _legend(figure, handles, names, "outside upper center", 90)
    return figure


def compare(runs: Sequence[tuple[str, Points, Points]], by: str = "step") -> Figure:
    """Overlay runs (name, training loss, held-out loss), one colour for each; ``by``: step or tokens."""
    figure, (left, right) = _figure(11, 4.8, columns=2)
    colours = (BLUE, ORANGE, *COLOURS)
    handles = {}
    for index, (name, training, held_out) in enumerate(runs):
        colour, dashes = colours[index % len(colours)], "-" if index < len(colours) else "--"
        for axes, curve in ((right, Curve(name, held_out, "eval")), (left, Curve(name, training, "train"))):
            if curve.finite:
                handles[name] = _draw(axes, curve, colour, dashes)
    empty = {t("training loss"): t("no records"), t("held-out loss"): t("no held-out rows")}
    for axes, title in zip((left, right), empty):
        _label_axes(axes, t(by), t("loss"))
        axes.set_title(title)
        if not axes.lines:
            axes.text(0.5, 0.5, empty[title], ha="center", va="center", transform=axes.transAxes, color=GREY)
    if handles:
        _legend(figure, list(handles.values()), list(handles), "outside lower center", 120)
    return figure


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """Draw a confusion matrix (k, k) whose rows are the true classes. Colour: the share of the row; text:
    counts.

    Of more than 30 classes, the 29 most frequent (as truth or prediction) and the others together.
    """
    from matplotlib.colors import LinearSegmentedColormap

    matrix, labels, numbers = _fold_rare_classes(np.asarray(counts), list(names))
    size = len(labels)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    fitted = fit_names(labels, numbers)
    side = max(3.2, 0.36 * size)
    figure, axes = _figure(side + 2.6, side + 1.4)
    axes.imshow(shares, vmin=0, vmax=1, cmap=LinearSegmentedColormap.from_list("shares", ["#ffffff", BLUE]))
    font_size = 9 if size <= 12 else 7 if size <= 20 else 5.5
    for row, column in zip(*np.nonzero(matrix)):
        colour = "white" if shares[row, column] > 0.55 else "#22211f"
        count = _short_count(int(matrix[row, column]))
        axes.text(column, row, count, ha="center", va="center", fontsize=font_size, color=colour)
    is_long = max(map(len, fitted.shown)) > 3
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
    text = {"parse_math": False, "fontfamily": fitted.families, "fontsize": max(font_size, 7)}
    axes.set_xticks(range(size), fitted.shown, **text, **turned)
    axes.set_yticks(range(size), fitted.shown, **text)
    axes.set(xlabel=t("predicted") + fitted.note, ylabel=t("true"))
    axes.tick_params(length=0)
    axes.spines[:].set_color("#e4e0d8")
    return figure


def _fold_rare_classes(counts: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str], list[int]]:
    """Return counts, names and numbers of at most MOST_CLASSES classes; the last one may be all others."""
    if len(names) <= MOST_CLASSES:
        return counts, names, list(range(len(names)))
    by_size = np.argsort(-(counts.sum(axis=0) + counts.sum(axis=1)), kind="stable")
    kept, rest = np.sort(by_size[: MOST_CLASSES - 1]), by_size[MOST_CLASSES - 1 :]
    fold = np.zeros((MOST_CLASSES, len(names)), dtype=counts.dtype)
    fold[np.arange(MOST_CLASSES - 1), kept] = 1
    fold[-1, rest] = 1
    labels = [*(names[index] for index in kept), t("{count} others", count=len(rest))]
    return fold @ counts @ fold.T, labels, [*kept.tolist(), -1]


def per_class(measures: _Measures) -> Figure:
    """Draw precision, recall and F1 of each class {name: {precision, recall, f1, support}}, most frequent
    first.

    Of more than 30 classes the most frequent ones; the axis label has both numbers.
    """
    number = {name: index for index, name in enumerate(measures)}
    ordered = sorted(measures, key=lambda name: -measures[name]["support"])[:MOST_CLASSES]
    fitted = fit_names(ordered, [number[name] for name in ordered])
    keys = (("precision", t("precision"), BLUE), ("recall", t("recall"), TEAL), ("f1", "F1", ORANGE))
    bars = {label: ([measures[name][key] for name in ordered], colour) for key, label, colour in keys}
    labels = [f"{shown}  ({measures[name]['support']:,})" for shown, name in zip(fitted.shown, ordered)]
    is_cut = len(ordered) < len(measures)
    left_out = t("the {count} most frequent of {all} classes", count=len(ordered), all=len(measures))
    lines = [t("share (in brackets: rows of the class)"), *([left_out] if is_cut else [])]
    title = "\n".join(lines) + fitted.note
    figure = _bars(bars, labels, title, fitted.families)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return figure


def accuracy_by_bucket(measures: _Measures, chance: float) -> Figure:
    """Draw the accuracy in each bucket {name: {pairs, accuracy}}, in order, with a line at ``chance``."""
    labels = [f"{name}  ({one['pairs']:,})" for name, one in measures.items()]
    bars = {t("accuracy"): ([one["accuracy"] for one in measures.values()], BLUE)}
    figure = _bars(bars, labels, t("accuracy (in brackets: pairs; dashed: chance)"))
    figure.axes[0].axvline(chance, linestyle="--", color=GREY, linewidth=1)
    return figure


def precision_recall(curves: Mapping[str, Sequence[Sequence[float]] | None]) -> Figure:
    """Draw precision over recall for the first 12 labels {name: [[recall, precision], ...]} with a curve."""
    number = {name: index for index, name in enumerate(curves)}
    drawn = {name: points for name, points in curves.items() if points}
    names = list(drawn)[:MOST_LINES]
    fitted = fit_names(names, [number[name] for name in names])
    figure, axes = _figure(8, 4.5)
    lines = []
    for index, name in enumerate(names):
        recall, precision = zip(*drawn[name])
        colour, dashes = COLOURS[index % len(COLOURS)], "--" if index >= len(COLOURS) else "-"
        # Only the lower of two thresholds reaches a recall between them, and it has the lower one's
        # precision: steps, not straight lines (Davis and Goadrich 2006). Recall falls from point to point, so
        # the lower comes first.
        lines += axes.step(recall, precision, dashes, where="post", color=colour, linewidth=1.6)
    left_out = (
        t(" ({count} of {all} labels)", count=len(names), all=len(drawn)) if len(names) < len(drawn) else ""
    )
    axes.set(
        xlim=(0, 1.02), ylim=(0, 1.04), xlabel=f"{t('recall')}{left_out}{fitted.note}", ylabel=t("precision")
    )
    _style_axes(axes)
    numbers = [str(index) for index in range(len(lines))]
    legend = figure.legend(lines, numbers, frameon=False, loc="outside right upper")
    texts = zip(legend.get_texts(), fitted.shown)
    for text, shown in texts:  # set later: a legend drops names that begin with "_"
        text.set(parse_math=False, text=shown, fontfamily=fitted.families)
    return figure


def calibration(bins: Sequence[Mapping[str, float]]) -> Figure:
    """Draw accuracy by confidence and the share of rows, in the bins of ``metrics.classes.calibration``."""
    confidence, accuracy, count = ([one[key] for one in bins] for key in ("confidence", "accuracy", "count"))
    figure, (above, below) = _figure(6, 5.4, rows=2, sharex=True, height_ratios=[4, 1])
    above.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label=t("perfect calibration"))
    marks = {"linewidth": 1.6, "markersize": 5, "label": t("measured"), "zorder": 4}
    above.plot(confidence, accuracy, "o-", color=ORANGE, **marks)
    above.vlines(confidence, confidence, accuracy, color=ORANGE, alpha=0.3, linewidth=4)
    above.set(xlim=(0, 1.02), ylim=(0, 1.04), ylabel=t("accuracy"))
    above.legend(frameon=False, loc="upper left")
    below.bar(confidence, np.asarray(count) / max(sum(count), 1), width=0.05, color=BLUE)
    below.set(xlabel=t("confidence"), ylabel=t("share of all"))
    for axes in (above, below):
        _style_axes(axes)
    return figure


def differences(figures: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the difference of each figure with its interval, in half-widths of the interval; right is better.

    ``figures``: name -> value, low, high, ``higher_is_better`` and ``better``. A figure of which neither
    direction is better has its own sign and is grey.
    """
    names = list(figures)[::-1]
    fitted = fit_names(names, list(range(len(names))))
    figure, axes = _figure(8, 0.9 + 0.34 * len(names))
    for place, name in enumerate(names):
        one = figures[name]
        half = (one["high"] - one["low"]) / 2
        sign = -1 if one["higher_is_better"] is False else 1
        middle = 0.0 if half == 0 else float(np.clip(sign * one["value"] / half, -8, 8))
        colour = {True: TEAL, False: RED, None: GREY}[one["better"]]
        axes.errorbar(
            middle, place, xerr=1.0 if half else 0.0, fmt="o", color=colour, capsize=3, linewidth=1.8
        )
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(names)), fitted.shown, fontfamily=fitted.families)
    axes.set(xlabel=t("← worse    difference in half-widths of its interval    better →"), xlim=(-9.5, 9.5))
    _style_axes(axes, "x")
    return figure


def png(figure: Figure) -> bytes:
    """Draw ``figure`` without a display, each text in fonts that have its letters."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if not text.get_text().isascii():
            text.set_fontfamily(fonts_of(text.get_text())[0])
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.1)
    return out.getvalue()


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, Any]:
    """Return (figure, axes), sizes in inches; an array of axes where there are several rows or columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(rows, columns, **grid)


def _style_axes(axes: Axes, grid: Literal["both", "x"] = "both") -> None:
    """Put grid lines behind the data and remove the upper and right frame."""
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Label both axes, with whole numbers on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    _style_axes(axes)


def _draw(axes: Axes, curve: Curve, colour: str, dashes: str) -> Line2D:
    """Draw a curve and return its line. Training is faint under a smoothed line; others have marks."""
    points = smooth(curve.finite) if curve.is_training else curve.finite
    if points != curve.finite:
        axes.plot(*_xy(curve.finite), color=colour, alpha=0.25, linewidth=0.9)
    mark, order = ("", 3) if curve.is_training else ("o", 4)
    style: dict[str, Any] = {
        "color": colour,
        "linewidth": 1.8,
        "markersize": 5,
        "label": curve.name,
        "zorder": order,
    }
    (line,) = axes.plot(*_xy(points), mark + dashes, **style)
    for step in curve.not_finite[:MOST_MARKED]:
        axes.axvline(step, color=RED, linestyle="--", linewidth=1)
    return line


def _bars(
    bars: Mapping[str, tuple[list[float], str]],
    labels: list[str],
    title: str,
    families: list[str] | None = None,
) -> Figure:
    """Draw groups of horizontal bars {legend: (shares, colour)}, the first label on top."""
    figure, axes = _figure(8, 1.4 + 0.42 * len(labels))
    rows = np.arange(len(labels))
    pitch = 0.78 / len(bars)
    for index, (label, (values, colour)) in enumerate(bars.items()):
        shift = (index - (len(bars) - 1) / 2) * pitch
        axes.barh(rows + shift, values, height=pitch * 0.92, color=colour, label=label)
    axes.set_yticks(rows, labels, parse_math=False, **({"fontfamily": families} if families else {}))
    axes.set(xlim=(0, 1.02), ylim=(len(labels) - 0.5, -0.5), xlabel=title)
    _style_axes(axes, "x")
    return figure


def _legend(figure: Figure, lines: Sequence[Line2D], names: Sequence[str], place: str, room: int) -> None:
    """Add a legend outside the axes, so that it covers no curve. ``room``: characters in one line of it."""
    short = [shorten_middle(name, room // 2) for name in names]
    columns = max(1, min(len(short), room // (max(map(len, short)) + 6)))
    figure.legend(lines, short, frameon=False, loc=place, ncols=columns)


def _xy(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _short_count(count: int) -> str:
    """950, 12k, 3.4M: short enough for a cell."""
    if count < 10_000:
        return str(count)
    return f"{count / 1e3:.0f}k" if count < 999_500 else f"{count / 1e6:.1f}M"
