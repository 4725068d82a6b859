"""Rows of classification, tagging and question answering: the ways that files write them, and the errors."""

from __future__ import annotations

import json

import pytest

from tests.tiny import save_tiny
from tunesmith.cli.main import main
from tunesmith.data.data_config import DataConfig, EvalConfig, Source
from tunesmith.data.read import json_rows
from tunesmith.data.read.source import eval_sources, open_source
from tunesmith.data.row_problems import RowProblem
from tunesmith.data.rows import Chat, Labelled, Question, Ranking, Tagged, Text
from tunesmith.data.store.encode_source import content_hash
from tunesmith.errors import DataError

CONTEXT = "Kim met Lee. Lee left."


def opened(path, accepted, gold=True, **keys):
    return [
        item if isinstance(item, RowProblem) else item[1]
        for item in open_source(Source(path=str(path), **keys), (accepted,), gold).rows()
    ]


@pytest.fixture
def read(tmp_path):
    """A function that returns the rows of a file with this content."""

    def of(content, accepted, name="a.jsonl", **keys):
        path = tmp_path / name
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text, encoding="utf-8", newline="")
        return opened(path, accepted, **keys)

    return of


LABELS = [
    ({"text": "t", "label": "pos"}, Labelled("t", label="pos")),
    ({"sentence": "t", "category": " x "}, Labelled("t", label="x")),
    ({"premise": "t", "hypothesis": "u", "label": 2}, Labelled("t", "u", label=2)),
    ({"sentence1": "t", "sentence2": "u", "score": 0.5}, Labelled("t", "u", label=0.5)),
    ({"text": "t", "label": True}, Labelled("t", label="true")),
    ({"text": "t", "labels": ["a", "b", "a"]}, Labelled("t", labels=("a", "b"))),
    ({"text": "t", "labels": []}, Labelled("t", labels=())),
    ({"text": "t", "labels": '["a"]'}, Labelled("t", labels=("a",))),
    ({"text": "t", "labels": {"a": 1, "b": 0, "c": True}}, Labelled("t", labels=("a", "c"))),
    ({"text": "t", "labels": [27, 3]}, Labelled("t", labels=("27", "3"))),
    ({"text": "t", "labels": [0]}, Labelled("t", labels=("0",))),
    ({"text": "t", "labels": [0, 1, 1]}, Labelled("t", labels=("1", "2"))),
]


@pytest.mark.parametrize(("value", "row"), LABELS)
def test_labels(read, value, row):
    assert read([value], Labelled) == [row]


def test_lists_of_zero_and_one_of_different_length_are_label_numbers(read):
    rows = read([{"text": "t", "labels": [0, 1]}, {"text": "u", "labels": [1]}], Labelled)
    assert [row.labels for row in rows] == [("0", "1"), ("1",)]
    rows = read([{"text": "t", "labels": given} for given in ([0, 1], [1, 0], [0, 1], [])], Labelled)
    assert [row.labels for row in rows] == [("0", "1"), ("1", "0"), ("0", "1"), ()]


def test_a_list_that_has_a_number_twice_is_bad(read):
    first, problem = read([{"text": "t", "labels": [27, 3]}, {"text": "u", "labels": [1, 0, 1]}], Labelled)
    assert first.labels == ("27", "3") and (problem.row, problem.field) == (2, "labels") and "each once" in problem.expected


SEVERAL = {"labels": ["Toxic", "insult"]}


def test_a_column_of_zero_and_one_for_each_label(read):
    rows = read("comment,id,toxic,insult,threat\na,1,1,0,1\nb,2,0,0,1\n", Labelled, "a.csv", columns=SEVERAL)
    assert rows == [
        Labelled("a", labels=("Toxic",), known=("Toxic", "insult")),
        Labelled("b", labels=(), known=("Toxic", "insult")),
    ]


