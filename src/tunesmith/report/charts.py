"""Charts as matplotlib figures: a function for each, data in, a ``Figure`` out; ``png`` makes the bytes of a file.

A page embeds the same bytes. Curves over steps are the exception: on a page they are a ``curves.Plot``, here they are drawn
for ``loss.png`` and ``runs compare``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tunesmith.report.curves import MOST_MARKED, Curve, Points, smooth
from tunesmith.report.fonts import legible
from tunesmith.runs import figure_format

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0f8578", "#8a4fbf", "#a87900", "#c2185b", "#5b7d1c", "#6a6f78")
"""Lines that are told apart by colour; style.css calls them --set0 to --set5."""
BLUE, ORANGE, RED, GREY, TEAL = "#2f6db5", "#d2691e", "#c62828", COLOURS[-1], COLOURS[0]
MOST_CLASSES = 30
"""Classes that a figure has room for; of more, the most frequent ones."""
MOST_LINES = 2 * len(COLOURS)
"""Lines that can be told apart: each colour, plain and dashed."""


def over_steps(title: str, curves: Sequence[Curve]) -> Figure:
    """The curves of one run."""
    figure, axes = _figure(8, 4.5)
    colours = {"train": BLUE, "eval": ORANGE} | {
        f"set{number}": colour for number, colour in enumerate(COLOURS)
    }
    for curve in curves:
        _draw(
            axes, curve, colours[curve.classes.partition(" ")[0]], "--" if "dashed" in curve.classes else "-"
        )
    _over(axes, "step", title)
    if curves:
        _legend(
            figure,
            axes.get_legend_handles_labels()[0],
            [curve.name for curve in curves],
            "outside upper center",
            90,
        )
    return figure


def compare(runs: Sequence[tuple[str, Points, Points]], by: str = "step") -> Figure:
    """Runs (name, training loss, held-out loss) over each other, one colour for each; ``by``: step or tokens."""
    figure, (left, right) = _figure(11, 4.8, columns=2)
    colours = (BLUE, ORANGE, *COLOURS)
    handles = {}
    for number, (name, learnt, held_out) in enumerate(runs):
        colour, line = colours[number % len(colours)], "-" if number < len(colours) else "--"
        for axes, curve in ((right, Curve(name, held_out, "eval")), (left, Curve(name, learnt, "train"))):
            if curve.finite:
                handles[name] = _draw(axes, curve, colour, line)
    for axes, title, nothing in (
        (left, "training loss", "no records"),
        (right, "held-out loss", "no held-out rows"),
    ):
        _over(axes, by, "loss")
        axes.set_title(title)
        if not axes.lines:
            axes.text(0.5, 0.5, nothing, ha="center", va="center", transform=axes.transAxes, color=GREY)
    if handles:
        _legend(figure, list(handles.values()), list(handles), "outside lower center", 120)
    return figure


def confusion(counts: Any, names: Sequence[str]) -> Figure:
    """A confusion matrix: ``counts`` (k, k), a row is what is true. Coloured by the share of the row, counts written.

    Of more than 30 classes the 29 that occur most, as truth or as prediction, and the others taken together.
    """
    from matplotlib.colors import LinearSegmentedColormap

    counts = np.asarray(counts)
    labels = list(names)
    numbers = list(range(len(labels)))
    if len(labels) > MOST_CLASSES:
        by_size = np.argsort(-(counts.sum(axis=0) + counts.sum(axis=1)), kind="stable")
        kept, rest = np.sort(by_size[: MOST_CLASSES - 1]), by_size[MOST_CLASSES - 1 :]
        fold = np.zeros((MOST_CLASSES, len(labels)), dtype=counts.dtype)
        fold[np.arange(MOST_CLASSES - 1), kept] = 1
        fold[-1, rest] = 1
        counts = fold @ counts @ fold.T
        labels, numbers = [*(labels[place] for place in kept), f"{len(rest)} others"], [*kept.tolist(), -1]
    size = len(labels)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    drawn = legible(labels, numbers)
    side = max(3.2, 0.36 * size)
    figure, axes = _figure(side + 2.6, side + 1.4)
    axes.imshow(shares, vmin=0, vmax=1, cmap=LinearSegmentedColormap.from_list("shares", ["#ffffff", BLUE]))
    ink = 9 if size <= 12 else 7 if size <= 20 else 5.5
    for row, column in zip(*np.nonzero(counts)):
        colour = "white" if shares[row, column] > 0.55 else "#22211f"
        axes.text(
            column,
            row,
            _short(int(counts[row, column])),
            ha="center",
            va="center",
            fontsize=ink,
            color=colour,
        )
    turned = (
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, drawn.shown)) > 3 else {}
    )
    text = {"parse_math": False, "fontfamily": drawn.families, "fontsize": max(ink, 7)}
    axes.set_xticks(range(size), drawn.shown, **text, **turned)
    axes.set_yticks(range(size), drawn.shown, **text)
    axes.set(xlabel="predicted" + drawn.note, ylabel="true")
    axes.tick_params(length=0)
    axes.spines[:].set_color("#e4e0d8")
    return figure


def per_class(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Bars of precision, recall and F1 of each class {name: {precision, recall, f1, support}}, the most frequent first.

    Of more than 30 classes the most frequent ones; the axis says so.
    """
    number = {name: place for place, name in enumerate(found)}
    ordered = sorted(found, key=lambda name: -found[name]["support"])[:MOST_CLASSES]
    drawn = legible(ordered, [number[name] for name in ordered])
    bars = {
        label: ([found[name][key] for name in ordered], colour)
        for key, label, colour in (
            ("precision", "precision", BLUE),
            ("recall", "recall", TEAL),
            ("f1", "F1", ORANGE),
        )
    }
    labels = [f"{name}  ({found[key]['support']:,})" for name, key in zip(drawn.shown, ordered)]
    left_out = (
        f"\nthe {len(ordered)} most frequent of {len(found)} classes" if len(ordered) < len(found) else ""
    )
    figure = _bars(
        bars, labels, f"share (in brackets: how often it is true){left_out}{drawn.note}", drawn.families
    )
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return figure


