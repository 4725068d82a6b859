"""Suggestions for mistyped names."""

import pytest

from tunesmith.suggestions import closest, did_you_mean

KEYS = ["adam_beta1", "adam_beta2", "epochs", "learning_rate", "r", "type", "weight"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("epoch", ["epochs"]),
        ("epohcs", ["epochs"]),
        ("Epochs", ["epochs"]),
        ("adam_beta3", ["adam_beta1", "adam_beta2"]),
        ("x", ["r"]),
        ("lr", ["r"]),
        ("learning-rat", ["learning_rate"]),
        ("banana", []),
        ("", ["r"]),
    ],
)
def test_a_typo_finds_the_closest_names(typed, meant):
    assert closest(typed, KEYS) == meant


def test_a_name_that_shares_most_letters_is_close():
    assert closest("batch", ["batch_size", "epochs"]) == ["batch_size"]


def test_nothing_is_suggested_where_nothing_is_valid():
    assert did_you_mean("x", []) == "Valid: "