def test_a_bad_mark_is_named_by_its_column(read):
    (problem,) = read("comment,toxic,insult\na,0,-1\n", Labelled, "a.csv", columns=SEVERAL)
    assert (problem.row, problem.field, problem.expected) == (1, "insult", "0 or 1")


def test_a_row_that_lacks_one_of_the_columns_is_bad(read):
    rows = [{"text": "a", "toxic": 0, "insult": 1}, {"text": "b", "toxic": 1}]
    first, problem = read(rows, Labelled, columns=SEVERAL)
    assert first.labels == ("insult",) and (problem.row, problem.field) == (2, "insult")


def test_a_separator_is_named(read):
    content = "text,labels\nt,a|b\nu,\n"
    assert read(content, Labelled, "a.csv", separator="|") == [Labelled("t", labels=("a", "b")), Labelled("u", labels=())]
    (problem, _) = read(content, Labelled, "a.csv")
    assert (problem.row, problem.field) == (1, "labels") and "separator" in problem.fix
    with pytest.raises(DataError, match="separator does nothing"):
        read("text,label\nt,a\n", Labelled, "a.csv", separator="|")


def test_numbers_of_a_csv_stay_text_and_columns_are_mapped(read):
    assert read("Q,A,label\nq,a,01\n", Labelled, "a.csv", columns={"text": "Q"}) == [Labelled("q", label="01")]


WORDS = Tagged("Kim met Lee", ((0, 3), (4, 7), (8, 11)), ("B-P", "O", "B-P"))
TAGS = [
    ({"tokens": ["Kim", "met", "Lee"], "ner_tags": ["B-P", "O", "B-P"]}, WORDS),
    ({"words": "Kim met Lee", "tags": "B-P O B-P"}, WORDS),
    ({"tokens": '["Kim", "met", "Lee"]', "tags": '["B-P", "O", "B-P"]'}, WORDS),
    ({"text": "Kim  met Lee", "tags": "B-P O B-P"}, Tagged("Kim  met Lee", ((0, 3), (5, 8), (9, 12)), WORDS.tags)),
]


@pytest.mark.parametrize(("value", "row"), TAGS)
def test_tags(read, value, row):
    assert read([value], Tagged) == [row]


CONLL = "-DOCSTART-\t-X-\n\n# text = Kim\nKim\tB-P\nmet\tO\n\t\n  \nLee\tB-P\n\n\n#\tO\n# a\tO"


def test_conll(tmp_path, read):
    rows = read(CONLL, Tagged, "a.conll")
    assert [(row.text, row.tags) for row in rows] == [("Kim met", ("B-P", "O")), ("Lee", ("B-P",)), ("# # a", ("O", "O"))]
    items = open_source(Source(path=str(tmp_path / "a.conll")), (Tagged,)).rows()
    assert [(record.row, record.line) for record, _ in items] == [(1, 4), (2, 8), (3, 11)]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("## id-0\tKim <left:X> now\nKim\tB-P\nleft\tO\n\n## id-1\tLee\nLee\tB-P\n", ["Kim left", "Lee"]),
        ("# text = Kim\tand Lee\n# id\nKim\tB-P\n\n#\tO\n##\tO\n", ["Kim", "# ##"]),
        ("# a comment\nKim B-P\nleft O\n\n## id-1 of the set\nLee B-P\n\n# O\nx O\n", ["Kim left", "Lee", "# x"]),
    ],
)
def test_comments_of_conll_are_never_words_or_tags(read, content, texts):
    rows = read(content, Tagged, "a.conll")
    assert [row.text for row in rows] == texts and {tag for row in rows for tag in row.tags} <= {"B-P", "O"}


def test_conll_by_spaces_with_several_columns_in_a_file_of_any_name(read):
    content = "# SYM B-NP O\nKim  NNP B-NP B-P\n\nLee NNP I-NP B-P\n"
    assert [row.tags for row in read(content, Tagged, "a.txt", format="conll")] == [("O", "B-P"), ("B-P",)]
    assert [row.tags for row in read(content, Tagged, "a.txt", format="conll", columns={"tags": 2})] == [("SYM", "NNP"), ("NNP",)]
    assert read(content, Tagged, "a.txt", format="conll")[0].text == "# Kim"


