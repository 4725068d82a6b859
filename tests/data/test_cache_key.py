"""What a cache entry depends on: the modules that make an example, and no other."""

from pathlib import Path

import pytest

import tunesmith.data
from tests.tiny import tiny_tokenizer
from tunesmith.data.store import encode_source
from tunesmith.objectives import sft
from tunesmith.train import frozen_body_cache

DATA = Path(tunesmith.data.__file__).parent
MADE_ELSEWHERE = {"read.builtin", "read.library"}
"""Modules of these rooms that no key needs: a built-in set has a digest of its own makers."""


def key_after_editing(name, monkeypatch):
    """The cache's key as it would be after an edit of a module of tunesmith.data; None = of none."""
    read = Path.read_bytes
    edited = DATA / f"{name.replace('.', '/')}.py" if name else None
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: read(self) + (b"# edited" if self == edited else b""))
        return encode_source.shared_key(sft.Objective(sft.Config()), tiny_tokenizer(None))


@pytest.mark.parametrize("name", ["encode.conversations", "encode.spans", "encode.templates", "formats.turns", "rows"])
def test_editing_an_encoder_makes_every_entry_anew(name, monkeypatch):
    assert key_after_editing(name, monkeypatch) != key_after_editing(None, monkeypatch)


@pytest.mark.parametrize("name", ["check.lint", "check.preview", "check.near_duplicates", "store.prepare", "batch.pack"])
def test_editing_what_no_example_depends_on_empties_no_cache(name, monkeypatch):
    assert (DATA / f"{name.replace('.', '/')}.py").is_file()
    assert key_after_editing(name, monkeypatch) == key_after_editing(None, monkeypatch)


def test_every_module_that_makes_examples_is_named():
    there = {
        f"{room}.{path.stem}" for room in ("read", "formats", "encode") for path in (DATA / room).glob("[!_]*.py")
    } - MADE_ELSEWHERE
    named = {name for name in encode_source.ENCODING if name.partition(".")[0] in ("read", "formats", "encode")}
    assert named == there


def test_every_module_that_is_named_is_there():
    for name in encode_source.ENCODING:
        assert (DATA / f"{name.replace('.', '/')}.py").is_file(), name
    for name in frozen_body_cache.FORWARD:
        assert (DATA.parent / f"{name.replace('.', '/')}.py").is_file(), name
