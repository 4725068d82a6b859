"""Curves over the steps of a run, and the ``Plot`` that a page draws of them.

A plot is numbers and words: the macro ``plot`` makes SVG of it, in the colours of the page, light or dark, with labels that
keep their size on a phone and the figures under the pointer. ``charts`` draws the same curves into files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.runs import figure_format

Points = list[tuple[float, float]]
"""(step, value), in step order."""

SETS = 6
"""Evaluation sets that have a colour of their own; the next six are dashed."""

MOST_MARKED = 64
"""Steps without a finite value that a chart marks."""

_BINS = 1500  # more points than a screen has columns cannot be seen
_STRIPS = 64
_FEW = 12  # points below which a smoothed line would claim more than the run shows


@dataclass(frozen=True)
class Curve:
    """One line of a chart. ``points`` are (step, value) in step order; values may be nan or inf.

    ``name`` is for the legend. ``style`` is CSS classes, ``name`` by default: ``train`` (drawn faint, with a smoothed line over
    it), ``eval`` or ``set0`` to ``set5`` (few points, each marked), the latter perhaps with ``dashed``.
    """

    name: str
    points: Points
    style: str = ""

    @classmethod
    def of_set(cls, name: str, points: Points, number: int) -> Curve:
        """Return the curve of evaluation set ``number``, counted from 0."""
        return cls(name, points, f"set{number % SETS}" + (" dashed" if number // SETS % 2 else ""))

    @property
    def classes(self) -> str:
        return self.style or self.name

    @property
    def is_training(self) -> bool:
        return self.classes == "train"

    @property
    def finite(self) -> Points:
        return [point for point in self.points if math.isfinite(point[1])]

    @property
    def not_finite(self) -> list[float]:
        """The steps at which the value was not finite."""
        return [x for x, y in self.points if not math.isfinite(y)]

    def logarithm(self) -> Curve:
        """Return the curve of the values' logarithms to the base of ten, without values of zero and below."""
        return Curve(
            self.name, [(x, math.log10(y) if math.isfinite(y) else y) for x, y in self.points if not y <= 0]
        )


@dataclass(frozen=True)
class Strip:
    """An invisible column over a plot. ``left`` and ``width`` in per cent; ``values``: (CSS classes, figure) of each curve."""

    left: float
    width: float
    side: str
    step: str
    values: list[tuple[str, str]]


@dataclass(frozen=True)
class Plot:
    """A chart over steps, for the macro ``plot``. Places are in per cent from the left or the top."""

    title: str
    alt: str
    legend: list[tuple[str, str]]
    """(CSS classes, words)."""
    paths: list[tuple[str, str]]
    """(CSS classes, SVG path in a square of 1000)."""
    x_labels: list[tuple[float, str]]
    y_labels: list[tuple[float, str]]
    strips: list[Strip]


def smooth(points: Points) -> Points:
    """Local linear regression with a Gaussian kernel over about a tenth of the run.

    Unlike a running mean it neither lags behind nor starts too low where a curve falls steeply (Fan and Gijbels 1996, 3.2).
    """
    if len(points) < _FEW:
        return points
    means = [(chunk[-1][0], math.fsum(y for _, y in chunk) / len(chunk)) for chunk in _chunks(points)]
    sigma = max(2.0, len(means) / 30)
    half = min(math.ceil(3 * sigma), len(means) - 1)
    reach = np.arange(-half, half + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)

    def moment(values: np.ndarray, power: int) -> np.ndarray:
        # convolve() turns the kernel round, so that an odd power takes its sign from the other side.
        return np.convolve(values, kernel * (-reach) ** power)[half : half + len(values)]

    values, ones = np.array([y for _, y in means]), np.ones(len(means))
    s0, s1, s2 = (moment(ones, power) for power in (0, 1, 2))
    t0, t1 = moment(values, 0), moment(values, 1)
    fitted = (s2 * t0 - s1 * t1) / (s0 * s2 - s1**2)
    return [(x, float(y)) for (x, _), y in zip(means, fitted)]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.6g}") for index in range(first, last + 1)]  # 0.3, where 3 * 0.1 is not


def log_ticks(low: float, high: float) -> list[float]:
    """Exponents from ``low`` to ``high`` of 1, 2 and 5 times powers of ten; of whole powers alone once there are many."""
    mantissas = (1, 2, 5) if high - low <= 2 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1, max(1, math.ceil((high - low) / 6)))
    found = [exponent + math.log10(mantissa) for exponent in exponents for mantissa in mantissas]
    return [tick for tick in found if low <= tick <= high] or ticks(low, high, 2)