def test_comments_between_sentences_are_no_sentence(read):
    assert [row.text for row in read("Kim\tB-P\n\n# newdoc\n\nLee\tB-P\n", Tagged, "a.conll")] == ["Kim", "Lee"]


def test_an_evaluation_file_has_the_separator_of_the_training_file():
    config = DataConfig(train=[Source(path="a.csv", separator="|")], eval=EvalConfig(path="b.csv"))
    assert eval_sources(config)[""].separator == "|"


def test_characters_are_joined_without_spaces(read):
    rows = read("나\tB\n는\tO\n \tO\n너\tB\n\n안\tO\n녕\tO\n", Tagged, "a.conll")
    assert rows[0] == Tagged("나는 너", ((0, 1), (1, 2), (2, 3), (3, 4)), ("B", "O", "O", "B"))
    assert rows[1].text == "안녕"
    assert read("I\tO\nam\tO\n\u00a0\tO\nKim\tO\n", Tagged, "b.conll")[0].text == "I am \u00a0 Kim"


ANSWERS = [
    ({"text": ["Kim", "Lee"], "answer_start": [0, 8]}, (("Kim", 0), ("Lee", 8))),
    ([{"text": "Lee", "answer_start": 13}], (("Lee", 13),)),
    ('[{"text": "Lee", "answer_start": 13}]', (("Lee", 13),)),
    ({"text": "Kim", "answer_start": 0}, (("Kim", 0),)),
    ({"text": [], "answer_start": []}, ()),
]


@pytest.mark.parametrize(("answers", "expected"), ANSWERS)
def test_answers(read, answers, expected):
    value = {"id": 7, "question": "Who?", "context": CONTEXT, "answers": answers}
    assert read([value], Question) == [Question("Who?", CONTEXT, expected, "7")]


def article(*asked, context=CONTEXT):
    return {"title": 'a "b" c', "paragraphs": [{"context": context, "qas": list(asked)}]}


def test_the_nested_files_of_squad(read, monkeypatch):
    monkeypatch.setattr(json_rows, "CHUNK", 200)
    kim = {"id": "1", "question": "Who?", "answers": [{"text": "Kim", "answer_start": 0}]}
    none = {"id": "2", "question": "Why?", "is_impossible": True, "plausible_answers": [{"text": "x", "answer_start": 0}]}
    file = {"version": "v2.0", "data": [article(kim, none), {"title": "x"}, article({"question": "Who?"}, kim)]}
    for indent in (None, 2):
        rows = read(json.dumps(file, indent=indent), Question, "a.json")
        assert rows[:2] == [Question("Who?", CONTEXT, (("Kim", 0),), "1"), Question("Why?", CONTEXT, (), "2")]
        assert [(row.row, row.field) for row in rows[2:4]] == [(3, "data[1].paragraphs"), (4, "answers")] and rows[4] == rows[0]


def test_a_truncated_nested_file_is_a_fatal_problem(read):
    text = json.dumps({"data": [article({"question": "Who?", "answers": []}), article()]})
    first, problem = read(text[:-40], Question, "a.json")
    assert first.answers == () and problem.fatal and problem.row == 2


def test_flat_rows_with_a_column_data_are_no_squad_file(read):
    assert read([{"data": [{"text": "x"}], "text": "t"}] * 2, Text, "a.json") == [Text("t")] * 2


@pytest.fixture
def reviews(tmp_path):
    for place, text in (("pos/b.txt", "good\n"), ("pos/a.txt", "fine\nthen"), ("neg/c.txt", "bad"), ("neg/d.md", "no")):
        file = tmp_path / "reviews" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "reviews"


