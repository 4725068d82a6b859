"""Values of records: nested fields, line ends, numbers as text, lists in cells, keys that occur twice."""

import json
import unicodedata

import pytest

from tunesmith.data.data_config import Source
from tunesmith.data.read.row_files import read
from tunesmith.data.read.source import eval_sources, open_source
from tunesmith.data.row_problems import RowProblem, bad_rows_error, describe_causes
from tunesmith.data.rows import ROW_TYPES, Chat, Labelled, Question, Tagged
from tunesmith.errors import DataError

SCORES = [
    {"sentence1": "a", "sentence2": "b", "labels": {"label": 4.5, "binary-label": 1}},
    {"sentence1": "c", "sentence2": "d", "labels": {"label": 0, "binary-label": 0}},
]


@pytest.fixture
def rows(tmp_path):
    def of(content, accepted, name="a.jsonl", gold=True, **keys):
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        items = open_source(Source(path=str(tmp_path / name), **keys), accepted, gold).rows()
        return [item if isinstance(item, RowProblem) else item[1] for item in items]

    return of


@pytest.mark.parametrize("accepted", [(Labelled,), ROW_TYPES])
def test_an_object_of_scores_is_no_list_of_labels(rows, accepted):
    with pytest.raises(DataError, match=r"scores, such as label: 4.5.*columns: \{label: labels.label\}"):
        rows(SCORES, accepted)


@pytest.mark.parametrize("field", ["label", "score"])
def test_a_dotted_column_reaches_a_nested_field(rows, field):
    expected = [Labelled("a", "b", label=4.5), Labelled("c", "d", label=0)]
    assert rows(SCORES, (Labelled,), columns={field: "labels.label"}) == expected
    table = "sentence1,sentence2,labels\n" + "".join(
        f'{row["sentence1"]},{row["sentence2"]},"{json.dumps(row["labels"]).replace(chr(34), chr(34) * 2)}"\n' for row in SCORES
    )
    assert rows(table, (Labelled,), "a.csv", columns={field: "labels.label"}) == expected
    turns = [{"turns": [{"text": "Hi"}, {"text": "Hello"}], "note": {"n": 1}}]
    for keys in (
        {"columns": {"prompt": "turns.0.text", "completion": "turns.1.text"}},
        {"columns": {"output": "turns.1.text"}, "prompt_template": "{turns.0.text}"},
    ):
        (row,) = rows(turns, ROW_TYPES, **keys)
        assert (
            row.written()
            if hasattr(row, "written")
            else [part for part in ("Hi", "Hello") if part in str(row)] == ["Hi", "Hello"]
        )


def test_a_column_whose_name_has_a_dot_comes_first_and_a_missing_field_is_named(rows):
    assert rows([{"text": "a", "x.y": "p", "x": {"y": "q"}}], (Labelled,), columns={"label": "x.y"}) == [Labelled("a", label="p")]
    first, second = rows([{"text": "a", "x": {"y": "q"}}, {"text": "b", "x": {"z": "q"}}], (Labelled,), columns={"label": "x.y"})
    assert first.label == "q" and second.field == "x.y" and second.row == 2


def test_line_ends_of_any_text_become_line_feeds(rows):
    row = {"messages": [{"role": "user", "content": "a\r\nb"}, {"role": "assistant", "content": "c\r\nd\re"}]}
    (chat,) = rows([row], (Chat,))
    assert [turn["content"] for turn in chat.messages] == ["a\nb", "c\nd\re"]
    (chat,) = rows('dialogue,summary\r\n"one\r\ntwo",three\r\n', (Chat,), "a.csv")
    assert [turn["content"] for turn in chat.messages] == ["one\ntwo", "three"]
    assert rows([{"text": "a\r\nb c", "tags": ["O", "O", "O"]}], (Tagged,))[0].words == ((0, 1), (2, 3), (4, 5))
    answers = {"text": ["two", "two\r\nthree"], "answer_start": [5, 5]}
    (question,) = rows([{"question": "q", "context": "one\r\ntwo\r\nthree", "answers": answers}], (Question,))
    assert question.context == "one\ntwo\nthree" and question.answers == (("two", 4), ("two\nthree", 4))


