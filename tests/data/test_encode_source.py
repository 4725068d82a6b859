"""What a cache entry depends on: the modules that make an example, and no other."""

from pathlib import Path

import pytest

import tunesmith.data
from tests.tiny import tiny_tokenizer
from tunesmith.data.store import encode_source
from tunesmith.objectives import sft
from tunesmith.train import frozen_body_cache

DATA = Path(tunesmith.data.__file__).parent


def key_after_editing(name, monkeypatch):
    """The cache's key after an edit of a module of tunesmith.data; None = of no module."""
    read = Path.read_bytes
    edited = DATA / f"{name.replace('.', '/')}.py" if name else None
    assert edited is None or edited.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: read(self) + (b"# edited" if self == edited else b""))
        return encode_source.shared_key(sft.Objective(sft.Config()), tiny_tokenizer(None))


@pytest.mark.parametrize(
    "name", ["encode.conversations", "encode.spans", "read.source", "formats.turns", "rows", "row_problems", "store.cache"]
)
def test_editing_an_encoder_makes_every_entry_anew(name, monkeypatch):
    assert key_after_editing(name, monkeypatch) != key_after_editing(None, monkeypatch)


@pytest.mark.parametrize("name", ["check.lint", "check.preview", "check.near_duplicates", "store.prepare", "batch.pack"])
def test_editing_a_module_that_no_example_depends_on_empties_no_cache(name, monkeypatch):
    assert key_after_editing(name, monkeypatch) == key_after_editing(None, monkeypatch)


def test_every_module_that_makes_examples_is_in_the_key():
    """A renamed module stays in the key, and a new one enters it."""
    files = encode_source.code_files(sft.Objective(sft.Config()))
    assert len(set(files)) == len(files) and all(path.is_file() for path in files)
    for room in ("read", "formats", "encode"):
        assert {path for path in (DATA / room).glob("[!_]*.py")} <= set(files)


def test_every_module_in_the_key_of_hidden_states_exists():
    for name in frozen_body_cache.FORWARD:
        assert (DATA.parent / f"{name.replace('.', '/')}.py").is_file(), name