def test_a_class_folder_has_a_row_for_each_file(reviews):
    rows = opened(reviews, Labelled)
    assert rows == [Labelled("bad", label="neg"), Labelled("fine\nthen", label="pos"), Labelled("good", label="pos")]
    assert opened(reviews, Text)[0] == Text("bad")
    (reviews / "pos" / "b.txt").write_text("")
    assert str(opened(reviews, Labelled)[2]).startswith(f"{reviews}/pos/b.txt:3:text: expected text, got empty text")


def test_the_hash_of_a_class_folder_covers_names_classes_and_contents(reviews):
    source = Source(path=str(reviews))
    seen = {content_hash(source)}
    (reviews / "neg" / "d.md").write_text("left alone")
    assert content_hash(source) in seen
    for change in (
        lambda: (reviews / "pos" / "b.txt").write_text("better"),
        lambda: (reviews / "pos" / "b.txt").rename(reviews / "pos" / "z.txt"),
        lambda: (reviews / "neg").rename(reviews / "bad"),
        lambda: (reviews / "pos" / "new.txt").write_text(""),
    ):
        change()
        seen.add(content_hash(source))
    assert len(seen) == 5


def test_another_folder_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match=r"folder of \.txt files for each class"):
        opened(tmp_path, Labelled)


GOOD = {
    Labelled: {"text": "t", "label": "a"},
    Tagged: {"tokens": ["a"], "ner_tags": ["O"]},
    Question: {"question": "q", "context": CONTEXT, "answers": []},
}
BAD = [
    (Labelled, {"text": "t"}, "label", "column"),
    (Labelled, {"text": "t", "label": None}, "label", "null"),
    (Labelled, {"text": "t", "label": " "}, "label", "only spaces"),
    (Labelled, {"text": "t", "label": ["a"]}, "label", "columns: {labels"),
    (Labelled, {"text": "", "label": "a"}, "text", "empty"),
    (Labelled, {"text": "t", "label": float("nan")}, "label", "nan"),
    (Labelled, {"text": "t", "label": 1}, "label", "a name, as in the rows before"),
    (Tagged, {"tokens": ["a"]}, "ner_tags", "column"),
    (Tagged, {"tokens": ["a"], "ner_tags": None}, "ner_tags", "null"),
    (Tagged, {"tokens": ["a", "b"], "ner_tags": ["O"]}, "ner_tags", "1 for 2 words"),
    (Tagged, {"tokens": ["a", "b"], "ner_tags": ["O", None]}, "ner_tags[1]", "null"),
    (Tagged, {"tokens": ["a"], "ner_tags": [0]}, "ner_tags[0]", "Write the names"),
    (Tagged, {"tokens": ["a", ""], "ner_tags": ["O", "O"]}, "tokens[1]", "empty"),
    (Tagged, {"tokens": [], "ner_tags": []}, "tokens", "empty list"),
    (Question, {"question": "q", "context": CONTEXT}, "answers", "column"),
    (Question, {"question": "q", "context": CONTEXT, "answers": None}, "answers", "null"),
    (Question, {"question": "q", "context": " ", "answers": []}, "context", "only spaces"),
    (Question, {**GOOD[Question], "answers": [{"text": "Lee", "answer_start": 7}]}, "answers[0].answer_start", "It begins at 8, 13:"),
    (Question, {**GOOD[Question], "answers": [{"text": "Park", "answer_start": 0}]}, "answers[0].answer_start", "does not contain it"),
    (Question, {**GOOD[Question], "answers": [{"text": "left.", "answer_start": -5}]}, "answers[0].answer_start", "outside"),
    (Question, {**GOOD[Question], "answers": [{"text": "Kim", "answer_start": True}]}, "answers[0].answer_start", "whole number"),
    (Question, {**GOOD[Question], "answers": {"text": ["a", "b"], "answer_start": [0]}}, "answers", "lists of the same length"),
    (Question, {**GOOD[Question], "is_impossible": False}, "answers", "is_impossible is false"),
    (
        Question,
        {**GOOD[Question], "answers": [{"text": "Kim", "answer_start": 0}], "is_impossible": True},
        "answers",
        "plausible_answers",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "field", "said"), BAD)
