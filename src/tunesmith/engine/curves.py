"""Curves of a run over its steps: as HTML that fits any width and colour scheme, and as a PNG.

The lines are inline SVG stretched to the width of the page; the labels are HTML on top, so that they keep their size on a
phone. Reading a value off needs no script: the plot is covered by invisible strips, and the one under the pointer shows
its figures.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from tunesmith.runs import figures

Points = list[tuple[float, float]]

_BINS = 1500  # more points than a screen has columns cannot be seen
_STRIPS = 64
_FEW = 12  # below so many points a smoothed line would say more than the run does
COLOURS = {
    "train": "#2f6db5", "eval": "#d2691e",
    "set0": "#0f8578", "set1": "#8a4fbf", "set2": "#a87900", "set3": "#c2185b", "set4": "#5b7d1c", "set5": "#6a6f78",
}  # fmt: skip
"""Of the styles; report_style.py has the same ones for HTML, and others for the dark."""
SETS = 6
"""Evaluation sets that have a colour of their own; the next six are dashed."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart. ``points`` are (step, value) in step order; values may be nan or inf.

    ``name`` is what the legend says. The first word of ``style`` is ``train`` (drawn faint, with a smoothed line over it), or
    ``eval`` or ``set0`` to ``set5`` (few points, each marked); it is the name where nothing else is given.
    """

    name: str
    points: Points
    style: str = ""

    @classmethod
    def of_set(cls, name: str, points: Points, number: int) -> Curve:
        """The curve of evaluation set ``number``, counted from 0."""
        return cls(name, points, f"set{number % SETS}" + (" dashed" if number // SETS % 2 else ""))

    @property
    def classes(self) -> str:
        """CSS classes: words of ours, whatever the name is."""
        return self.style or self.name

    @property
    def is_training(self) -> bool:
        return self.classes == "train"

    @property
    def finite(self) -> Points:
        return [point for point in self.points if math.isfinite(point[1])]

    @property
    def broken(self) -> list[float]:
        """The steps at which the value was not finite."""
        return [x for x, y in self.points if not math.isfinite(y)]

    def logarithm(self) -> Curve:
        """The curve of the values' logarithms to the base of ten."""
        return Curve(self.name, [(x, math.log10(y) if math.isfinite(y) else y) for x, y in self.points if not y <= 0])


