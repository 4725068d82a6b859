import math

import pytest

from tunesmith.runs import figure_format


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.0, "0"), (2.0, "2"), (1.84231, "1.842"), (0.5, "0.5"), (-0.25, "-0.25"), (15.314, "15.31")),
        *((480, "480"), (1234567, "1,234,567"), (4210.4, "4,210"), (0.03121, "0.03121"), (2e-5, "2.00e-05")),
        *((math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")),
    ],
)
def test_number(value, text):
    assert figure_format.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(2e-4, "2e-4"), (1.625e-5, "1.62e-5"), (0, "0"), (0.0, "0"), (1.0, "1e0"), (math.nan, "nan")]
)
def test_rate(value, text):
    assert figure_format.rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (2_442_240, "2.4M"), (134_515_008, "134.5M"), (7.2e9, "7.2G")]
)
def test_count(value, text):
    assert figure_format.count(value) == text


@pytest.mark.parametrize(("value", "text"), [(12, "12 B"), (269e6, "269 MB"), (1.92e9, "1.92 GB"), (25.3e9, "25.3 GB")])
def test_size(value, text):
    assert figure_format.size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (12.34, "12.3 s"), (187, "3:07"), (3723, "1:02:03"), (183840, "2 d 03:04"), (math.inf, "inf")],
)
def test_duration(seconds, text):
    assert figure_format.duration(seconds) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"), [(0, 5, "0%"), (5, 5, "100%"), (18, 1000, "1.8%"), (1, 10000, "0.010%"), (1, 0, "-")]
)
def test_share(part, whole, text):
    assert figure_format.share(part, whole) == text


def test_a_boolean_is_not_a_figure():
    assert figure_format.is_number(1)
    assert figure_format.is_number(math.nan)
    assert not figure_format.is_number(True)
    assert not figure_format.is_number("1")
    assert not figure_format.is_number(None)
