"""Tests of which `make test` runs a part and `make long` the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def shortened(parameters: Iterable[Any], short: Collection[Any]) -> list[Any]:
    """``parameters`` of a test, marked ``long`` if they are not in ``short``."""
    every = list(parameters)
    unknown = [one for one in short if one not in every]
    assert not unknown, f"no parameters of the test: {unknown}"
    return [one if one in short else _long(one) for one in every]


def _long(one: Any) -> Any:
    return pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.long)
