"""Tagged words as windows of tokens: nothing is cut, whatever the tokenizer, the length and the stride."""

import re
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data.tokenizers import ENCODERS, KINDS, tokenizer_of
from tests.models.test_real import pulled
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.data.encode import tagging
from tunesmith.data.encode.templates import special_ends
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Tagged
from tunesmith.errors import DataError
from tunesmith.metrics import entities
from tunesmith.models.heads import task_heads
from tunesmith.objectives import tag

WORDS = ["the", "Paris", "quick", "안녕하세요", "날씨가", "capital", "0123456789", "naïve", "🦊", "x", "\u200b", "Übermut"]
TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def row_of(words, tags, spaced=True):
    """A row of words between spaces, or side by side (then spaces may be words)."""
    text, places = "", []
    for word in words:
        text += " " if spaced and text else ""
        places.append((len(text), len(text) + len(word)))
        text += word
    return Tagged(text, tuple(places), None if tags is None else tuple(tags))


def objective_of(kind, max_length=None, tokenizer=None, saved=None, **config):
    made = tag.Objective(tag.Config(labels=sorted(TAGS, key=lambda name: (name != "O", name)), **config))
    name = "BertForMaskedLM" if kind in ENCODERS else "LlamaForCausalLM"
    from transformers import BertConfig, LlamaConfig

    network = (BertConfig if kind in ENCODERS else LlamaConfig)(architectures=[name], **(saved or {}))
    made.bind(network, tokenizer or tokenizer_of(kind), max_length)
    return made


@contextmanager
def oracle():
    """A head whose prediction for each token is the gold tag."""
    real = task_heads.token_logits
    task_heads.token_logits = lambda model, batch: 9.0 * torch.nn.functional.one_hot(batch["targets"], len(TAGS)).float()
    try:
        yield
    finally:
        task_heads.token_logits = real


def answers_of(objective, rows, examples):
    """What the oracle's tags become, by row; each window in a batch of its own, the last one first."""
    flat = [{**one, "row": np.array([0, number])} for number, group in enumerate(examples) for one in group]
    with oracle():
        records = [objective.evaluate(None, objective.collate([one], PADDED)) for one in reversed(flat)]
    return objective.answers(records), records


sentences = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(TAGS)), min_size=1, max_size=14)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    st.lists(sentences, min_size=1, max_size=3),
    st.booleans(),
    st.integers(1, 20),
    st.integers(0, 20),
    st.booleans(),
    st.booleans(),
)
@example([[("안녕하세요", "B-PER"), (" ", "O"), ("날씨가", "I-LOC")]], False, 1, 0, False, True)
def test_an_oracle_has_an_f1_of_one(kind, given_rows, spaced, room, stride, label_all, characters):
    """For every window length, each entity is found and each word is predicted once; also where each character, spaces included, is a word."""
    rows = []
    for sentence in given_rows:
        words = [" ".join(word for word, _ in sentence)] if characters else [word for word, _ in sentence]
        if characters:
            words = list(words[0])
        rows.append(row_of(words, [sentence[place % len(sentence)][1] for place in range(len(words))], spaced and not characters))
    before, after = special_ends(tokenizer_of(kind))
    objective = objective_of(kind, room + len(before) + len(after), stride=stride, label_all=label_all)
    examples = objective.encode(rows, tokenizer_of(kind))
    assert all(len(one["input_ids"]) <= objective.max_length for group in examples for one in group)
    found, records = answers_of(objective, rows, examples)
    assert [one["prediction"] for one in found] == [list(row.tags) for row in rows] == [one["gold"] for one in found]
    assert objective.summarise(records).get("eval_accuracy") == 1.0
    if any(entities.spans(row.tags) for row in rows):
        assert objective.summarise(records)["eval_f1"] == 1.0


def test_gold_that_is_cut_is_seen():
    """The oracle test would notice an evaluation of only the first window of a long sentence."""
    rows = [row_of(["the", "quick", "Paris", "capital"] * 4, ["O", "O", "B-LOC", "I-LOC"] * 4)]
    objective = objective_of("bert", 12, stride=2)
    examples = objective.encode(rows, tokenizer_of("bert"))
    assert len(examples[0]) > 1
    found, _ = answers_of(objective, rows, [examples[0][:1]])
    assert entities.score([rows[0].tags], [found[0]["prediction"]])["f1"] < 0.7


