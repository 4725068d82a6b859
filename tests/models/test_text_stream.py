"""Text of a token stream: whole characters, nothing lost, and no part of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_tokenizer
from tunesmith.models.generate.text_stream import TextStream

TOKENIZER = tiny_tokenizer("chatml", pad_is_eos=True)


def read(ids: list[int], *stops: str) -> tuple[list[str], TextStream]:
    """The pieces of a stream that is ended by its first stop string."""
    stream, pieces = TextStream(TOKENIZER, stops), []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


def tokens(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", ["안녕하세요 👋🏽 ok", "def f():\n    return 'é'", " leading and   many spaces "])
def test_pieces_joined_are_the_text(text: str) -> None:
    pieces, stream = read(tokens(text))
    assert "".join(pieces) == text == stream.text and not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_is_never_finished_is_not_lost() -> None:
    ids = tokens("ok 👋")[:-1]
    assert "".join(read(ids)[0]) == TOKENIZER.decode(ids)


TEXT = st.text(alphabet="ab \n.답변위로👋", max_size=24)


@settings(max_examples=300, deadline=None)
@given(text=TEXT, stops=st.lists(st.text(alphabet="ab \n답로👋", min_size=1, max_size=4), min_size=1, max_size=3))
def test_an_answer_ends_before_the_first_stop_string_and_not_a_character_sooner(text: str, stops: list[str]) -> None:
    pieces, stream = read(tokens(text), *stops)
    places = [text.find(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(places)
    assert "".join(pieces) == stream.text
    assert not any(stop in stream.text for stop in stops)
    # a token may complete several stop strings: the earliest start counts among those that its text completes
    complete = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=len(text))
    assert stream.text == text if not places else text.startswith(stream.text) and len(stream.text) <= complete


@pytest.mark.parametrize(("stop", "kept"), [("세요", "안녕하"), ("요 👋", "안녕하세"), ("👋", "안녕하세요 ")])
def test_a_stop_string_of_characters_that_are_several_tokens(stop: str, kept: str) -> None:
    pieces, stream = read(tokens("안녕하세요 👋 더"), stop)
    assert (stream.stopped, stream.text) == (True, kept) and "".join(pieces) == kept


def test_what_may_be_the_start_of_a_stop_string_is_held_until_it_cannot() -> None:
    stream = TextStream(TOKENIZER, ["0123x"])
    pieces = [stream.add(token) for text in ("0", "1", "2", "y") for token in tokens(text)]
    assert pieces == ["", "", "", "012y"]
