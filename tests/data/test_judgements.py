"""Unpaired preference: files become rows with a label, rows become examples; lint, preview and hold-out support them."""

from __future__ import annotations

import copy
import json
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.data.tokenizers import KINDS, tokenizer_of
from tests.data.zoo import ZOO
from tests.tiny import save_tiny
from tunesmith import objectives
from tunesmith.cli.main import main
from tunesmith.data.batch import preference_batch, shared_prompts
from tunesmith.data.batch.pack import Layout
from tunesmith.data.check import minhash
from tunesmith.data.check.balance import Balance, balance
from tunesmith.data.check.lint import lint
from tunesmith.data.check.near_duplicates import kept_rows, near_duplicates
from tunesmith.data.data_config import DataConfig, EvalConfig, Source
from tunesmith.data.encode import conversations
from tunesmith.data.encode.judgements import encode, prompt_key
from tunesmith.data.encode.templates import apply_template
from tunesmith.data.formats.columns import choose_converter
from tunesmith.data.formats.judgement_fields import split_pair
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import Record, RowFault, RowProblem
from tunesmith.data.rows import ROW_TYPES, Chat, Judged, Labelled, PromptCompletion, Ranking, Text, digest, without_gold
from tunesmith.data.store.prepare import prepare
from tunesmith.errors import DataError
from tunesmith.objectives import Traits
from tunesmith.train.reference import key_of

Q, A, S = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "system", "content": "s"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
GAVE = {"role": "tool", "content": "7"}
ENDING = [kind for kind in KINDS if tokenizer_of(kind).eos_token]
texts = st.lists(st.sampled_from(["fox", " quick", "안녕", "\n", "  ", "01", "🦊", "."]), min_size=1, max_size=8)
texts = texts.map("".join).filter(str.strip)


def made(value, accepted=(Judged,), **options):
    return choose_converter([tuple(value)], path="f", accepted=accepted, **options)(Record("f", 1, 1, value))


def file(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


@lru_cache
def templated(name):
    """A tokenizer of ZOO, or one of KINDS with the template ``roles``."""
    if name in ZOO:
        return ZOO[name].tokenizer()
    tokenizer = copy.deepcopy(tokenizer_of(name))
    tokenizer.chat_template = None
    return apply_template(tokenizer, "roles")[0]


# ------------------------------------------------------------------------------------------------------------ files to rows

SHAPES = [
    ({"prompt": "q", "completion": "a", "label": True}, Judged("q", "a", True)),
    ({"prompt": [Q], "completion": [A], "label": False}, Judged((Q,), (A,), False)),
    ({"prompt": [S, Q], "completion": A, "label": 1}, Judged((S, Q), (A,), True)),
    ({"prompt": [Q], "completion": "a", "label": 0}, Judged((Q,), (A,), False)),
    ({"prompt": "q", "completion": "a", "label": True, "system": "s"}, Judged((S, Q), (A,), True)),
    ({"messages": [Q, A], "label": True}, Judged((Q,), (A,), True)),
    ({"messages": [Q, A, Q, A], "label": False}, Judged((Q, A, Q), (A,), False)),
    ({"messages": [Q, A], "label": True, "system": "s"}, Judged((S, Q), (A,), True)),
    ({"messages": [Q, CALL, GAVE, A], "label": True}, Judged((Q,), (CALL, GAVE, A), True)),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": False},
        Judged((Q,), (A,), False),
    ),
    ({"instruction": "q", "input": "", "output": "a", "kto_tag": True}, Judged((Q,), (A,), True)),
    (
        {"instruction": "q", "input": "x", "output": "a", "kto_tag": "false"},
        Judged(({"role": "user", "content": "q\n\nx"},), (A,), False),
    ),
    ({"prompt": "q", "response": "a", "label": "good"}, Judged("q", "a", True)),
    ({"prompt": "q", "output": "a", "label": "bad"}, Judged("q", "a", False)),
    ({"prompt": "q", "completion": "a", "desirable": False}, Judged("q", "a", False)),
    ({"prompt": "q", "response": "a", "rating": 1}, Judged("q", "a", True)),
    ({"prompt": "q", "response": "a", "thumbs_up": "yes"}, Judged("q", "a", True)),
]  # fmt: skip


@pytest.mark.parametrize(("value", "row"), SHAPES)
def test_each_shape_is_a_judged_row(value, row):
    assert made(value) == row