@pytest.mark.parametrize("kind", ["bytes", "bytes after a first token", "bert", "roberta", "word pieces", "metaspace"])
def test_a_word_is_read_at_a_token_of_its_own(kind):
    """Compared with a loop over characters: a word is read at its first token, in a decoder at its last."""
    rows = [row_of(["the", "날씨가", "naïve", "Paris", "0123456789"], ["O", "B-LOC", "I-LOC", "O", "B-PER"])]
    tokenizer = tokenizer_of(kind)
    encoded = tokenizer(rows[0].text, return_offsets_mapping=True)
    ids, offsets, own = encoded["input_ids"], encoded["offset_mapping"], encoded.encodings[0].sequence_ids
    expected = []
    for start, end in rows[0].words:
        inside = [n for n, (a, b) in enumerate(offsets) if own[n] == 0 and any(start <= at < end for at in range(a, b))]
        expected.append(inside[0] if kind in ENCODERS else inside[-1])
    ((made,),) = objective_of(kind).encode(rows, tokenizer)
    assert made["input_ids"].tolist() == ids and made["places"].tolist() == expected and made["words"].tolist() == [0, 1, 2, 3, 4]


def test_characters_are_tokenised_alone_where_a_token_would_hold_two():
    text = "the quick"
    row = row_of(list(text), ["O"] * len(text), spaced=False)
    ((made,),) = objective_of("bytes").encode([row], tokenizer_of("bytes"))
    alone = [tokenizer_of("bytes")(character)["input_ids"] for character in text]
    assert made["input_ids"].tolist() == [number for ids in alone for number in ids]


@pytest.mark.parametrize("kind", ["word pieces", "metaspace"])
def test_a_word_without_a_token_gets_the_unknown_one(kind):
    row = row_of(["Paris", "\u200b", "fox"], ["O", "B-LOC", "O"])
    tokenizer = tokenizer_of(kind)
    ((made,),) = objective_of(kind).encode([row], tokenizer)
    assert made["input_ids"][made["places"][1]] == tokenizer.unk_token_id and made["words"].tolist() == [0, 1, 2]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(5, 16),
    st.integers(0, 16),
    st.booleans(),
)
def test_each_word_is_owned_once_where_it_sees_most(shape, room, stride, causal):
    word = np.concatenate([[number] * size + [-1] * gap for number, (size, gap) in enumerate(shape)]).astype(np.int32)
    made = tagging.windows(word, room, stride, causal)
    assert sorted(int(one) for window in made for one in window.words) == list(range(len(shape)))
    assert all(window.end - window.start <= room for window in made)
    for window in made:
        for one in window.words:
            places = np.flatnonzero(word == one)
            assert window.start <= places[0] and places[-1] < window.end

            def context(other, places=places):
                left = 99 if other.start == 0 else places[0] - other.start
                right = 99 if other.end == len(word) else other.end - 1 - places[-1]
                return left if causal else min(left, right)

            holds = [other for other in made if other.start <= places[0] and places[-1] < other.end]
            assert context(window) == max(map(context, holds))
    for one, other in pairwise(made):
        assert one.start < other.start and one.end < other.end and one.end - other.start <= stride


def test_label_all_goes_on_inside_a_word():
    row = row_of(["날씨가", "Paris", "x"], ["B-LOC", "I-PER", "O"])
    for kind, speaks in (("bert", 0), ("bytes", -1)):
        ((made,),) = objective_of(kind, label_all=True).encode([row], tokenizer_of(kind))
        names = [objective_of(kind).labels[number] for number in made["target"]]
        first = [name for name, word in zip(names, made["words"]) if word == 0]
        assert len(first) > 1 and first.pop(speaks) == "B-LOC" and set(first) == {"I-LOC"}
        assert {name for name, word in zip(names, made["words"]) if word == 1} == {"I-PER"}
        read = made["target"][tagging.representing_tokens(made["words"], causal=speaks == -1)]
        assert read.tolist() == [objective_of(kind).labels.index(name) for name in row.tags]


def test_a_word_above_the_window_keeps_its_speaking_end():
    row = row_of(["0123456789" * 3], ["B-LOC"])
    for kind, end in (("bert", slice(0, 4)), ("bytes", slice(-4, None))):
        tokenizer = tokenizer_of(kind)
        whole = tokenizer(row.text, add_special_tokens=False)["input_ids"]
        before, after = special_ends(tokenizer)
        ((made,),) = objective_of(kind, 4 + len(before) + len(after)).encode([row], tokenizer)
        assert len(whole) > 4 and made["input_ids"].tolist() == [*before, *whole[end], *after]