def buckets(found: Mapping[str, Mapping[str, float]], chance: float) -> Figure:
    """Bars of the accuracy in each bucket {name: {pairs, accuracy}}, in their order, with a line at ``chance``."""
    labels = [f"{name}  ({one['pairs']:,})" for name, one in found.items()]
    bars = {"accuracy": ([one["accuracy"] for one in found.values()], BLUE)}
    figure = _bars(bars, labels, "accuracy (in brackets: pairs; dashed: by chance)")
    figure.axes[0].axvline(chance, linestyle="--", color=GREY, linewidth=1)
    return figure


def precision_recall(curves: Mapping[str, Sequence[Sequence[float]] | None]) -> Figure:
    """Precision over recall of each label {name: [[recall, precision], ...]}; the first 12 labels that have a curve."""
    number = {name: place for place, name in enumerate(curves)}
    drawn = {name: points for name, points in curves.items() if points}
    names = list(drawn)[:MOST_LINES]
    written = legible(names, [number[name] for name in names])
    figure, axes = _figure(8, 4.5)
    lines = []
    for place, name in enumerate(names):
        recall, precision = zip(*drawn[name])
        colour, dashes = COLOURS[place % len(COLOURS)], "--" if place >= len(COLOURS) else "-"
        # Between two thresholds a recall is only reached by the lower one, with its precision: no straight line between them
        # (Davis and Goadrich 2006). Recall falls from point to point, so that is the first of the two.
        lines += axes.step(recall, precision, dashes, where="post", color=colour, linewidth=1.6)
    left_out = f" ({len(names)} of {len(drawn)} labels)" if len(names) < len(drawn) else ""
    axes.set(xlim=(0, 1.02), ylim=(0, 1.04), xlabel=f"recall{left_out}{written.note}", ylabel="precision")
    _open(axes)
    legend = figure.legend(
        lines, [str(place) for place in range(len(lines))], frameon=False, loc="outside right upper"
    )
    for text, shown in zip(
        legend.get_texts(), written.shown
    ):  # set afterwards: a legend leaves out names that begin with "_"
        text.set(parse_math=False, text=shown, fontfamily=written.families)
    return figure


