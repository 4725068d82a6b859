"""Held-out rows that share text with training rows: what counts, and that the hashes find what comparing finds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_prepare import Language, run
from tests.tiny import tiny_tokenizer
from tunesmith.data.check import contamination as module
from tunesmith.data.check.contamination import contamination
from tunesmith.data.store.encoded_rows import Encoded, Views
from tunesmith.objectives import dpo, reward

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "and",
    "model",
    "answers",
    "user",
    "with",
    "short",
    "sentence",
]
COPIED = "the fox and the dog answers over the lazy sentence with quick brown jumps user the model"


def sentence(number, count=24):
    """Words of which no thirteen follow one another in two sentences."""
    draw = np.random.default_rng(number)
    return " ".join(WORDS[index] for index in draw.integers(0, len(WORDS), count))


def write(path, texts):
    rows = [{"instruction": f"question {n}", "output": text} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def compare(tmp_path, train, held, objective=None, **options):
    files = [write(tmp_path / name, texts) for name, texts in (("train.jsonl", train), ("held.jsonl", held))]
    found = run(files[0], objective, eval={"path": files[1]}, **options).report.contaminated
    return found, [(shared.where, shared.same_as, shared.text) for shared in found.first]


def test_a_copied_passage_is_found_with_both_places_and_its_text(tmp_path):
    train = [sentence(n) for n in range(30)]
    train[7] += f" {COPIED}!"
    held = [sentence(n) for n in range(100, 110)]
    held[3] = f"so {COPIED}, {held[3]}"
    found, listed = compare(tmp_path, train, held)
    assert (found.rows, found.share, found.ngram) == (1, 0.1, module.NGRAM)
    assert listed == [(f"{tmp_path}/held.jsonl:4", f"{tmp_path}/train.jsonl:8", COPIED)]


def test_the_template_of_every_row_is_no_leak(tmp_path):
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + ' the quick brown fox jumps over the lazy dog and the model answers the user with a short sentence\n' + m.content + eos_token }}{% endfor %}"
    found, _ = compare(tmp_path, map(sentence, range(30)), map(sentence, range(100, 110)), tokenizer=tiny_tokenizer(template))
    assert found.rows == 0


@pytest.mark.parametrize(("copies", "counted"), [(1, True), (module.COMMON_ROWS, True), (module.COMMON_ROWS + 1, False)])
def test_a_passage_of_many_training_rows_is_a_phrase_of_the_task(copies, counted, tmp_path):
    train = [f"{COPIED} {sentence(n)}" if n < copies else sentence(n) for n in range(200)]
    found, _ = compare(tmp_path, train, [f"{COPIED} {sentence(500)}", sentence(501)])
    assert bool(found.rows) == counted


def test_what_is_not_trained_on_is_no_leak(tmp_path):
    train = [*(sentence(n) for n in range(20)), sentence(20, 200) + " " + COPIED]
    held = [f"{COPIED} {sentence(99)}"]
    assert compare(tmp_path, train, held)[0].rows == 1
    assert compare(tmp_path, train, held, Language(overlong="truncate"), max_length=200)[0].rows == 0
    assert compare(tmp_path, train, held, Language(overlong="drop"), max_length=200)[0].rows == 0


def test_a_vocabulary_of_single_bytes_needs_more_tokens(tmp_path):
    korean = ["하루가 또 가네요. 오늘은 정말 긴 하루였고 마음이 조금 무거웠지만 산책을 하고 나니 괜찮아졌어요." for _ in range(3)]
    found, _ = compare(tmp_path, map(sentence, range(30)), korean)
    assert found.ngram > module.NGRAM and found.rows == 0


def sequences(rows):
    """An ``Encoded`` of these token sequences, in the manner of the cache."""
    from tunesmith.data.store.cache import Entry

    lengths = np.array([len(row) for row in rows], np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.concatenate([*(np.array(row, np.int32) for row in rows), np.empty(0, np.int32)]).astype(np.int32)
    number = np.arange(len(rows), dtype=np.int32)
    entry = Entry(
        {"input_ids": ids},
        {"input_ids": starts},
        number + 1,
        lengths,
        lengths,
        number.astype(np.uint64),
        number.astype(np.uint64),
        {},
    )
    views = Views(number, np.zeros_like(number), lengths, lengths)
    return Encoded((entry,), ("file",), np.ones(1), np.zeros(len(rows), np.int32), views)


class Numbers:
    """A tokenizer whose tokens are long words."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(f"word-number-{index}" for index in ids)