def plot(
    title: str,
    curves: Sequence[Curve],
    form: Callable[[float], str] = figure_format.number,
    from_zero: bool = False,
    is_smoothed: bool = True,
    is_log: bool = False,
) -> Plot | None:
    """Return the chart of ``curves`` for a page, None when no curve has a finite point; ``form`` writes its values.

    ``is_log``: values are drawn by their logarithm; those of zero and below are left out.
    """
    curves = [curve.logarithm() for curve in curves] if is_log else curves
    drawn = [curve for curve in curves if curve.finite]
    if not drawn:
        return None

    def written(y: float) -> str:
        return form(float(f"{10**y:.6g}") if is_log else y)

    frame = _Frame.around(curves, from_zero)
    y_ticks = (log_ticks if is_log else ticks)(frame.low, frame.high)
    steps = sorted({step for curve in curves for step in curve.not_finite})
    more = f" and {len(steps) - 3} more" if len(steps) > 3 else ""
    named = f"not finite at step {', '.join(f'{step:,.0f}' for step in steps[:3])}{more}"
    told = "; ".join(
        f"{one.name} from {written(one.finite[0][1])} to {written(one.finite[-1][1])}" for one in drawn
    )
    return Plot(
        title=title,
        alt=f"{title} by step: {told}",
        legend=[(curve.classes, curve.name) for curve in drawn if len(drawn) > 1]
        + ([("broken", named)] if steps else []),
        paths=[("grid", f"M0 {frame.y(y):.1f}H1000") for y in y_ticks]
        + [path for curve in drawn for path in _paths(curve, frame, is_smoothed)]
        + [("broken", f"M{frame.x(step):.1f} 0V1000") for step in steps[:MOST_MARKED]],
        x_labels=[
            (round(frame.x(x) / 10, 2), f"{x:,.0f}") for x in ticks(frame.left, frame.right, 6) if x == int(x)
        ],
        y_labels=[(round(frame.y(y) / 10, 2), written(y)) for y in y_ticks],
        strips=_strips(drawn, frame, written, is_smoothed),
    )


@dataclass(frozen=True)
class _Frame:
    """The part of the plane that a plot shows, mapped onto 1000 x 1000 with y downwards."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, curves: Sequence[Curve], from_zero: bool) -> _Frame:
        xs = [
            x for curve in curves for x, _ in curve.points
        ]  # a step whose value is not finite is on the page too
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

    def line(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def dots(self, points: Points) -> str:
        # A path of no length with a round cap is a dot that stays round however the drawing is stretched.
        return "".join(f"M{self.x(x):.1f} {self.y(y):.1f}h0" for x, y in points)


def _paths(curve: Curve, frame: _Frame, is_smoothed: bool) -> list[tuple[str, str]]:
    points, style = curve.finite, curve.classes
    if not curve.is_training:
        return [(style, frame.line(points)), (f"{style} dot", frame.dots(points))]
    if len(points) == 1:
        return [("train dot", frame.dots(points))]
    if not is_smoothed or len(points) < _FEW:
        return [("train", frame.line(_outline(points)))]
    return [("train raw", frame.line(_outline(points))), ("train", frame.line(smooth(points)))]


def _strips(
    curves: Sequence[Curve], frame: _Frame, form: Callable[[float], str], is_smoothed: bool
) -> list[Strip]:
    columns: dict[int, dict[str, tuple[float, float]]] = {}
    for curve in curves:
        for x, y in smooth(curve.finite) if is_smoothed and curve.is_training else curve.finite:
            columns.setdefault(min(_STRIPS - 1, int(frame.x(x) * _STRIPS / 1000)), {})[curve.classes] = (x, y)
    width = 100 / _STRIPS
    return [
        Strip(
            left=round(place * width, 3),
            width=round(width, 3),
            side="right" if place >= _STRIPS / 2 else "left",
            step=f"step {list(values.values())[-1][0]:,.0f}",  # of an evaluation where there is one: training is drawn first
            values=[(style, form(y)) for style, (_, y) in values.items()],
        )
        for place, values in sorted(columns.items())
    ]


def _chunks(points: Points) -> list[Points]:
    """At most _BINS groups of neighbours."""
    size = math.ceil(len(points) / _BINS)
    return [points[start : start + size] for start in range(0, len(points), size)]


def _outline(points: Points) -> Points:
    """At most 2 * _BINS points that keep every spike: of each group its lowest and its highest, in step order."""
    ends = [
        {min(chunk, key=lambda point: point[1]), max(chunk, key=lambda point: point[1])}
        for chunk in _chunks(points)
    ]
    return [point for pair in ends for point in sorted(pair)]