def calibration(bins: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy by confidence, of the bins that ``metrics.classes.calibration`` makes; below, the share of rows in each."""
    confidence, accuracy, count = ([one[key] for one in bins] for key in ("confidence", "accuracy", "count"))
    figure, (above, below) = _figure(6, 5.4, rows=2, sharex=True, height_ratios=[4, 1])
    above.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="perfect calibration")
    above.plot(
        confidence, accuracy, "o-", color=ORANGE, linewidth=1.6, markersize=5, label="measured", zorder=4
    )
    above.vlines(confidence, confidence, accuracy, color=ORANGE, alpha=0.3, linewidth=4)
    above.set(xlim=(0, 1.02), ylim=(0, 1.04), ylabel="accuracy")
    above.legend(frameon=False, loc="upper left")
    below.bar(confidence, np.asarray(count) / max(sum(count), 1), width=0.05, color=BLUE)
    below.set(xlabel="confidence", ylabel="share of all")
    for axes in (above, below):
        _open(axes)
    return figure


def png(figure: Figure) -> bytes:
    """Draw ``figure`` without a display."""
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.1)
    return out.getvalue()


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, Any]:
    """(figure, axes) of this many inches; an array of axes where there are several rows or columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(rows, columns, **grid)


def _open(axes: Axes, along: Literal["both", "x"] = "both") -> None:
    """Grid lines behind the data, no frame above and on the right."""
    axes.grid(axis=along, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _over(axes: Axes, label: str, value: str) -> None:
    """Whole numbers below, ``value`` on the left."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=label, ylabel=value)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    _open(axes)


def _draw(axes: Axes, curve: Curve, colour: str, line: str) -> Any:
    """Draw a curve and return its handle for a legend: training faint with a smoothed line over it, others marked."""
    points = smooth(curve.finite) if curve.is_training else curve.finite
    if points != curve.finite:
        axes.plot(*_xy(curve.finite), color=colour, alpha=0.25, linewidth=0.9)
    mark, order = ("", 3) if curve.is_training else ("o", 4)
    (handle,) = axes.plot(
        *_xy(points), mark + line, color=colour, linewidth=1.8, markersize=5, label=curve.name, zorder=order
    )
    for step in curve.not_finite[:MOST_MARKED]:
        axes.axvline(step, color=RED, linestyle="--", linewidth=1)
    return handle


def _bars(
    bars: Mapping[str, tuple[list[float], str]],
    labels: list[str],
    title: str,
    families: list[str] | None = None,
) -> Figure:
    """Groups of horizontal bars {legend: (shares, colour)}, the first label on top."""
    figure, axes = _figure(8, 1.4 + 0.42 * len(labels))
    places = np.arange(len(labels))
    pitch = 0.78 / len(bars)
    for turn, (label, (values, colour)) in enumerate(bars.items()):
        shift = (turn - (len(bars) - 1) / 2) * pitch
        axes.barh(places + shift, values, height=pitch * 0.92, color=colour, label=label)
    axes.set_yticks(places, labels, parse_math=False, **({"fontfamily": families} if families else {}))
    axes.set(xlim=(0, 1.02), ylim=(len(labels) - 0.5, -0.5), xlabel=title)
    _open(axes, "x")
    return figure


def _legend(figure: Figure, handles: list[Any], names: list[str], place: str, room: int) -> None:
    """A legend outside the axes, so that it lies on no curve. ``room``: characters in one line of it."""
    names = [figure_format.shorter(name, room // 2) for name in names]
    columns = max(1, min(len(names), room // (max(map(len, names)) + 6)))
    figure.legend(handles, names, frameon=False, loc=place, ncols=columns)


def _xy(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _short(count: int) -> str:
    """950, 12k, 3.4M: what a cell has room for."""
    if count < 10_000:
        return str(count)
    return f"{count / 1e3:.0f}k" if count < 999_500 else f"{count / 1e6:.1f}M"
