"""Every text architecture of transformers does what docs/architectures.md says; the page is what was recorded."""

import re

import pytest
import transformers

from tests.matrix import architectures
from tests.matrix.architectures import PAGE, SUMMARIES, examine_apart, names, recorded, render, summary

FOUND = recorded()["architectures"]


def test_the_page_is_written_from_the_results():
    assert PAGE.read_text(encoding="utf-8") == render(recorded()), "run `python -m tests.matrix.architectures --page`"


def test_the_head_of_the_page_counts_what_follows():
    page = PAGE.read_text(encoding="utf-8")
    counts = {text: int(number) for text, number in re.findall(r"^\| ([^|]+) \| (\d+) \|$", page, re.MULTILINE)}
    assert counts == {text: sum(summary(one) == kind for one in FOUND.values()) for kind, text in SUMMARIES.items()}
    assert sum(counts.values()) == len(FOUND) and f"has {len(FOUND)} architectures" in page
    assert len(re.search(r"## Packed\n\n(.*)", page)[1].split(", ")) == counts[SUMMARIES["packed"]]


def test_no_architecture_is_trained_wrongly():
    assert [name for name, one in FOUND.items() if summary(one) == "fault"] == []


@pytest.mark.skipif(recorded()["transformers"] != transformers.__version__, reason="recorded with another transformers")
def test_every_architecture_is_recorded():
    assert sorted(FOUND) == names()


@pytest.fixture(scope="module")
def warm():
    architectures.warm_up()


@pytest.mark.long
@pytest.mark.parametrize("name", names())
def test_an_architecture_does_what_is_recorded(name, warm, tmp_path):
    found = examine_apart(name, tmp_path)
    assert summary(found) == summary(FOUND[name]), found