def test_faults_name_what_is_wrong():
    objective, tokenizer = objective_of("bert"), tokenizer_of("bert")
    good = row_of(["Paris"], ["O"])
    with pytest.raises(RowFault, match=r"'B-LOK' at word 2, 'fox'.*Did you mean `B-LOC`") as fault:
        objective.encode([good, row_of(["the", "fox"], ["O", "B-LOK"])], tokenizer)
    assert fault.value.index == 1
    with pytest.raises(RowFault, match="expected a tag for each word, got 1 tags for 2 words"):
        objective.encode([row_of(["the", "fox"], ["O"])], tokenizer)
    with pytest.raises(RowFault, match="at least one word"):
        objective.encode([Tagged(" ", (), ())], tokenizer)
    with pytest.raises(DataError, match="max_length 2 leaves no room"):
        objective_of("bert", 2).encode([good], tokenizer)


def survey(*tags, **config):
    made = tag.Objective(tag.Config(**config))
    made.scan([row_of(["x"] * len(one), one) for one in tags])
    return made


def test_tags_are_found_and_their_faults_counted():
    made = survey(["O", "B-b", "I-b"], ["I-a", "O", "B-a"], ["I-b", "B-b", "I-a"])
    assert made.labels == ["O", "B-a", "B-b", "I-a", "I-b"] and made.scheme == "BIO" and made.traits.best == ("eval_f1", "max")
    assert any("2 times an I- with no B- before it: kept" in note for note in made.notes)
    assert any("1 times an entity whose type changes" in note for note in made.notes)
    assert survey(["O", "B-a"]).labels == survey(["O", "B-a"], label_all=True).labels == ["O", "B-a", "I-a"]
    assert survey(["O", "S-a", "B-b"]).labels == ["O", "B-a", "B-b", "E-a", "E-b", "I-a", "I-b", "S-a", "S-b"]
    assert survey(["O", "I-a"]).labels == ["O", "I-a"]
    plain = survey(["NOUN", "VERB"])
    assert plain.scheme is None and plain.traits.best == ("eval_accuracy", "max")


@pytest.mark.parametrize(
    ("tags", "says"), [(["O", "O"], "only the tag 'O'"), (["0", "3"], "numbers without names"), ([], "no tag at all")]
)
def test_tags_that_teach_nothing(tags, says):
    with pytest.raises(DataError, match=says):
        survey(tags)


SENTENCE = "A sentence that was read as the tag of its number."


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        (
            ["B-PER", "I-PER", "O", SENTENCE] * 9,
            r"'A sentence that .* \(9\) do not follow BIO, so no tag could be read as an entity",
        ),
        (["B-PER", "O"] * 50 + ["B PER"], r"'B PER' \(1\) do not follow BIO"),
        ([f"{SENTENCE} {number}" for number in range(401)], "401 different tags"),
        (["O", *(f"B-{number}" for number in range(401))], "402 different tags"),
    ],
)
def test_tags_that_are_no_tags_stop_the_run_unless_the_recipe_lists_them(tags, says):
    with pytest.raises(DataError, match=rf"(?s){says}.*objective.labels"):
        survey(tags)
    assert survey(tags, labels=sorted(set(tags))).labels == sorted(set(tags))


@pytest.mark.parametrize(
    "tags", [["NOUN", "S", "I", "E"], ["B-a", "I-a", "L-a", "U-a", "O"], [f"Tag{number}" for number in range(300)]]
)
def test_parts_of_speech_and_other_schemes_are_trained_as_single_tags(tags):
    assert survey(tags).scheme is None and sorted(survey(tags).labels) == sorted(tags)


IOB1 = [["I-PER", "O", "I-LOC", "B-LOC", "I-LOC"], ["I-ORG", "I-PER", "B-PER"]]
IOB2 = [["B-PER", "O", "B-LOC", "B-LOC", "I-LOC"], ["B-ORG", "B-PER", "B-PER"]]