def test_tools_stay_with_the_row():
    row = made({"prompt": [Q], "completion": [CALL, GAVE, A], "label": True, "tools": [{"name": "f", "parameters": {}}]})
    assert row.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    assert row.response == (CALL, GAVE, A) and row.written() == [Chat((Q, CALL, GAVE, A), row.tools)]


SAID = {
    True: (True, 1, 1.0, "1", "1.0", "True", " true ", "yes", "Good", "desirable", "thumbs up", "Thumbs-Up", "chosen"),
    False: (False, 0, 0.0, "0", "0.0", "FALSE", "no", "bad", "undesirable", "thumbs_down", "rejected"),
}  # fmt: skip


@pytest.mark.parametrize(("label", "good"), [(label, good) for good, labels in SAID.items() for label in labels])
def test_labels_are_read_in_every_spelling(label, good):
    assert made({"prompt": "q", "completion": "a", "label": label}).desirable is good


REFUSED = [
    ({"prompt": "q", "completion": "a", "label": None}, "label", "true or false", "nothing"),
    ({"prompt": "q", "completion": "a", "label": "billing"}, "label", "true or false", "billing"),
    ({"prompt": "q", "completion": "a", "label": ""}, "label", "true or false", "''"),
    ({"prompt": "q", "completion": "a", "label": float("nan")}, "label", "true or false", "nan"),
    ({"prompt": "q", "completion": "a", "label": [True]}, "label", "true or false", "a list"),
    ({"prompt": "q", "response": "a", "rating": 4}, "rating", "true or false", "4"),
    ({"prompt": "q", "response": "a", "rating": -1}, "rating", "true or false", "-1"),
    ({"prompt": "q", "response": "", "thumbs_up": True}, "response", "something in it", "empty text"),
    ({"prompt": "", "completion": "a", "label": True}, "prompt", "text", "empty text"),
    ({"prompt": [Q], "completion": [], "label": True}, "completion", "something in it", "an empty list"),
    ({"prompt": [Q, A], "completion": [A], "label": True}, "prompt", "a turn of the user", "assistant"),
    ({"prompt": [Q], "completion": [Q, A], "label": True}, "completion", "turns of the assistant", "user"),
    ({"messages": [Q], "label": True}, "messages", "response after the last turn", "user"),
    ({"messages": [A], "label": True}, "messages", "a turn of the user", "none"),
    ({"messages": [Q, {"role": "assistant", "content": " "}], "label": True}, "messages[1].content", "text", "empty text"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "field", "expected", "got"), REFUSED)
def test_problems_name_the_column_of_the_file(value, field, expected, got):
    problem = made(value)
    assert isinstance(problem, RowProblem) and problem.field == field
    assert expected in problem.expected and got in problem.got and "answers[" not in str(problem)


def test_a_row_without_its_label_is_a_bad_row(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b"}]
    good, bad = open_source(Source(path=file(tmp_path, rows)), (Judged,)).rows()
    assert good[1] == Judged("q", "a", True) and bad.field == "label" and "the column 'label'" in bad.expected


def test_columns_are_mapped():
    value = {"ask": "q", "reply": "a", "ok": "no"}
    assert made(value, columns={"prompt": "ask", "completion": "reply", "label": "ok"}) == Judged("q", "a", False)
    assert made(value, columns={"instruction": "ask", "completion": "reply", "label": "ok"}) == Judged((Q,), (A,), False)
    both = {"completion": "reply", "label": "ok"}
    assert made(value, columns=both, prompt_template="<{ask}>") == Judged("<q>", "a", False)


KEPT = [
    ({"prompt": "q", "completion": "a", "label": True}, (Chat, PromptCompletion, Text), PromptCompletion("q", "a")),
    ({"prompt": [Q], "completion": [A], "label": True}, (Chat, PromptCompletion, Text), Chat((Q, A))),
    ({"messages": [Q, A], "label": True}, (Chat, PromptCompletion, Text), Chat((Q, A))),
    ({"instruction": "q", "output": "a", "kto_tag": True}, (Chat, PromptCompletion, Text), Chat((Q, A))),
    ({"prompt": "q", "response": "a", "thumbs_up": True}, (Chat, PromptCompletion, Text), Chat((Q, A))),
    ({"text": "q", "prompt": "p", "completion": "a", "label": "x"}, (Labelled,), Labelled("q", label="x")),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "rating": [1, 0]}, (Ranking,), Ranking("q", ("a", "b"), (0, 1), (1.0, 0.0))),
    ({"prompt": "q", "completion": "a", "label": "billing"}, ROW_TYPES, PromptCompletion("q", "a")),
    ({"messages": [Q, A], "label": "x"}, ROW_TYPES, Chat((Q, A))),
    ({"text": "q", "label": "0"}, ROW_TYPES, Labelled("q", label="0")),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, ROW_TYPES, Ranking("q", ("a", "b"), (0, 1))),
]  # fmt: skip