def test_bad_rows_are_named(read, kind, value, field, said):
    good, problem = read([GOOD[kind], value], kind)
    assert isinstance(good, kind) and (problem.row, problem.line, problem.field) == (2, 2, field) and said in str(problem)


@pytest.mark.parametrize("labels", [["a", 1], [None], [1.5], "a, b", None, 3, [" "]])
def test_bad_lists_of_labels(read, labels):
    _, problem = read([{"text": "t", "labels": ["a"]}, {"text": "t", "labels": labels}], Labelled)
    assert isinstance(problem, RowProblem) and problem.field.startswith("labels")


def test_a_vector_of_another_length_is_bad(read):
    *_, problem = read([{"text": "t", "labels": [0, 1]}] * 100 + [{"text": "t", "labels": [1, 0, 1]}], Labelled)
    assert problem.row == 101 and "2 numbers 0 or 1" in problem.expected


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("odd", [[0, 1, 0, 0, 0], None, ["a"], [0, 7, 0, 0, 0, 0], 3, "x"])
def test_a_row_that_is_no_vector_among_vectors_is_bad_at_any_position(read, size, odd):
    given = [[int(n % size == place) for place in range(size)] for n in range(8)]
    for at in (0, 3):
        rows = read([{"text": "t", "labels": one} for one in (*given[:at], odd, *given[at:])], Labelled)
        problem = rows.pop(at)
        assert isinstance(problem, RowProblem) and problem.row == at + 1 and problem.field.startswith("labels")
        assert [row.labels for row in rows] == [(str(n % size),) for n in range(8)]


@pytest.mark.parametrize(
    ("content", "said"), [("a\tO\nb\n", "2 columns"), ("a\tO\n\tO\n", "a word"), ("a\tO\nb\t\n", "a tag in column 2")]
)
def test_bad_lines_of_conll(read, content, said):
    good, problem = read(f"x\tO\n\n{content}", Tagged, "a.conll")
    assert good.text == "x" and (problem.row, problem.line) == (2, 4) and said in problem.expected


BLIND = [
    (Labelled, "a.txt", "one two\n", Labelled("one two")),
    (Labelled, "a.csv", "text,label\nt,\n", Labelled("t")),
    (Labelled, "a.csv", "text,label\nt,x\n", Labelled("t")),
    (Labelled, "a.jsonl", '{"text": "t", "labels": ["a", 3]}\n', Labelled("t")),
    (Tagged, "a.txt", "one  two\n", Tagged("one  two", ((0, 3), (5, 8)))),
    (Tagged, "a.jsonl", '{"tokens": ["a", "b"], "ner_tags": null}\n', Tagged("a b", ((0, 1), (2, 3)))),
    (Tagged, "a.conll", "one\ntwo\n", Tagged("one two", ((0, 3), (4, 7)))),
    (Question, "a.jsonl", json.dumps({"question": "q", "context": "c"}), Question("q", "c")),
    (Question, "a.json", json.dumps({"data": [article({"question": "q"}, context="c")]}), Question("q", "c")),
]


@pytest.mark.parametrize(("kind", "name", "content", "row"), BLIND)
def test_rows_to_predict_may_lack_their_gold(read, kind, name, content, row):
    assert read(content, kind, name, gold=False) == [row]


