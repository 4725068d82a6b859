"""What is suggested for files whose columns or rows do not suit the objective."""

import json

import pytest

from tunesmith import objectives
from tunesmith.data.data_config import Source
from tunesmith.data.encode.labels import unknown_label
from tunesmith.data.formats.column_advice import ADVICE
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import RowProblem
from tunesmith.data.rows import ROW_TYPES, Chat, Judged, PromptCompletion, Ranking, Text
from tunesmith.errors import DataError

WRITTEN = (Chat, PromptCompletion, Text)
Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
TALK, OTHER = "\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b"


def opened(tmp_path, rows, accepted=WRITTEN, **keys):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return open_source(Source(path=str(path), **keys), accepted)


def read(tmp_path, rows, accepted=WRITTEN, **keys):
    found = opened(tmp_path, rows, accepted, **keys).rows()
    return [item if isinstance(item, RowProblem) else item[1] for item in found]


def refused(tmp_path, rows, accepted=WRITTEN, **keys):
    with pytest.raises(DataError) as error:
        opened(tmp_path, rows, accepted, **keys)
    return str(error.value)


def test_every_row_type_names_the_objectives_that_learn_from_it():
    for row in ROW_TYPES:
        for name in ADVICE[row].removeprefix("objective: ").split(" or "):
            assert row in objectives.module(name).Objective.traits.rows


PAIRS = [
    ({"chosen": TALK, "rejected": OTHER}, {"messages": "chosen"}),
    ({"chosen": [Q, A], "rejected": [Q, B]}, {"messages": "chosen"}),
    ({"prompt": "q", "chosen": [A], "rejected": [B]}, {"prompt": "prompt", "completion": "chosen"}),
    ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, {"prompt": "prompt", "completion": "chosen"}),
    ({"prompt": "q", "chosen": json.dumps([Q, A]), "rejected": "[]"}, {"prompt": "prompt", "completion": "chosen"}),
    ({"prompt": [Q], "chosen": "a", "rejected": "b"}, {"prompt": "prompt", "completion": "chosen"}),
    ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": TALK, "rejected": OTHER}, {"prompt": "prompt", "completion": "chosen"}),
    ({"instruction": "q", "chosen": "a", "rejected": "b"}, {"instruction": "instruction", "output": "chosen"}),
]


@pytest.mark.parametrize(("row", "mapping"), PAIRS)
def test_pairs_given_to_sft_name_the_objectives_of_pairs_and_a_mapping_that_works(tmp_path, row, mapping):
    message = refused(tmp_path, [row])
    typed = ", ".join(f"{name}: {column}" for name, column in mapping.items())
    assert "set objective: dpo or reward." in message and f"columns: {{{typed}}}" in message
    assert ": rejected" not in message and "=rejected" not in message
    assert read(tmp_path, [row], columns=mapping) == [Chat((Q, A))]


def test_conversations_whose_answers_are_in_other_columns_are_pairs(tmp_path):
    """Without the advice, only the turns before the question would be supervised."""
    rows = [{"messages": [Q, A, Q], "chosen": A, "rejected": B}, {"messages": [Q], "chosen": A, "rejected": B}]
    message = refused(tmp_path, rows)
    assert "set objective: dpo or reward." in message and "columns: {prompt: messages, completion: chosen}" in message
    assert read(tmp_path, rows, columns={"prompt": "messages", "completion": "chosen"}) == [Chat((Q, A, Q, A)), Chat((Q, A))]
    assert read(tmp_path, [{"messages": [Q, A], "chosen": A, "rejected": B}]) == [Chat((Q, A))]


def test_a_conversation_and_its_chosen_answer_are_mapped(tmp_path):
    mapping = {"prompt": "conversations", "completion": "chosen"}
    assert read(tmp_path, [{"conversations": [Q], "chosen": A, "rejected": B}], columns=mapping) == [Chat((Q, A))]


