import pytest

from tunesmith.suggestions import did_you_mean, nearest

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
def test_nearest(typed, meant):
    assert nearest(typed, KEYS) == meant


def test_a_name_that_shares_most_letters_is_near():
    assert nearest("batch", ["batch_size", "epochs"]) == ["batch_size"]


def test_nothing_valid_nothing_near():
    assert did_you_mean("x", []) == "Valid: "
