"""Curves over the steps of a run, and the ``Plot`` that a page draws of them.

A plot holds numbers and words. The macro ``plot`` makes SVG of it in the colours of the page, light or dark,
with labels that keep their size on a phone and the figures under the pointer. ``charts`` draws the same
curves into files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from tunesmith.report.language import t
from tunesmith.runs import figure_format

Points = list[tuple[float, float]]
"""(step, value), in step order."""

SETS = 6
"""Evaluation sets with their own colour; the next six are dashed."""

MOST_MARKED = 64
"""A chart marks at most this many steps without a finite value."""

_BINS = 1500  # about the width of a screen: more points cannot be seen
_STRIPS = 64
_FEW = 12  # with fewer points a smoothed line would show more than was measured

_Styled = tuple[str, str]
"""(CSS classes, text or SVG path)."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart. ``points`` are (step, value) in step order; values may be nan or inf.

    ``name`` is for the legend. ``style`` is CSS classes, by default ``name``: ``train`` (drawn faint under a
    smoothed line), ``eval`` or ``set0`` to ``set5`` (few points, each marked), the latter perhaps with
    ``dashed``.
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
        """Steps whose value is not finite."""
        return [x for x, y in self.points if not math.isfinite(y)]

    def log10(self) -> Curve:
        """Return the curve of log10 of the values, without values of zero and below."""
        points = [(x, math.log10(y) if math.isfinite(y) else y) for x, y in self.points if not y <= 0]
        return Curve(self.name, points, self.style)


@dataclass(frozen=True)
class Strip:
    """An invisible column of a plot with the figures under the pointer. ``left``, ``width``: per cent."""

    left: float
    width: float
    side: str
    step: str
    values: list[_Styled]


@dataclass(frozen=True)
class Plot:
    """A chart over steps, for the macro ``plot``. Positions are in per cent from the left or the top."""

    title: str
    alt: str
    legend: list[_Styled]
    paths: list[_Styled]
    """SVG paths in a square of 1000 x 1000."""
    x_labels: list[tuple[float, str]]
    y_labels: list[tuple[float, str]]
    strips: list[Strip]


def smooth(points: Points) -> Points:
    """Return a local linear regression with a Gaussian kernel over about a tenth of the run.

    Unlike a running mean it has no lag and no bias where a curve falls steeply (Fan and Gijbels 1996, 3.2).
    """
    if len(points) < _FEW:
        return points
    means = [(chunk[-1][0], math.fsum(y for _, y in chunk) / len(chunk)) for chunk in _chunks(points)]
    sigma = max(2.0, len(means) / 30)
    half = min(math.ceil(3 * sigma), len(means) - 1)
    reach = np.arange(-half, half + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)

    def moment(values: np.ndarray, power: int) -> np.ndarray:
        # convolve() reverses the kernel, hence the minus: it matters for an odd power.
        return np.convolve(values, kernel * (-reach) ** power)[half : half + len(values)]

    values, ones = np.array([y for _, y in means]), np.ones(len(means))
    s0, s1, s2 = (moment(ones, power) for power in (0, 1, 2))
    t0, t1 = moment(values, 0), moment(values, 1)
    fitted = (s2 * t0 - s1 * t1) / (s0 * s2 - s1**2)
    return [(x, float(y)) for (x, _), y in zip(means, fitted)]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.6g}") for index in range(first, last + 1)]  # 0.3, not 3 * 0.1


def log_ticks(low: float, high: float) -> list[float]:
    """Return exponents from ``low`` to ``high``: those of 1, 2, 5, 10 ..., over a wide range of 10, 100 ..."""
    mantissas = (1, 2, 5) if high - low <= 2 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1, max(1, math.ceil((high - low) / 6)))
    all_ticks = [exponent + math.log10(mantissa) for exponent in exponents for mantissa in mantissas]
    return [tick for tick in all_ticks if low <= tick <= high] or ticks(low, high, 2)