@pytest.mark.parametrize(("value", "accepted", "row"), KEPT)
def test_other_objectives_read_such_files_as_before(value, accepted, row):
    assert made(value, accepted) == row


@pytest.mark.parametrize("mark", ["kto_tag", "desirable", "Thumbs_Up"])
def test_a_column_that_only_unpaired_preference_has_decides_where_all_rows_are_taken(mark):
    assert made({"instruction": "q", "output": "a", mark: True}, ROW_TYPES) == Judged((Q,), (A,), True)


# -------------------------------------------------------------------------------------------------------------------- pairs

PAIRS = [
    ("unpaired", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ("unpaired_turns", {"conversations": [Q], "chosen": A, "rejected": {"role": "assistant", "content": "b"}}),
    ("unpaired_alpaca", {"instruction": "q", "chosen": "a", "rejected": "b"}),
    ("unpaired_dialogues", {"chosen": [Q, A], "rejected": [Q, {"role": "assistant", "content": "b"}]}),
]


@pytest.mark.parametrize(("format", "value"), PAIRS)
def test_pairs_become_two_rows_only_where_the_format_is_named(tmp_path, format, value):
    path = file(tmp_path, [value])
    with pytest.raises(DataError, match=rf"makes Ranking rows.*\n.*format: {format} "):
        open_source(Source(path=path), (Judged,))
    opened = open_source(Source(path=path, format=format), (Judged,))
    assert "each pair becomes two rows: chosen is desirable, rejected is undesirable" in opened.description
    rows = [row for _, row in opened.rows()]
    answers = ["a", "b"] if format == "unpaired" else [(A,), ({"role": "assistant", "content": "b"},)]
    assert [(row.response, row.desirable) for row in rows] == [(answers[0], True), (answers[1], False)]
    assert {row.prompt for row in rows} == {"q"} if format == "unpaired" else rows[0].prompt == rows[1].prompt == (Q,)


def test_a_ranking_of_several_is_no_pair(tmp_path):
    path = file(tmp_path, [{"prompt": "q", "answers": ["a", "b", "c"]}])
    with pytest.raises(DataError, match="set objective: dpo or reward"):
        open_source(Source(path=path), (Judged,))


def test_a_pair_of_equal_ranks_has_no_labels():
    assert [row.desirable for row in split_pair(Ranking("q", ("a", "b"), (0, 0)))] == [None, None]
    assert [row.desirable for row in split_pair(Ranking("q", ("a", "b"), (1, 0)))] == [False, True]


# ---------------------------------------------------------------------------------------------------------- rows to examples


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(ZOO)) | st.sampled_from(ENDING), texts, texts, st.booleans(), st.booleans())
def test_an_example_has_the_tokens_of_its_chat(name, prompt, response, good, plain):
    tokenizer = templated(name)
    row = Judged(prompt, response, good)
    if not plain:
        row = Judged(({"role": "user", "content": prompt},), ({"role": "assistant", "content": response},), good)
    ((example,),) = encode([row], tokenizer, max_length=None, overlong="error")
    ((whole,),) = conversations.encode(row.written(), tokenizer)
    assert np.array_equal(example["input_ids"], whole["input_ids"])
    assert np.array_equal(example["supervised"], whole["supervised"])
    prefix, own = example["answers"].tolist()
    assert prefix + own == len(whole["input_ids"]) and not example["supervised"][:prefix].any()
    assert example["supervised"][prefix:].argmax() == 0 or prefix == 0
    assert example["desirable"].dtype == np.bool_ and example["desirable"].tolist() == [good]
    assert example["input_ids"].dtype == np.int32 and example["prompt_key"].tolist() == [prompt_key(row)]


def test_the_end_of_the_turn_is_supervised_and_what_a_tool_gives_is_not():
    tokenizer = templated("bytes") if "bytes" in ENDING else templated(ENDING[0])
    row = Judged((Q,), ({"role": "assistant", "content": "call"}, {"role": "tool", "content": "gave"}, A), False)
    ((example,),) = encode([row], tokenizer, max_length=None, overlong="error")
    said = tokenizer.decode(example["input_ids"][example["supervised"]].tolist())
    assert "call" in said and "gave" not in said and said.count(tokenizer.eos_token) == 2


