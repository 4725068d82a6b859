"""Tiny trained models, each made once for the tests that only read it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import tunesmith
from tests.runs import recipe


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """``trained(objective)``: (the best model, the rows) of a run of one step on a tiny bert."""

    @cache
    def train(objective: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(objective)
        outcome = tunesmith.train(recipe(folder, "bert", objective, max_steps=1), out=folder / "run")
        return Path(outcome["model_dir"]), folder / "rows.jsonl"

    return train