def plot(
    title: str,
    curves: Sequence[Curve],
    form: Callable[[float], str] = figure_format.number,
    from_zero: bool = False,
    is_smoothed: bool = True,
    is_log: bool = False,
) -> Plot | None:
    """Return the chart of ``curves`` for a page, None if no curve has a finite point. ``form`` formats
    values.

    ``is_log``: a logarithmic y axis, without values of zero and below.
    """
    curves = [curve.log10() for curve in curves] if is_log else curves
    drawn = [curve for curve in curves if curve.finite]
    if not drawn:
        return None

    def text_of(y: float) -> str:
        return form(float(f"{10**y:.6g}") if is_log else y)

    def ends(curve: Curve) -> str:
        first, last = (text_of(curve.finite[place][1]) for place in (0, -1))
        return t("{name} from {first} to {last}", name=curve.name, first=first, last=last)

    frame = _Frame.around(curves, from_zero)
    x_ticks = [x for x in ticks(frame.left, frame.right, 6) if x == int(x)]
    y_ticks = (log_ticks if is_log else ticks)(frame.low, frame.high)
    steps = sorted({step for curve in curves for step in curve.not_finite})
    names = [(curve.classes, curve.name) for curve in drawn] if len(drawn) > 1 else []
    return Plot(
        title=title,
        alt=t("{title} by step: {curves}", title=title, curves="; ".join(map(ends, drawn))),
        legend=[*names, *([("broken", _not_finite_text(steps))] if steps else [])],
        paths=[
            *(("grid", f"M0 {frame.y(y):.1f}H1000") for y in y_ticks),
            *(path for curve in drawn for path in _paths(curve, frame, is_smoothed)),
            *(("broken", f"M{frame.x(step):.1f} 0V1000") for step in steps[:MOST_MARKED]),
        ],
        x_labels=[(round(frame.x(x) / 10, 2), f"{x:,.0f}") for x in x_ticks],
        y_labels=[(round(frame.y(y) / 10, 2), text_of(y)) for y in y_ticks],
        strips=_strips(drawn, frame, text_of, is_smoothed),
    )


def _not_finite_text(steps: list[float]) -> str:
    more = t(" and {count} more", count=len(steps) - 3) if len(steps) > 3 else ""
    return t("not finite at step {steps}", steps=", ".join(f"{step:,.0f}" for step in steps[:3])) + more


@dataclass(frozen=True)
class _Frame:
    """The part of the plane that a plot shows, mapped to 1000 x 1000 with y downwards."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, curves: Sequence[Curve], from_zero: bool) -> _Frame:
        xs = [x for curve in curves for x, _ in curve.points]  # steps without a finite value are marked, too
        ys = [y for curve in curves for _, y in curve.finite]
        low, high = min(ys), max(ys)
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        left, right = min(xs), max(xs)
        # Values that never fall below zero get no room below zero.
        low = 0.0 if from_zero and low >= 0 else max(low - margin, 0.0) if low >= 0 else low - margin
        return cls(left, right if right > left else left + 1, low, high + margin)

    def x(self, value: float) -> float:
        return 1000 * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return 1000 - 1000 * (value - self.low) / (self.high - self.low)

    def line(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def dots(self, points: Points) -> str:
        # A path of length 0 with a round cap is a dot that stays round when the drawing is stretched.
        return "".join(f"M{self.x(x):.1f} {self.y(y):.1f}h0" for x, y in points)


def _paths(curve: Curve, frame: _Frame, is_smoothed: bool) -> list[_Styled]:
    points, style = curve.finite, curve.classes
    if not curve.is_training:
        return [(style, frame.line(points)), (f"{style} dot", frame.dots(points))]
    if len(points) == 1:
        return [("train dot", frame.dots(points))]
    outline = frame.line(_outline(points))
    if not is_smoothed or len(points) < _FEW:
        return [("train", outline)]
    return [("train raw", outline), ("train", frame.line(smooth(points)))]


def _strips(
    curves: Sequence[Curve], frame: _Frame, form: Callable[[float], str], is_smoothed: bool
) -> list[Strip]:
    columns: dict[int, dict[str, tuple[float, float]]] = {}
    for curve in curves:
        for x, y in smooth(curve.finite) if is_smoothed and curve.is_training else curve.finite:
            columns.setdefault(min(_STRIPS - 1, int(frame.x(x) * _STRIPS / 1000)), {})[curve.classes] = (x, y)
    width = 100 / _STRIPS
    strips = []
    for column, values in sorted(columns.items()):
        step = list(values.values())[-1][0]  # that of an evaluation if there is one: training comes first
        texts = [(style, form(y)) for style, (_, y) in values.items()]
        side = "right" if column >= _STRIPS / 2 else "left"
        strips.append(
            Strip(
                round(column * width, 3), round(width, 3), side, t("step {step}", step=f"{step:,.0f}"), texts
            )
        )
    return strips


def _chunks(points: Points) -> list[Points]:
    """Split into at most _BINS groups of neighbours."""
    size = math.ceil(len(points) / _BINS)
    return [points[start : start + size] for start in range(0, len(points), size)]


def _outline(points: Points) -> Points:
    """Return at most 2 * _BINS points with every spike: the lowest and highest of each group, in step order."""
    by_value = itemgetter(1)
    ends = ({min(chunk, key=by_value), max(chunk, key=by_value)} for chunk in _chunks(points))
    return [point for pair in ends for point in sorted(pair)]