def test_a_long_prompt_is_cut_from_the_left_and_the_response_never():
    tokenizer = templated(ENDING[0])
    rows = [Judged("many words " * 30, "the response", True), Judged("q", "a long response " * 30, False), Judged("q", "a", True)]
    whole = [example for (example,) in encode(rows, tokenizer, max_length=None, overlong="error")]
    limit = int(whole[0]["answers"][1]) + 20
    cut, gone, kept = encode(rows, tokenizer, max_length=limit, overlong="truncate")
    assert len(cut[0]["input_ids"]) == limit and cut[0]["answers"][1] == whole[0]["answers"][1] and not gone
    assert np.array_equal(cut[0]["input_ids"][-25:], whole[0]["input_ids"][-25:])
    assert cut[0]["cut"][0] == len(whole[0]["input_ids"]) - limit and cut[0]["supervised"].sum() == whole[0]["supervised"].sum()
    assert cut[0]["desirable"].tolist() == [True] and kept[0]["cut"].tolist() == [0]
    assert encode(rows, tokenizer, max_length=limit, overlong="drop")[:2] == [[], []]
    with pytest.raises(RowFault, match=f"at most {limit} tokens") as fault:
        encode(rows[::-1], tokenizer, max_length=limit, overlong="error")
    assert fault.value.index == 1


def test_a_row_without_a_label_is_not_encoded():
    rows = [Judged("q", "a", True), Judged("q", "a", None)]
    with pytest.raises(RowFault, match="a label, true if") as fault:
        encode(rows, templated(ENDING[0]), max_length=None, overlong="error")
    assert (fault.value.index, fault.value.field) == (1, "label")


def test_examples_are_laid_out_as_rankings_of_one_are():
    rows = [Judged((Q,), (A,), True), Judged((S, Q), (A,), False)]
    examples = [example for (example,) in encode(rows, templated(ENDING[0]), max_length=None, overlong="error")]
    for packed, shared in ((True, True), (True, False), (False, False)):
        batch = preference_batch.with_targets(examples, Layout(packed, shared))
        flat = batch["input_ids"].reshape(-1).numpy()
        _, places = shared_prompts.arrange(examples, Layout(packed, shared))
        for number, (example, where) in enumerate(zip(examples, places)):
            assert np.array_equal(flat[where], example["input_ids"])
            mine = (batch["owners"] == number).numpy()
            assert np.array_equal(batch["labels"].numpy()[mine], example["input_ids"][example["supervised"]])
        assert batch["counts"] == [1, 1] and len(set(map(key_of, examples))) == 2 and not len(batch["pairs"])
    short = preference_batch.shorten(examples[1], 3, 2)
    assert short["answers"].tolist() == [3, 2] and short["desirable"].tolist() == [False]


# --------------------------------------------------------------------------------------------------------------- around it


def test_a_row_without_gold_does_not_reveal_the_label():
    row = Judged("q", "a", True)
    assert without_gold(row) == Judged("q", "a", None) == without_gold(Judged("q", "a", False))
    assert len({digest(row), digest(Judged("q", "a", False)), digest(Judged("q", "b", True))}) == 3


def test_near_duplicates_compare_texts_and_not_labels():
    assert minhash.row_text(Judged((S, Q), (A,), True, ({"name": "tool"},))) == "q a"


def test_a_pair_that_became_two_rows_is_written_once(tmp_path):
    pytest.importorskip("rensa")
    values = [
        {"prompt": f"question {n}", "chosen": f"first {n * 7919} words", "rejected": f"then {n * 104729} others"}
        for n in range(3)
    ]
    sources = [Source(path=file(tmp_path, [*values, values[0]]), format="unpaired")]
    assert list(kept_rows(sources, near_duplicates(sources, accepted=(Judged,)), (Judged,))) == values


class Config(BaseModel):
    overlong: str


class Objective(objectives.Objective):
    """The part of an objective that ``prepare`` needs."""

    traits = Traits(rows=(Judged,), fits_rows=True)

    def __init__(self, max_length=None, policy="truncate"):
        super().__init__(Config(overlong=policy))
        self.max_length = max_length
        self.seen = Balance(0, 0)

    def scan(self, rows):
        self.seen = balance(rows)

    def encode(self, rows, tokenizer):
        return encode(rows, tokenizer, max_length=self.max_length, overlong=self.config.overlong)


