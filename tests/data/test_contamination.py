"""Held-out rows that share text with training rows: what counts as shared; hashes find the same rows as a direct comparison."""

from __future__ import annotations

import json
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_prepare import Language, run
from tests.tiny import tiny_tokenizer
from tunesmith.data.check import contamination as module
from tunesmith.data.check.contamination import contamination
from tunesmith.data.store.encoded_rows import Encoded, Views
from tunesmith.data.text_windows import SHARED
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
    assert (found.rows, found.share, found.letters) == (1, 0.1, SHARED)
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


KOREAN = "아침에 산책을 하고 나니 마음이 조금 가벼워져서 창문을 활짝 열었어요"


@pytest.mark.parametrize("syllables", [14, 25])
def test_korean_is_counted_by_characters_though_a_vocabulary_splits_it_into_bytes(tmp_path, syllables):
    """Twenty syllables are a passage; fourteen are 42 tokens of this tokenizer, three times thirteen."""
    rng = np.random.default_rng(0)
    others = ["".join(map(chr, rng.integers(0xAC00, 0xD7A3, 40))) for _ in range(33)]
    train = [*others[:30], f"{others[30]} {KOREAN[:syllables]}"]
    found, _ = compare(tmp_path, train, [f"{others[31]} {KOREAN[:syllables]}!", others[32]])
    assert found.rows == (syllables == 25) and found.short == 0


def test_text_is_the_same_however_its_accents_are_written(tmp_path):
    train = [*map(sentence, range(20)), unicodedata.normalize("NFD", KOREAN)]
    _, listed = compare(tmp_path, train, [KOREAN, sentence(99)])
    assert [text for _, _, text in listed] == [KOREAN]


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


class Characters:
    """A tokenizer whose tokens are the letters a, b, c and d."""

    all_special_ids, added_tokens_decoder, backend_tokenizer = (), {}, SimpleNamespace(decoder=None)

    def convert_ids_to_tokens(self, number):
        return "abcd"[number]

    def decode(self, ids, skip_special_tokens=False):
        return "".join("abcd"[number] for number in ids)


rows_of_few_letters = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(rows_of_few_letters, rows_of_few_letters, st.integers(1, 4))
def test_the_hashes_find_what_comparing_finds(train, held, n):
    def grams(row, size):
        return {tuple(row[at : at + size]) for at in range(len(row) - size + 1)}

    def rows_with(gram):
        return sum(gram in grams(row, len(gram)) for row in train)

    few = max(1, min(module.COMMON_ROWS, len(train) // 2))
    expected = 0
    for row in held:
        template = set()
        for size in module.HEADS:
            same = sum(other[:size] == row[:size] for other in train if len(other) >= size <= len(row))
            template |= set(range(size)) if same > max(few, module.PIECE_SHARE * len(train)) else set()
        windows = [range(at, at + n) for at in range(len(row) - n + 1) if not template & set(range(at, at + n))]
        phrases = {place for window in windows if rows_with(tuple(row[at] for at in window)) > few for place in window}
        expected += any(0 < rows_with(tuple(row[at] for at in window)) <= few and not phrases & set(window) for window in windows)
    found = contamination(sequences(train), sequences(held), Characters(), shared=n)
    assert found.rows == expected and len(found.first) == expected


def test_blocks_change_nothing(tmp_path, monkeypatch):
    train, held = [f"{sentence(n)} {COPIED}" if n in (3, 17) else sentence(n) for n in range(40)], [COPIED + " so", sentence(99)]
    whole = compare(tmp_path, train, held)
    monkeypatch.setattr(module, "BLOCK", 50)
    assert compare(tmp_path, train, held) == whole and whole[0].rows == 1


def test_an_ending_that_many_rows_have_does_not_hide_a_copied_row(tmp_path):
    rng = np.random.default_rng(0)
    rows = [" ".join("".join(map(chr, rng.integers(0xAC00, 0xD7A3, 18))) + "습니다." for _ in range(3)) for _ in range(41)]
    found, listed = compare(tmp_path, rows[:40], [f"{rows[5]} 네", rows[40]])
    assert found.rows == 1 and listed[0][1].endswith(":6") and found.short == 0


def test_the_role_of_a_turn_is_no_part_of_a_passage(tmp_path):
    """Fifty-two letters after the ten of "assistant" and its line are no passage of sixty."""
    copied = COPIED[:52]
    train = [*map(sentence, range(30)), f"{copied} 1"]
    assert compare(tmp_path, train, [f"{copied} 2"], tokenizer=tiny_tokenizer("chatml"))[0].rows == 0


def test_rows_whose_answer_was_seen_are_distinguished_from_rows_whose_prompt_was(tmp_path):
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
def test_preferences_supervise_answers_alone_and_rewards_no_token(tmp_path, objective):
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