def smooth(points: Points) -> Points:
    """Local linear regression with a Gaussian kernel over about a tenth of the run.

    Unlike a running mean it neither lags behind nor starts too low where a curve falls steeply (Fan and Gijbels 1996, 3.2).
    """
    if len(points) < _FEW:
        return points
    binned = _binned(points)
    sigma = max(2.0, len(binned) / 30)
    half = min(math.ceil(3 * sigma), len(binned) - 1)
    reach = np.arange(-half, half + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)

    def moment(values: np.ndarray, power: int) -> np.ndarray:
        # convolve() turns the kernel round, so that an odd power takes its sign from the other side.
        return np.convolve(values, kernel * (-reach) ** power)[half : half + len(values)]

    values, ones = np.array([y for _, y in binned]), np.ones(len(binned))
    s0, s1, s2 = (moment(ones, power) for power in (0, 1, 2))
    t0, t1 = moment(values, 0), moment(values, 1)
    fitted = (s2 * t0 - s1 * t1) / (s0 * s2 - s1**2)
    return [(x, float(y)) for (x, _), y in zip(binned, fitted)]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Exponents from ``low`` to ``high`` of 1, 2 and 5 times powers of ten; of whole powers alone once there are many."""
    mantissas = (1, 2, 5) if high - low <= 2 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1, max(1, math.ceil((high - low) / 6)))
    found = [exponent + math.log10(mantissa) for exponent in exponents for mantissa in mantissas]
    return [tick for tick in found if low <= tick <= high] or ticks(low, high, 2)


def chart(
    title: str,
    curves: Sequence[Curve],
    form: Callable[[float], str] = figures.number,
    from_zero: bool = False,
    is_smoothed: bool = True,
    is_log: bool = False,
) -> str:
    """One chart as HTML, or the empty string when no curve has a finite point. ``title`` is text of ours.

    ``is_log``: values are drawn by their logarithm; those of zero and below are left out.
    """
    if is_log:
        curves, form = [curve.logarithm() for curve in curves], _of_exponent(form)
    drawn = [curve for curve in curves if curve.finite]
    if not drawn:
        return ""
    frame = _Frame.around(curves, from_zero)
    lines = "".join(_svg(curve, frame, is_smoothed) for curve in drawn)
    broken = sorted({step for curve in curves for step in curve.broken})
    lines += "".join(f'<path class="broken" d="M{frame.x(step):.1f} 0V1000"/>' for step in broken[:_STRIPS])
    y_ticks = (log_ticks if is_log else ticks)(frame.low, frame.high)
    x_ticks = [x for x in ticks(frame.left, frame.right, 6) if x == int(x)]
    grid = "".join(f'<path class="grid" d="M0 {frame.y(y):.1f}H1000"/>' for y in y_ticks)
    labels = "".join(f'<span class="y" style="top:{frame.y(y) / 10:.2f}%">{form(_exact(y))}</span>' for y in y_ticks)
    labels += "".join(f'<span class="x" style="left:{frame.x(x) / 10:.2f}%">{x:,.0f}</span>' for x in x_ticks)
    keys = "".join(f'<span class="key {curve.classes}">{escape(curve.name)}</span>' for curve in drawn) if len(drawn) > 1 else ""
    if broken:
        keys += f'<span class="key broken">not finite at step {", ".join(f"{step:,.0f}" for step in broken[:3])}' + (
            f" and {len(broken) - 3} more</span>" if len(broken) > 3 else "</span>"
        )
    said = "; ".join(f"{escape(curve.name)} from {form(curve.finite[0][1])} to {form(curve.finite[-1][1])}" for curve in drawn)
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{keys}</figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(title)} by step: {said}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{grid}{lines}</svg>'
        f"{labels}{_strips(drawn, frame, form, is_smoothed)}</div></figure>"
    )


def png(title: str, curves: Sequence[Curve]) -> bytes:
    """The same curves as a PNG for papers and chats, drawn by matplotlib without a display. ``title`` is text of ours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        colour = COLOURS[curve.classes.partition(" ")[0]]
        if not curve.is_training:
            line = "o--" if "dashed" in curve.classes else "o-"
            axes.plot(*_columns(curve.finite), line, color=colour, linewidth=1.6, markersize=5, label=curve.name, zorder=4)
        else:
            strong = smooth(curve.finite)
            if len(curve.finite) >= _FEW:
                axes.plot(*_columns(curve.finite), color=colour, alpha=0.25, linewidth=0.9)
            axes.plot(*_columns(strong), color=colour, linewidth=2, label=curve.name)
        for step in curve.broken[:_STRIPS]:
            axes.axvline(step, color="#c62828", linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if curves:  # above the axes, so that it lies on no curve
        names = [shorter(curve.name, 40) for curve in curves]
        columns = max(1, min(len(names), 90 // (max(map(len, names)) + 6)))
        figure.legend(axes.get_legend_handles_labels()[0], names, frameon=False, loc="outside upper center", ncols=columns)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def shorter(text: str, most: int) -> str:
    """``text`` in at most ``most`` characters: what is in the middle gives way, since names differ at their ends."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"


@dataclass(frozen=True)
class _Frame:
    """The part of the plane a chart shows, mapped onto 1000 x 1000 with y downwards."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, curves: Sequence[Curve], from_zero: bool) -> _Frame:
        xs = [x for curve in curves for x, _ in curve.points]  # a step whose value is not finite is on the page too
        ys = [y for curve in curves for _, y in curve.finite]
        low, high = min(ys), max(ys)
        air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        left, right = min(xs), max(xs)
        # A value that never falls below zero gets no room below zero.
        low = 0.0 if from_zero and low >= 0 else max(low - air, 0.0) if low >= 0 else low - air
        return cls(left, right if right > left else left + 1, low, high + air)

    def x(self, value: float) -> float:
        return 1000 * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return 1000 - 1000 * (value - self.low) / (self.high - self.low)


def _svg(curve: Curve, frame: _Frame, is_smoothed: bool) -> str:
    points = curve.finite
    if not curve.is_training:
        # A path of no length with a round cap is a dot that stays round however the drawing is stretched.
        dots = "".join(f"M{frame.x(x):.1f} {frame.y(y):.1f}h0" for x, y in points)
        return f'<path class="{curve.classes}" d="{_path(points, frame)}"/><path class="{curve.classes} dot" d="{dots}"/>'
    if len(points) == 1:
        return f'<path class="train dot" d="M{frame.x(points[0][0]):.1f} {frame.y(points[0][1]):.1f}h0"/>'
    if not is_smoothed or len(points) < _FEW:
        return f'<path class="train" d="{_path(_outline(points), frame)}"/>'
    raw = f'<path class="train raw" d="{_path(_outline(points), frame)}"/>'
    return f'{raw}<path class="train" d="{_path(smooth(points), frame)}"/>'


def _path(points: Points, frame: _Frame) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)


def _strips(curves: Sequence[Curve], frame: _Frame, form: Callable[[float], str], is_smoothed: bool) -> str:
    """Invisible columns over the plot; the one under the pointer shows the value of each curve in it."""
    columns: dict[int, dict[str, tuple[float, float]]] = {}
    for curve in curves:
        for x, y in smooth(curve.finite) if is_smoothed and curve.is_training else curve.finite:
            columns.setdefault(min(_STRIPS - 1, int(frame.x(x) * _STRIPS / 1000)), {})[curve.classes] = (x, y)
    out = []
    for index, values in sorted(columns.items()):
        step, _ = list(values.values())[-1]  # of an evaluation where there is one: training is drawn first
        lines = "".join(f'<span class="key {style}">{form(y)}</span>' for style, (_, y) in values.items())
        side = "right" if index >= _STRIPS / 2 else "left"
        place = f"left:{100 * index / _STRIPS:.3f}%;width:{100 / _STRIPS:.3f}%"
        out.append(f'<i style="{place}"><span class="tip {side}">step {step:,.0f}{lines}</span></i>')
    return "".join(out)


def _binned(points: Points) -> Points:
    """At most _BINS points, each the mean of its neighbours."""
    size = math.ceil(len(points) / _BINS)
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(chunk[-1][0], math.fsum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _outline(points: Points) -> Points:
    """At most 2 * _BINS points that keep every spike: of each group its lowest and its highest, in step order."""
    size = math.ceil(len(points) / _BINS)
    if size == 1:
        return points
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    ends = [{min(chunk, key=lambda point: point[1]), max(chunk, key=lambda point: point[1])} for chunk in chunks]
    return [point for pair in ends for point in sorted(pair)]


def _of_exponent(form: Callable[[float], str]) -> Callable[[float], str]:
    return lambda exponent: form(10**exponent)


def _exact(tick: float) -> float:
    """3 * 0.1 as 0.3, so that a round number is written as one."""
    return float(f"{tick:.6g}")


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