def prepared(path, objective=None, tokenizer=None, **options):
    evaluation = EvalConfig(**options.pop("eval", {"fraction": 0}))
    config = DataConfig(train=[Source(path=path, **options)], eval=evaluation, cache=False)
    tokenizer = tokenizer or templated(ENDING[0])
    return prepare(config, objective or Objective(), tokenizer, max_length=None, window=None, seed=0)


def labelled(prompts, each=3):
    return [
        {"prompt": f"question {prompt}", "completion": f"answer {prompt} {number}", "label": number % 2 == 0}
        for number in range(each)
        for prompt in range(prompts)
    ]


@pytest.mark.parametrize("options", [{"fraction": 0.3}, {"fraction": 0.3, "limit": 10}, {"fraction": 0.001}])
def test_all_rows_of_a_prompt_are_held_out_together(tmp_path, options):
    data = prepared(file(tmp_path, labelled(40)), eval=options)
    sides = [{int(split[place]["prompt_key"][0]) for place in range(len(split))} for split in (data.train, data.eval)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
    assert len(data.train) + len(data.eval) == 120 and len(data.eval) % 3 == 0 and len(data.eval) >= 3
    assert len(data.eval) <= options.get("limit", 60)
    example = data.train[0]
    assert example["desirable"].shape == (1,) and not len(example["pairs"]) and data.train.shapes[2].max() == 1


def test_rows_of_one_prompt_cannot_be_held_out(tmp_path):
    path = file(tmp_path, labelled(1))
    with pytest.raises(DataError, match=r"all 3 rows have the same prompt(.|\n)*data\.eval.fraction=0"):
        prepared(path, eval={"fraction": 0.1})
    assert len(prepared(path).train) == 3


def test_the_report_counts_pairs_as_rows_of_the_file(tmp_path):
    values = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(150)]
    values[3]["rejected"], values[9] = "too long " * 400, values[8]
    objective = Objective(max_length=300)
    data = prepared(file(tmp_path, values), objective, format="unpaired")
    (source,) = data.report.sources
    assert (source.rows_read, source.rows_kept) == (150, 150) and "each pair becomes two rows" in source.format
    assert (data.report.train.rows, data.report.train.examples, len(data.train)) == (150, 299, 299)
    assert data.report.train.duplicates == 2 and objective.seen == Balance(150, 150)
    assert any("each pair becomes two rows" in line for line in data.report.lines())


def test_evaluation_rows_that_are_trained_on_are_reported(tmp_path):
    values = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
    train = file(tmp_path, values)
    held = file(
        tmp_path,
        [{"prompt": "q1", "completion": "bad 1", "label": False}, {"prompt": "q9", "completion": "x", "label": True}],
        "h.jsonl",
    )
    config = DataConfig(
        train=[Source(path=train, format="unpaired")], eval=EvalConfig(sets={"held": Source(path=held)}), cache=False
    )
    report = prepare(config, Objective(), templated(ENDING[0]), max_length=None, window=None, seed=0).report
    assert report.duplicates_train_eval == 1


def test_contamination_of_a_held_out_response_is_found(tmp_path):
    words = " ".join(f"w{n}" for n in range(40))
    train = file(
        tmp_path, [{"prompt": f"q{n}", "completion": f"{n} {words if n == 2 else 'x'}", "label": n % 2 == 0} for n in range(6)]
    )
    held = file(tmp_path, [{"prompt": "other", "completion": f"so {words}", "label": False}], "h.jsonl")
    config = DataConfig(train=[Source(path=train)], eval=EvalConfig(sets={"held": Source(path=held)}), cache=False)
    found = prepare(config, Objective(), templated(ENDING[0]), max_length=None, window=None, seed=0).report.contaminated
    assert (found.rows, found.answers) == (1, 1)


# -------------------------------------------------------------------------------------------------------------- balance, lint


def test_advised_weights_bring_the_ratio_into_the_paper_s_interval():
    for counts in (Balance(100, 700), Balance(700, 100)):
        for weights in ((1.0, 1.0), (0.5, 2.0), (3.0, 1.0)):
            advice = counts.advice(*weights)
            ratio = counts.desirable * weights[0] / (counts.undesirable * weights[1])
            if 3 / 4 <= ratio <= 4 / 3:
                assert advice is None
                continue
            name, value = advice.rpartition("kto, ")[2].rstrip("}").split(": ")
            new = dict(zip(("desirable_weight", "undesirable_weight"), weights)) | {name: float(value)}
            good, bad = new["desirable_weight"] * counts.desirable, new["undesirable_weight"] * counts.undesirable
            assert 1 <= good / bad <= 4 / 3 and counts.advice(**new) is None
    assert Balance(10, 10).advice() is Balance(12, 10).advice() is Balance(10, 12).advice() is None