def test_three_plain_texts_stay_plain_texts(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    mapping = {"prompt": "prompt", "completion": "chosen"}
    assert read(tmp_path, [row], columns=mapping) == [PromptCompletion("q", "a")]


def test_a_prompt_that_its_conversation_lacks_is_refused(tmp_path):
    (problem,) = read(tmp_path, [{"prompt": "z", "completion": TALK}])
    assert problem.field == "prompt" and "columns: {messages: COLUMN}" in problem.fix


ANSWERED = [
    {"messages": [Q, A], "rejected_response": "b"},
    {"messages": [Q, A], "rejected": [B]},
    {"messages": [Q, A], "rejected_messages": [Q, B]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "rejected_response": "b"},
]


@pytest.mark.parametrize("row", ANSWERED)
def test_a_rejected_answer_next_to_a_conversation_is_a_pair(tmp_path, row):
    assert read(tmp_path, [row], (Ranking,)) == [Ranking((Q,), ((A,), (B,)), (0, 1))]
    assert read(tmp_path, [row]) == [Chat((Q, A))]  # sft trains on the good answer


def test_a_mapping_to_messages_is_a_conversation_also_next_to_a_rejected_column(tmp_path):
    """So that lint and preview of a file show what sft reads with the same --column."""
    rows = [{"chosen": TALK, "rejected": OTHER}]
    assert read(tmp_path, rows, ROW_TYPES, columns={"messages": "chosen"}) == [Chat((Q, A))]
    assert isinstance(read(tmp_path, [ANSWERED[0]], ROW_TYPES)[0], Ranking)


def test_a_rejected_text_takes_the_place_of_the_last_turn(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    result = {"role": "tool", "content": "1"}
    (row,) = read(tmp_path, [{"messages": [Q, call, result, A], "rejected_response": "b"}], (Ranking,))
    assert [turn["role"] for turn in row.prompt] == ["user", "assistant", "tool"] and row.answers == ((A,), (B,))


@pytest.mark.parametrize("messages", [[Q], [A]])
def test_a_rejected_answer_alone_is_refused(tmp_path, messages):
    (problem,) = read(tmp_path, [{"messages": messages, "rejected_response": "b"}], (Ranking,))
    assert problem.field == "messages" and "the chosen answer" in problem.expected


JUDGED = [
    [{"messages": [Q, A], "label": True}, {"messages": [Q, B], "label": False}],
    [{"prompt": "q", "completion": "a", "label": "True"}, {"prompt": "q", "completion": "b", "label": "False"}],
    [{"instruction": "q", "output": "a", "kto_tag": "true"}, {"instruction": "q", "output": "b", "kto_tag": "false"}],
]


@pytest.mark.parametrize("rows", JUDGED)
def test_answers_judged_bad_are_never_trained_on(tmp_path, rows):
    column = list(rows[0])[-1]
    message = refused(tmp_path, rows)
    assert (
        f"the column '{column}' says" in message
        and "set objective: kto" in message
        and f"columns: {{keep_if: {column}}}" in message
    )
    source = opened(tmp_path, rows, columns={"keep_if": column.upper()})
    assert f"only rows whose {column.upper()!r} is true" in source.description
    assert [record.row for record, _ in source.rows()] == [1]
    assert [row.desirable for row in read(tmp_path, rows, ROW_TYPES)] == [True, False]  # lint and preview of the file


def test_the_description_names_the_better_answers(tmp_path):
    mapped = opened(
        tmp_path, [{"q": "q", "good": "a", "bad": "b"}], (Ranking,), columns={"prompt": "q", "chosen": "good", "rejected": "bad"}
    )
    ranked = [{"prompt": "q", "answers": ["a", "b"], "scores": [1, 2]}, {"prompt": "q", "answers": ["a", "b"]}]
    described = [opened(tmp_path, [row], (Ranking,)).description for row in (ANSWERED[0], *ranked)]
    described += [mapped.description, opened(tmp_path, JUDGED[0], (Judged,)).description]
    ends = [
        "the last answer of messages is better than rejected_response",
        "the answer with the highest of scores is the best",
        "the first answer is the best, unless the answers have ranks or scores",
        "good is better than bad",
        "answers are good where label is true (1, yes, good), else bad",
    ]
    assert all(text.endswith(end) for text, end in zip(described, ends, strict=True)), described


@pytest.mark.parametrize(
    ("column", "values"), [("rating", (1, 4)), ("label", (0, 1)), ("label", ("0", "1")), ("label", ("good", "topic"))]
)
def test_a_rating_and_a_class_are_no_judgement(tmp_path, column, values):
    rows = [{"prompt": "q", "completion": "a", column: value} for value in values]
    assert len(read(tmp_path, rows)) == 2


def test_keep_if_names_a_missing_column_and_other_values(tmp_path):
    row = {"messages": [Q, A], "label": "perhaps"}
    (missing,), (odd,) = (read(tmp_path, [row], columns={"keep_if": column}) for column in ("lable", "label"))
    assert "the column 'lable'" in str(missing) and "true or false" in str(odd) and "'perhaps'" in str(odd)
    assert not isinstance(read(tmp_path, [row], (Judged, *WRITTEN))[0], Judged)
    with pytest.raises(ValueError, match="keep_if takes one column"):
        opened(tmp_path, [row], columns={"keep_if": ["label"]})


@pytest.mark.parametrize(("name", "said"), [("7", ""), ("positve", "Did you mean `positive`? ")])
def test_a_class_id_is_no_typo_of_another(name, said):
    expected, got, fix = unknown_label(name, ["0", "2", "19", "positive"])
    assert fix.startswith(f"{said}Correct it") and got == repr(name) and "0, 2, 19" in expected
