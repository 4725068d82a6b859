"""Text of a token stream: whole characters, nothing lost, and no part of a stop string."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from tunesmith.models.generate.text_stream import TextStream

TOKENIZER = tiny_tokenizer("chatml", pad_is_eos=True)
LETTERS = "ab .\n답변위로👋é"


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


@st.composite
def vocabularies(draw: st.DrawFn) -> PreTrainedTokenizerFast:
    """A byte-level BPE of random merges: a character is one token, several, or a part of one."""
    words = draw(st.lists(st.text(alphabet=LETTERS, min_size=2, max_size=6), min_size=1, max_size=8))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    size = 256 + draw(st.integers(0, 40))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(words * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@settings(max_examples=150, deadline=None)
@given(
    tokenizer=vocabularies(),
    text=st.text(alphabet=LETTERS, max_size=16),
    stops=st.lists(st.text(alphabet=LETTERS, min_size=1, max_size=4), min_size=1, max_size=3),
    data=st.data(),
)
def test_random_vocabularies(tokenizer: PreTrainedTokenizerFast, text: str, stops: list[str], data: st.DataObject) -> None:
    """The text is also cut into other tokens than those of the tokenizer, down to single bytes, as a model may do."""
    ids = [
        token
        for part in _cut(text, data.draw(st.lists(st.integers(1, 5), max_size=8)))
        for token in (
            tokenizer(part, add_special_tokens=False)["input_ids"] if data.draw(st.booleans()) else _bytes(tokenizer, part)
        )
    ]
    assert tokenizer.decode(ids) == text
    stream, pieces, expected = TextStream(tokenizer, stops), [], text
    for number, token in enumerate(ids, 1):
        pieces.append(stream.add(token))
        there = tokenizer.decode(ids[:number]).rstrip("\ufffd")
        found = [there.find(stop) for stop in stops if stop in there]
        assert stream.stopped == bool(found)
        if found:
            expected = there[: min(found)]
            break
        assert there.startswith(stream.text)
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == expected and not any(stop in stream.text for stop in stops)


def _cut(text: str, lengths: list[int]) -> list[str]:
    ends = [*accumulate(lengths)]
    return [text[begin:end] for begin, end in zip([0, *ends], [*ends, len(text)])]


def _bytes(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [tokenizer.convert_tokens_to_ids(letter) for word, _ in letters for letter in word]