def test_iob1_is_converted_in_training_and_held_out_rows_and_by_the_saved_model():
    made = survey(*IOB1)
    assert made.labels == survey(*IOB2).labels and any("IOB1" in note for note in made.notes)
    tokenizer = tokenizer_of("bert")
    again = objective_of("bert", saved=made.head_config())
    again.restore_labels()
    for objective in (made, again):
        for encode in (objective.encode, objective.encode_held_out):
            rows = [row_of(["Paris"] * len(tags), tags) for tags in (*IOB1, ["I-LOC", "I-LOC"])]
            targets = [[objective.labels[number] for number in one["target"]] for (one,) in encode(rows, tokenizer)]
            assert targets == [*IOB2, ["B-LOC", "I-LOC"]]
    assert not any("IOB1" in note for note in survey(*IOB2).notes) and "iob1" not in survey(*IOB2).facts
    assert "iob1" not in survey(["I-PER", "O", "I-LOC"]).facts  # IO


def test_an_unseen_tag_of_held_out_rows_is_a_mistake_and_not_the_end():
    objective, tokenizer = objective_of("bert"), tokenizer_of("bert")
    rows = [row_of(["Paris", "the", "fox", "x"], ["B-LOC", "O", "B-LOK", "I-LOK"]), row_of(["x"], ["O"])]
    with pytest.raises(RowFault, match=r"objective\.labels"):
        objective.encode(rows, tokenizer)
    examples = objective.encode_held_out(rows, tokenizer)
    with oracle():
        flat = [{**one, "row": np.array([0, number])} for number, (one,) in enumerate(examples)]
        batch = objective.collate(flat, PADDED)
        right = {**batch, "targets": batch["targets"].clamp(min=0)}  # the oracle says O where it cannot know
        record = objective.evaluate(None, right)
    for window, (one,) in zip(record["windows"], examples, strict=True):
        window["targets"] = one["target"]
    details = objective.details([record])
    assert (details["unseen"], details["support"], details["precision"], details["recall"]) == (2, 2, 1.0, 0.5)
    assert details["token_accuracy"] == 3 / 5 and details["by_type"]["(unseen)"]["support"] == 1
    assert objective.answers([record])[0]["gold"] == ["B-LOC", "O", "B-(unseen)", "I-(unseen)"]
    assert objective.count(batch) == 3
    loss = tag._losses(torch.randn(5, len(TAGS)), batch["targets"])
    assert (loss[batch["targets"] < 0] == 0).all() and (loss[batch["targets"] >= 0] > 0).all()


def test_entities_are_given_with_their_characters():
    row = row_of(["the", "New", "York", "fox"], None)
    objective = objective_of("bert")
    said = objective.present(row, {"prediction": ["O", "B-LOC", "I-LOC", "O"], "scores": [1.0, 0.5, 0.7, 1.0]})
    assert said["entities"] == [{"type": "LOC", "start": 4, "end": 12, "text": "New York", "score": pytest.approx(0.6)}]


@pytest.mark.real
@pytest.mark.parametrize("name", ["minilm-l6", "smollm2-135m"])
def test_an_oracle_has_an_f1_of_one_with_the_real_tokenizers(name, shared):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pulled(name))
    sentences = [
        block.splitlines() for block in re.split(r"\n\s*\n", (shared / "data" / "wnut17_train.conll").read_text()) if block
    ]
    cells = [[line.split("\t") for line in block] for block in sentences[:400]]
    rows = [row_of([word for word, _ in block], [name.strip() for _, name in block]) for block in cells]
    korean = "안녕하세요 오늘 날씨가 좋네요"
    rows.append(row_of(list(korean), ["B-person", *["O"] * (len(korean) - 1)], spaced=False))
    for max_length, stride in ((None, 0), (12, 5)):
        objective = tag.Objective(tag.Config(stride=stride))
        objective.bind(AutoConfig.from_pretrained(pulled(name)), tokenizer, max_length)
        objective.scan(rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task_heads, "token_logits", lambda model, batch: 9.0 * torch.eye(99)[batch["targets"]])
            flat = [
                {**one, "row": np.array([0, n])} for n, group in enumerate(objective.encode(rows, tokenizer)) for one in group
            ]
            records = [
                objective.evaluate(SimpleNamespace(), objective.collate(flat[at : at + 50], PACKED))
                for at in range(0, len(flat), 50)
            ]
        assert objective.summarise(records)["eval_f1"] == 1.0
        assert [one["prediction"] for one in objective.answers(records)] == [list(row.tags) for row in rows]