@pytest.mark.parametrize(
    ("kind", "row", "mapped", "typed"),
    [
        (Labelled, {"question": "q", "answer": "a"}, "text: COLUMN, label: COLUMN", "set objective: sft."),
        (
            Labelled,
            {"body": "q", "mood_label": "a"},
            "text: body, label: mood_label",
            "--column text=body --column label=mood_label",
        ),
        (Tagged, {"text": "q", "my tags": "O"}, "tags: my tags", "--column 'tags=my tags'"),
        (Question, {"question": "q", "answer": "a"}, "context: COLUMN, answers: COLUMN", "--column context=COLUMN"),
        (Labelled, {"text": "q", "anger": 1, "joy": 0}, "label: COLUMN", "{labels: [anger, joy]}"),
        (
            Ranking,
            {"input": "q", "accepted": "a", "rejected": "b"},
            "prompt: input, chosen: accepted",
            "--column chosen=accepted",
        ),
        (Ranking, {"question": "q", "winner": "a", "loser": "b"}, "chosen: winner, rejected: loser", "--column rejected=loser"),
        (Ranking, {"a": "q", "b": "a", "c": "b"}, "prompt: COLUMN, chosen: COLUMN, rejected: COLUMN", "no format fits"),
        (Ranking, {"text": "q", "label": "a"}, "chosen: COLUMN, rejected: COLUMN", "set objective: classify or objective: cpt."),
        (Ranking, {"prompt": "q", "response": "a", "label": True}, "chosen: COLUMN, rejected: COLUMN", "set objective: kto."),
        (Chat, {"ask": "q", "reply": "a"}, "prompt: COLUMN, completion: COLUMN", "Columns of the file: ask, reply"),
        (Chat, {"user_question": "q", "reply": "a"}, "prompt: user_question, completion: reply", "--column prompt=user_question"),
        (Chat, {"dialog": []}, "messages: dialog", "--column messages=dialog"),
        (Labelled, {"내용": "q", "레이블": "a"}, "text: 내용, label: 레이블", "--column 'text=내용'"),
    ],
)
def test_the_error_for_other_columns_suggests_a_mapping(read, kind, row, mapped, typed):
    with pytest.raises(DataError) as said:
        read([row], kind)
    assert f"columns: {{{mapped}}}" in str(said.value) and typed in str(said.value)


@pytest.mark.parametrize(("kind", "example"), [(Labelled, '"label"'), (Tagged, '"ner_tags"'), (Question, '"context"')])
def test_the_error_for_an_empty_file_shows_a_row(read, kind, example):
    with pytest.raises(DataError, match=f"has no rows.*{example}"):
        read("", kind)


def test_a_header_in_another_encoding_is_a_fatal_problem(tmp_path):
    (tmp_path / "a.csv").write_bytes("내용,레이블\n좋다,긍정\n".encode("cp949"))
    (problem,) = opened(tmp_path / "a.csv", Labelled)
    assert problem.fatal and problem.field == "header" and "UTF-8" in problem.fix


def test_preview_and_lint_show_gold(tmp_path, capsys):
    model = save_tiny("llama", tmp_path / "model")
    shows = [
        ("a.jsonl", json.dumps(GOOD[Labelled]), "label a", []),
        ("a.conll", "Kim\tB-P\nleft\tO\n", "Kim/B-P", ["Kim"]),
        ("b.jsonl", json.dumps({**GOOD[Question], "answers": [{"text": "Lee", "answer_start": 8}]}), "'Lee' at 8", ["Lee"]),
    ]
    for name, content, known, coloured in shows:
        path = tmp_path / name
        path.write_text(content)
        assert main(["data", "preview", str(path), "--model", str(model), "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["sources"][0]["rows"]
        assert row["known"] == known and [piece["text"] for piece in row["pieces"] if piece["supervised"]] == coloured
        assert main(["data", "lint", str(path), "--json"]) == 0
        capsys.readouterr()


REAL = [
    ("rt_polarity_train.jsonl", Labelled, 8529, {}),
    ("wnut17_train.conll", Tagged, 3394, {}),
    ("xquad.en.json", Question, 1190, {}),
    ("ko_chatbot.csv", Labelled, 11823, {"columns": {"text": "Q", "label": "label"}}),
]


@pytest.mark.parametrize(("name", "kind", "count", "keys"), REAL)
def test_real_files_are_read_whole(shared, name, kind, count, keys):
    rows = opened(shared / "data" / name, kind, **keys)
    assert len(rows) == count and all(isinstance(row, kind) for row in rows)
