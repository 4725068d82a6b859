"""Questions as windows of tokens, and answers back to characters of the context."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tokenizers import ENCODERS, KINDS, tokenizer_of
from tests.models.test_real import pulled
from tunesmith.data.batch.pack import PACKED
from tunesmith.data.encode import questions
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Question
from tunesmith.metrics import squad
from tunesmith.models.heads import task_heads
from tunesmith.objectives import qa

SPLIT = [kind for kind in KINDS if kind != "across words"]
"""Tokenizers that split at white space, so that tokens determine a word."""

WORDS = ["fox", "Paris", "quick", "안녕하세요", "날씨가", "capital", "01234", "naïve", "🦊", "x"]


def encode(kind, row, max_length=384, stride=0, longest_answer=1, template=questions.TEMPLATE):
    (made,) = questions.encode(
        [row], tokenizer_of(kind), template=template, causal=kind not in ENCODERS,
        max_length=max_length, stride=stride, longest_answer=longest_answer,
    )  # fmt: skip
    return made


def objective_of(**config):
    made = qa.Objective(qa.Config(**config))
    made.threshold = 0.0
    return made


def said_of(objective, rows, examples, patch, sure=9.0):
    """Return predictions of a head whose logit is ``sure`` at the gold tokens of each window; windows come in reverse order."""

    def logits(model, batch):
        ends = []
        for column in batch["spans"].T:
            table = torch.zeros(len(batch["spans"]) * max(batch["places"]))
            table[torch.arange(len(column)) * max(batch["places"]) + column] = sure
            ends.append(table[batch["cells"]])
        return tuple(ends)

    flat = [{**one, "row": np.array([0, number])} for number, group in enumerate(examples) for one in group]
    patch.setattr(task_heads, "span_logits", logits)
    records = [objective.evaluate(None, objective.collate(flat[at : at + 2], PACKED)) for at in range(0, len(flat), 2)][::-1]
    return objective.answers(records), records


texts = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([" ", "  ", "\n", "\t"])), min_size=1, max_size=40)


@pytest.mark.parametrize("kind", SPLIT)
@settings(max_examples=40, deadline=None)
@given(texts, st.integers(0, 39), st.integers(1, 3), st.integers(0, 20), st.integers(0, 30), st.booleans())
def test_an_oracle_finds_every_answer(kind, words, at, length, more, stride, answerable):
    """For any window that the answer fits into, exact match and F1 are 1, with and without an answer."""
    context, places = "", []
    for word, space in words:
        places.append((len(context), len(context) + len(word)))
        context += word + space
    at %= len(places)
    start, end = places[at][0], places[min(at + length, len(places)) - 1][1]
    gold = context[start:end]
    row = Question("what is the capital?", context, ((gold, start), ("other", 0)) if answerable else ())
    (whole,) = encode(kind, row, 10_000)
    size = int(whole["span"][1] - whole["span"][0]) + 1
    others = len(whole["input_ids"]) - np.count_nonzero(token_of_context(kind, whole))
    max_length = others + max(questions.FEWEST_CONTEXT_TOKENS, -(-4 * size // 3)) + more
    made = encode(kind, row, max_length, stride, size)
    assert all(len(one["input_ids"]) <= max_length for one in made) and [len(one["golds"]) > 0 for one in made].count(True) == 1
    for one in made:
        if answerable and one["span"][0] != one["null"][0]:
            offsets = one["offsets"].reshape(-1, 2)
            first, last = offsets[one["span"][0], 0], offsets[one["span"][1], 1]
            assert (first, last) == (start, end) and questions.answer_text(one["context"], one["offsets"], first, last) == gold
    objective = objective_of(max_answer_tokens=100)
    with pytest.MonkeyPatch.context() as patch:
        ((answer,), records) = said_of(objective, [row], [made], patch)
    assert answer["prediction"] == (gold if answerable else "") and answer["right"]
    assert objective.summarise(records)["eval_exact_match"] == objective.summarise(records)["eval_f1"] == 1.0
    assert not answerable or context[answer["start"] : answer["end"]] == gold


def token_of_context(kind, one):
    """bool[n] of a whole row: the tokens from the first to the last of the context, white space too."""
    tokens = np.flatnonzero(one["offsets"][::2] >= 0)
    held = np.zeros(len(one["input_ids"]), np.bool_)
    held[tokens[0] : tokens[-1] + 1] = True
    return held


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 30))
def test_pieces_cover_all_and_overlap(count, room, overlap):
    pieces = questions.stretches(count, room, overlap)
    assert pieces[0][0] == 0 and pieces[-1][1] == count and all(0 < end - start <= room for start, end in pieces)
    shared = min(overlap, room - max(1, room // 4))
    assert all(one[1] - other[0] == shared for one, other in pairwise(pieces))
    for start in range(count - shared):  # so an answer of shared + 1 tokens is whole somewhere
        assert any(first <= start and start + shared + 1 <= end for first, end in pieces)


def test_some_window_contains_the_whole_answer():
    """Even without a stride: windows overlap by the longest answer."""
    words = [f"{number:02}" for number in range(60)]
    for longest, always in ((12, True), (1, False)):
        found = [encode("bert", row_at(words, at), 40, stride=0, longest_answer=longest) for at in range(58)]
        assert all(any(one["span"][0] > 0 for one in made) for made in found) is always


def row_at(words, at):
    context = " ".join(words)
    return Question("what?", context, ((" ".join(words[at : at + 3]), context.index(words[at])),))


@pytest.mark.parametrize("kind", ["bert", "roberta", "word pieces", "metaspace"])
def test_windows_of_a_pair_equal_the_tokenizer_s(kind):
    """Windows are those of transformers, which truncates the second text with an overlap."""
    row = Question("what is the capital?", "the quick brown fox " * 10, (("fox", 16),))
    tokenizer = tokenizer_of(kind)
    size, stride = 40, 9
    closed = kind == "metaspace"  # a decoder: one end token follows
    stock = tokenizer(
        row.question,
        row.context,
        truncation="only_second",
        max_length=size - closed,
        stride=stride,
        return_overflowing_tokens=True,
    )
    made = encode(kind, row, size, stride)
    assert [one["input_ids"].tolist() for one in made] == [ids + [tokenizer.eos_token_id] * closed for ids in stock["input_ids"]]
    if kind in ("bert", "word pieces"):
        assert [one["token_type_ids"].tolist() for one in made] == stock["token_type_ids"]
    assert [int(one["null"][0]) for one in made] == ([len(one["input_ids"]) - 1 for one in made] if closed else [0] * len(made))


def test_a_decoder_reads_the_template_and_one_end_token():
    row = Question("who?", "he is Paris", (("Paris", 6),))
    tokenizer = tokenizer_of("bytes")
    (made,) = encode("bytes", row)
    assert made["input_ids"].tolist() == [*tokenizer("who?\n\nhe is Paris")["input_ids"], tokenizer.eos_token_id]
    assert made["null"].tolist() == [len(made["input_ids"]) - 1]
    offsets = made["offsets"].reshape(-1, 2)
    assert offsets[offsets >= 0].min() == 0 and offsets.max() == len(row.context)


def test_question_and_context_are_tokenised_separately():
    row = Question("the", "quick {question} fox", (("fox", 17),))
    (made,) = encode("across words", row, template="{question} th{context}")
    tokenizer = tokenizer_of("across words")
    apart = [tokenizer(text)["input_ids"] for text in ("the th", row.context)]
    assert made["input_ids"].tolist() == [*apart[0], *apart[1], tokenizer.eos_token_id]
    plain = tokenizer("the" + " quick")["input_ids"]
    assert plain != [*tokenizer("the")["input_ids"], *tokenizer(" quick")["input_ids"]]  # it does join across words


@pytest.mark.parametrize("kind", ["bytes", "roberta", "metaspace"])
def test_an_answer_begins_with_no_space(kind):
    row = Question("what?", "  the  quick\tfox ", ((" quick\t", 6),))
    (made,) = encode(kind, row)
    first, last = (int(made["offsets"].reshape(-1, 2)[place, side]) for place, side in zip(made["span"], (0, 1)))
    assert row.context[first:last] == "quick"


def test_unknown_and_impossible_answers_are_encoded():
    (unknown,) = encode("bert", Question("what?", "the fox"))
    (nothing,) = encode("bert", Question("what?", "the fox", ()))
    assert unknown["span"].tolist() == [-1, -1] and len(unknown["golds"]) == 0
    assert nothing["span"].tolist() == [0, 0] and json.loads(nothing["golds"].tobytes()) == []


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (Question("what?", " \n"), "a context with words in it"),
        (Question(" ", "the fox"), "expected a question"),
        (Question("what is the capital? " * 9, "the fox " * 99), "leaves room for 8 tokens of context in 40"),
    ],
)
def test_questions_that_cannot_be_encoded_are_refused(row, says):
    with pytest.raises(RowFault, match=says):
        encode("bert", row, 40)


def test_the_best_spans_equal_a_search_over_all_pairs():
    """Compared with a loop over all pairs of tokens."""
    (made,) = encode("bert", Question("what?", "the quick brown fox jumps\nover the dog"))
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, len(made["input_ids"]), generator=generator)
    offsets = made["offsets"].reshape(-1, 2)
    pairs = [
        (float(start[i] + end[j]), int(offsets[i, 0]), int(offsets[j, 1]))
        for i in range(len(start)) for j in range(i, min(i + 4, len(start))) if offsets[i, 0] >= 0 and offsets[j, 0] >= 0
    ]  # fmt: skip
    found = qa.best_spans(start, end, made["offsets"], made["context"], 7, 4)
    assert [(pytest.approx(score), a, b) for score, a, b in sorted(pairs)[::-1][:7]] == [one[:3] for one in found]


def window(best, null, golds=None, row=(0, 1)):
    return {"row": row, "best": best, "null": null, "golds": golds, "loss": (1.0, 1)}


def test_windows_of_a_question_are_joined():
    objective = objective_of()
    parts = [
        window([(2.0, 40, 43, "fox"), (1.0, 0, 3, "dog")], 5.0),
        window([(3.0, 60, 63, "fox"), (2.5, 61, 62, "o")], 1.0, ["fox"]),
    ]
    (answer,) = objective.answers([{"windows": parts[:1]}, {"windows": parts[1:]}])
    assert (answer["prediction"], answer["start"], answer["end"], answer["null_minus_best"]) == ("fox", 60, 63, -2.0)
    chances = np.exp([3.0, 2.5, 1.0, 1.0])
    assert [one["text"] for one in answer["n_best"]] == ["fox", "o", "dog", ""]
    assert [one["score"] for one in answer["n_best"]] == pytest.approx(list(chances / chances.sum()))
    assert answer["right"] and answer["loss"] == 1.0
    objective.threshold = -2.5
    assert objective.answers([{"windows": parts}])[0]["prediction"] == ""
    objective.threshold = None
    assert "" not in [one["text"] for one in objective.answers([{"windows": parts}])[0]["n_best"]]


def test_the_threshold_is_tuned():
    objective = objective_of()
    records = [{"windows": [
        window([(1.0, 0, 3, "fox")], 2.0, ["fox"], (0, 1)), window([(1.0, 0, 3, "dog")], 1.5, ["dog"], (0, 2)),
        window([(1.0, 0, 3, "cat")], 3.0, [], (0, 3)), window([(1.0, 0, 3, "cow")], 4.0, [], (0, 4)),
    ]}]  # fmt: skip
    assert objective.summarise(records)["eval_f1"] == 0.5
    objective.choose_threshold(records)
    assert objective.threshold == 1.0 and objective.summarise(records)["eval_f1"] == 1.0
    assert objective.head_config()["tunesmith"]["null_threshold"] == 1.0
    figures = objective.summarise(records)
    assert figures["eval_has_answer_f1"] == figures["eval_no_answer_f1"] == 1.0


def test_only_data_with_impossible_questions_set_a_threshold():
    rows = [Question("what?", "the fox", (("fox", 4),)), Question("what?", "the fox", ())]
    objective = qa.Objective(qa.Config())
    objective.scan(rows[:1])
    assert objective.threshold is None and "the model always predicts one" in objective.notes[0]
    objective.scan(rows)
    assert objective.threshold == 0.0


@pytest.mark.real
@pytest.mark.parametrize("name", ["minilm-l6", "smollm2-135m"])
def test_an_oracle_on_xquad_with_the_real_tokenizers(name, shared, monkeypatch):
    """Only answers that begin or end inside a token are lost."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pulled(name))
    data = json.loads((shared / "data" / "xquad.en.json").read_text())["data"]
    rows = [
        Question(asked["question"], part["context"], tuple((one["text"], one["answer_start"]) for one in asked["answers"]))
        for article in data for part in article["paragraphs"] for asked in part["qas"]
    ][:300]  # fmt: skip
    for window, stride in ((384, 128), (100, 0)):
        objective = qa.Objective(qa.Config(window=window, stride=stride))
        objective.bind(AutoConfig.from_pretrained(pulled(name)), tokenizer, 512)
        objective.scan(rows)
        examples = objective.encode(rows, tokenizer)
        answers, records = said_of(objective, rows, examples, monkeypatch)
        assert objective.summarise(records)["eval_f1"] > 0.99
        aligned = [
            place for place, row in enumerate(rows) if squad.exact_match(answers[place]["prediction"], [row.answers[0][0]])
        ]
        assert len(aligned) > 0.97 * len(rows)