def test_numbers_are_text_where_the_recipe_asks_for_it(rows):
    given = [{"text": 42, "label": 1}, {"text": 1.5, "label": 0}]
    assert all("numbers_as_text" in problem.fix for problem in rows(given, (Labelled,)))
    assert rows(given, (Labelled,), numbers_as_text=True) == [Labelled("42", label=1), Labelled("1.5", label=0)]
    turns = [{"role": "user", "content": 5}, {"role": "assistant", "content": "six"}]
    assert rows([{"messages": turns}], (Chat,), numbers_as_text=True)[0].messages[0]["content"] == "5"
    assert rows([{"tokens": ["a", 1], "tags": ["O", "O"]}], (Tagged,), numbers_as_text=True)[0].text == "a 1"
    (flag,) = rows([{"text": True, "label": 1}], (Labelled,), numbers_as_text=True)
    assert isinstance(flag, RowProblem)
    from tunesmith.data.data_config import DataConfig, EvalConfig

    config = DataConfig(train=[Source(path="a", numbers_as_text=True)], eval=EvalConfig(path="b"))
    assert eval_sources(config)[""].numbers_as_text


PYTHON = [
    ("text,labels\na,\"['x', 'y']\"\n", Labelled, Labelled("a", labels=("x", "y"))),
    ("tokens,tags\n\"['Kim', 'left']\",\"['B-P', 'O']\"\n", Tagged, Tagged("Kim left", ((0, 3), (4, 8)), ("B-P", "O"))),
    ("question,context,answers\nwho?,by Mina,\"['Mina']\"\n", Question, Question("who?", "by Mina", (("Mina", 3),))),
    ("question,context,answers\nwho?,by Mina,\"{'text': ['Mina'], 'answer_start': [3]}\"\n", Question, Question("who?", "by Mina", (("Mina", 3),))),
]  # fmt: skip


@pytest.mark.parametrize(("content", "kind", "row"), PYTHON)
def test_lists_that_python_wrote_into_cells_are_read_where_lists_are_wanted(rows, content, kind, row):
    assert rows(content, (kind,), "a.csv") == [row]


@pytest.mark.parametrize("cell", ["['x' 'y']", "['x'\n 'y']", "[__import__('os')]", "[" * 5000, "['x', "])
def test_other_text_in_brackets_is_a_bad_row(rows, cell):
    good, bad = rows(f'text,labels\na,"[\'x\']"\nb,"{cell}"\n', (Labelled,), "a.csv")
    assert good.labels == ("x",) and bad.field == "labels" and bad.row == 2


def test_an_answer_without_a_start_must_occur_once(rows):
    first, second = rows([{"question": "q", "context": "a b a", "answers": [given]} for given in ("a", "c")], (Question,))
    assert "begins at 0, 4" in first.got and "does not contain" in second.got


TWICE = '{"text": "a", "label": "x", "label": "y"}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f'{TWICE}\n{{"text": "b"}}\n'),
        ("a.json", f'[{TWICE},\n{{"text": "b"}}]'),
        ("a.jsonl", f'{{"rows": [{{"a": {TWICE}}}]}}\n{{"text": "b"}}\n'),
    ],
)
def test_a_key_that_a_row_has_twice_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    problem, good = read(str(tmp_path / name))
    assert "'label' twice" in problem.got and problem.row == 1 and good.value == {"text": "b"}


def test_a_key_twice_in_a_nested_squad_file_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text(
        '{"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "q", "question": "r"}]}]}]}'
    )
    (problem,) = read(str(tmp_path / "a.json"))
    assert "'question' twice" in problem.got


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_korean_columns_are_known(rows, form):
    for names, count in (({"질문": "a", "답변": "b"}, 2), ({"지시": "a", "출력": "b"}, 2), ({"본문": "a", "요약": "b"}, 2)):
        (chat,) = rows([{unicodedata.normalize(form, name): value for name, value in names.items()}], (Chat,))
        assert [turn["content"] for turn in chat.messages] == ["a", "b"] and len(chat.messages) == count


def test_one_cause_is_one_message_with_its_rows():
    def problem(row, got, field="labels[0]", expected="a list of 3 labels"):
        return RowProblem("a.csv", row, field, expected, got, "Write it.", row + 1)

    many = [problem(row, f"'x{row}'", f"labels[{row}]", f"a list of {row} labels") for row in range(1, 9)]
    first, second = describe_causes([*many, problem(9, "'x'", "text")])
    assert first == f"{many[0]} The same in 7 more rows: 2, 3, 4, 5, 6, ..." and second == str(problem(9, "'x'", "text"))
    assert describe_causes(many[:2])[0].endswith("The same in 1 more row: 2.")
    message = str(bad_rows_error(many, 30, "Look."))
    assert message.startswith("30 bad rows:\n  a.csv:1:") and message.count("expected") == 1 and "... and 22 more" in message