rows_of_few_words = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(rows_of_few_words, rows_of_few_words, st.integers(1, 4))
def test_the_hashes_find_what_comparing_finds(train, held, n):
    def grams(row, size):
        return {tuple(row[at : at + size]) for at in range(len(row) - size + 1)}

    def rows_with(gram):
        return sum(gram in grams(row, len(gram)) for row in train)

    def covered(row, common, size):
        return {at + step for at in range(len(row) - size + 1) if common(tuple(row[at : at + size])) for step in range(size)}

    few = max(1, min(module.COMMON_ROWS, len(train) // 2))
    n = max(n, round(module.BYTES / 14))
    expected = 0
    for row in held:
        template = covered(row, lambda gram: rows_with(gram) > max(few, module.PIECE_SHARE * len(train)), module.PIECE)
        windows = [range(at, at + n) for at in range(len(row) - n + 1) if not template & set(range(at, at + n))]
        phrases = {place for window in windows if rows_with(tuple(row[at] for at in window)) > few for place in window}
        expected += any(0 < rows_with(tuple(row[at] for at in window)) <= few and not phrases & set(window) for window in windows)
    found = contamination(sequences(train), sequences(held), Numbers(), n)
    assert found.ngram == n or not any(held)
    if found.ngram == n:
        assert found.rows == expected and len(found.first) == expected


def test_blocks_change_nothing(tmp_path, monkeypatch):
    train, held = [f"{sentence(n)} {COPIED}" if n in (3, 17) else sentence(n) for n in range(40)], [COPIED + " so", sentence(99)]
    whole = compare(tmp_path, train, held)
    monkeypatch.setattr(module, "BLOCK", 50)
    assert compare(tmp_path, train, held) == whole and whole[0].rows == 1


class Bytes:
    """A tokenizer of words, where what it has no word for (from 1000 on) is a single byte."""

    def decode(self, ids, skip_special_tokens):
        return "".join(" word" if index < 1000 else "\ufffd" for index in ids)


def test_each_row_needs_as_many_tokens_as_its_own_text_does():
    rng = np.random.default_rng(0)
    english, korean = rng.integers(0, 1000, (40, 60)).tolist(), rng.integers(1000, 1200, (60, 60)).tolist()
    train = [*english[:20], *korean[:30]]
    held = [[*english[20][:40], *english[0][:13]], english[21], [*korean[30], *korean[0][:40]], [*korean[31], *korean[1][:52]]]
    found = contamination(sequences(train), sequences(held), Bytes())
    assert [shared.where for shared in found.first] == ["file:1", "file:4"] and found.ngram == module.NGRAM
    held = [*english[20:40], *held] * 3  # a lot of English before it, so that the first tokens say nothing of the Korean
    assert contamination(sequences(train), sequences(held), Bytes()).rows == 6


def test_an_ending_that_many_rows_have_does_not_hide_a_copied_row():
    rng = np.random.default_rng(0)
    ending = list(range(1500, 1506))  # six bytes: two syllables
    rows = [[byte for _ in range(4) for byte in [*rng.integers(1000, 1200, 15).tolist(), *ending]] for _ in range(41)]
    found = contamination(sequences(rows[:40]), sequences([rows[5], rows[40]]), Bytes())
    assert [shared.where for shared in found.first] == ["file:1"] and found.short == 0


def test_rows_whose_answer_was_seen_are_told_from_those_whose_prompt_was(tmp_path):
    train, held = [sentence(n) for n in range(30)], [sentence(n) for n in range(100, 104)]
    rows = [{"instruction": f"question {n}", "output": text} for n, text in enumerate(train)]
    rows[3]["instruction"] = rows[4]["output"] = COPIED
    asked = [{"instruction": f"ask {n}", "output": text} for n, text in enumerate(held)]
    asked[0]["instruction"] = f"{COPIED}?"
    files = []
    for name, content in (("train.jsonl", rows), ("held.jsonl", asked)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        files.append(str(tmp_path / name))
    found = run(files[0], eval={"path": files[1]}).report.contaminated
    assert (found.rows, found.answers) == (1, 0)
    asked[1]["output"] = f"{COPIED}."
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    found = run(files[0], eval={"path": files[1]}).report.contaminated
    assert (found.rows, found.answers) == (2, 1) and "1 of them in supervised tokens" in found.line()


@pytest.mark.parametrize("objective", [dpo.Objective(dpo.Config()), reward.Objective(reward.Config())])
def test_of_preferences_answers_alone_are_learnt_and_of_rewards_nothing(tmp_path, objective):
    def pairs(name, numbers, prompt, chosen):
        rows = [
            {"prompt": [{"role": "user", "content": f"{n}"}], "chosen": sentence(n), "rejected": sentence(1000 + n)}
            for n in numbers
        ]
        rows[1]["prompt"] = [{"role": "user", "content": f"{prompt} {numbers[1]}"}]
        rows[2]["chosen"] = f"{chosen} {numbers[2]}"
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    copied = " ".join(reversed(COPIED.split()))
    train, held = (pairs(name, range(at, at + 30), COPIED, copied) for name, at in (("a.jsonl", 1), ("b.jsonl", 100)))
    found = run(train, objective, eval={"path": held}).report.contaminated
    assert found.rows == 2 and found.answers == (1 if objective.traits.head == "lm" else None)
    assert ("in supervised tokens" in found.line()) == (objective.traits.head == "lm")


def test_rows_too_short_to_compare_are_counted(tmp_path):
    found, _ = compare(tmp_path, [sentence(n) for n in range(30)], [sentence(99), "yes", "no"])
    assert (found.rows, found.short) == (0, 2)
