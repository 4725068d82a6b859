import math
import re

import pytest

from tunesmith.report import charts, curves, pages
from tunesmith.report.curves import Curve
from tunesmith.runs import figure_format


def drawn(title, lines, *args, **options):
    """The HTML of a plot, as every page draws it."""
    found = curves.plot(title, lines, *args, **options)
    return found and pages.environment().from_string('{% from "macros.html" import plot %}{{ plot(found) }}').render(found=found)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.9, 2.4, [1.0, 1.5, 2.0]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (1, 480, [100, 200, 300, 400]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert curves.ticks(low, high) == pytest.approx(expected)


def test_smoothing_leaves_a_straight_line_alone_up_to_its_ends():
    line = [(float(x), 5 - 0.01 * x) for x in range(200)]
    assert [y for _, y in curves.smooth(line)] == pytest.approx([y for _, y in line])


def test_smoothing_takes_out_an_alternation():
    jagged = [(float(x), 1.0 + (-1) ** x) for x in range(200)]
    assert all(abs(y - 1) < 0.05 for _, y in curves.smooth(jagged)[10:-10])


def test_few_points_are_not_smoothed():
    points = [(1.0, 3.0), (2.0, 1.0), (3.0, 2.0)]
    assert curves.smooth(points) == points


def test_a_long_run_keeps_its_spikes_and_stays_small():
    points = [(float(x), 1.0) for x in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    html = drawn("Loss", [Curve("train", points)])
    assert len(html) < 120_000
    top = min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", html))
    assert top < 60, "the spike is the highest point of the drawing"


def test_what_is_not_finite_is_marked_and_named():
    html = drawn("Loss", [Curve("train", [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)])])
    assert html.count('class="broken"') == 2
    assert "not finite at step 2, 3" in html
    assert "nan" not in html


def test_a_log_scale_has_round_values_and_leaves_zero_out():
    points = [(1.0, 0.0), (2.0, 1e-4), (3.0, 1e-3), (4.0, math.nan), (5.0, 1e-2)]
    html = drawn("Ratio", [Curve("train", points)], figure_format.rate, is_log=True)
    labels = re.findall(r'class="y" style="top:([\d.]+)%">([^<]+)<', html)
    assert [label for _, label in labels] == ["1e-4", "1e-3", "1e-2"]
    heights = {label: float(top) for top, label in labels}
    assert heights["1e-4"] - heights["1e-3"] == pytest.approx(heights["1e-3"] - heights["1e-2"], abs=0.1)
    assert html.count("broken") > 0
    assert "not finite at step 4" in html


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-3.05, -2.9, [-3]), (-2.98, -2.95, [-2.98, -2.96]), (-9, 0, [-9, -7, -5, -3, -1])],
)
def test_log_ticks_are_few_and_never_none(low, high, expected):
    assert curves.log_ticks(low, high) == pytest.approx(expected)


def test_one_point_is_a_dot_and_none_is_no_chart():
    assert 'class="train dot"' in drawn("Loss", [Curve("train", [(1, 2.0)])])
    assert drawn("Loss", [Curve("train", [])]) is None
    assert drawn("Loss", [Curve("train", [(1, math.nan)])]) is None


def test_the_value_under_the_pointer_can_be_read():
    html = drawn("Loss", [Curve("train", [(1, 2.5), (2, 1.5)]), Curve("eval", [(2, 1.75)])])
    assert 'step 1<span class="key train">2.5</span>' in html
    assert 'step 2<span class="key train">1.5</span><span class="key eval">1.75</span>' in html


def test_png_is_a_png():
    points = [(float(x), 1 / (x + 1)) for x in range(20)]
    picture = charts.png(
        charts.over_steps("loss", [Curve("train", [*points, (20.0, math.nan)]), Curve("eval", [(0, 1.0), (20, 0.5)])])
    )
    assert picture.startswith(b"\x89PNG\r\n")