def test_rows_of_one_label_are_an_error_with_a_remedy():
    Balance(1, 1).check()
    Balance(0, 0).check()
    with pytest.raises(DataError, match=r"all 5 training rows are desirable\. KTO needs undesirable rows(.|\n)*objective: sft"):
        Balance(5, 0).check()
    with pytest.raises(DataError, match="all 5 training rows are undesirable") as error:
        Balance(0, 5).check()
    assert "sft" not in str(error.value)


def test_lint_counts_labels_repeats_and_contradictions(tmp_path):
    rows = [
        {"prompt": "q", "completion": "a", "desirable": True},
        {"prompt": "q", "completion": "bbb", "desirable": False},
        {"prompt": "q ", "completion": " a", "desirable": True},
        {"prompt": "q", "completion": "a", "desirable": False},
        {"prompt": "q", "completion": "", "desirable": True},
        {"prompt": "q", "completion": "x", "desirable": "perhaps"},
    ]
    path = file(tmp_path, rows)
    report = lint([Source(path=path)])
    (found,) = report.as_dict()["judged"]
    assert {name: found[name] for name in ("rows", "desirable", "undesirable", "prompts")} == {
        "rows": 4, "desirable": 2, "undesirable": 2, "prompts": 1,
    }  # fmt: skip
    assert found["first"] == {
        "empty": [f"{path}:5"],
        "duplicates": [f"{path}:3 and {path}:1"],
        "contradictions": [f"{path}:4 and {path}:1"],
    }
    assert found["characters_undesirable"] == 2 and [problem.row for problem in report.problems] == [5, 6]
    assert not report.pairs and not report.warnings


def test_lint_warns_of_all_training_files_together(tmp_path):
    good = file(tmp_path, [{"prompt": f"q{n}", "completion": "a", "desirable": True} for n in range(8)], "good.jsonl")
    bad = file(tmp_path, [{"prompt": f"q{n}", "completion": "b", "desirable": False} for n in range(2)], "bad.jsonl")
    (alone,) = lint([Source(path=good)]).warnings
    assert "KTO needs undesirable rows" in alone
    (together,) = lint([Source(path=good), Source(path=bad)]).warnings
    assert "undesirable_weight between 3 and 4" in together and "objective: {type: kto, undesirable_weight: 3.46}" in together
    assert not lint([Source(path=good)], [Source(path=bad)], (Chat, PromptCompletion)).warnings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def test_lint_and_preview_show_judgements(tmp_path, capsys, model):
    path = file(tmp_path, [{"prompt": [Q], "completion": [A], "kto_tag": number == 0} for number in range(5)])
    assert main(["data", "lint", path]) == 0
    out = capsys.readouterr().out
    assert "1 desirable and 4 undesirable rows for 1 prompts" in out and "warning: " in out and "desirable_weight" in out
    assert main(["data", "preview", path, "--model", str(model), "--rows", "2", "--json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    first, second = source["rows"]
    assert first["known"].startswith("desirable; ") and second["known"].startswith("undesirable; ")
    assert [piece["text"] for piece in first["pieces"] if piece["supervised"]] == ["a<|im_end|>"]


def test_lint_and_preview_split_pairs_if_the_format_is_named(tmp_path, capsys, model):
    path = file(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": ""}])
    assert main(["data", "lint", path, "--format", "unpaired", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["judged"][0]["desirable"] == found["judged"][0]["undesirable"] == found["judged"][0]["empty"] == 1
    assert not found["pairs"] and "two rows" in found["files"][0]["format"]
    assert main(["data", "preview", path, "--format", "unpaired", "--model", str(model), "--json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert [row["known"].split(";")[0] for row in source["rows"]] == ["desirable", "undesirable"]


def test_a_prompt_key_ignores_the_spaces_that_templates_strip():
    assert prompt_key(Judged((Q,), (A,), True)) == prompt_key(Judged(({"content": "q ", "role": "user"},), "x", False))
    assert prompt_key(Judged((Q,), (A,), True)) != prompt_key(Judged("q", "a", True)) != prompt_key(Judged("p", "a", True))
    assert 0 <= prompt_key(Judged("q", "a", True)) < 1 << 63
