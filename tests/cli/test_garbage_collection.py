"""Python's search for unreachable objects pauses while a verb imports torch, and at no other time."""

import gc
import sys
from types import SimpleNamespace

import pytest

from tunesmith.cli import garbage_collection


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    yield
    gc.unfreeze()


@pytest.mark.parametrize("fails", [False, True])
def test_imports_are_not_searched_then_or_later(fails, without_torch):
    class Missing(Exception):
        pass

    made = []
    try:
        with garbage_collection.imports():
            assert not gc.isenabled()
            made += [[number] for number in range(1000)]
            if fails:
                raise Missing
    except Missing:
        assert fails
    assert gc.isenabled() and gc.get_freeze_count() > 1000
    assert not {id(one) for one in made} & {id(one) for one in gc.get_objects()}


def test_a_process_that_has_torch_already_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    frozen = gc.get_freeze_count()
    with garbage_collection.imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
