"""Tables in text: headers, column numbers, quotes that swallow rows, and .txt files that are tables."""

import pytest

from tunesmith.data.data_config import Source
from tunesmith.data.read.source import open_source
from tunesmith.data.rows import ROW_TYPES, Chat, Labelled, PromptCompletion, Text
from tunesmith.errors import DataError

HEADED = "id\tdocument\tlabel\n1\tgood film\t1\n2\tslept well\t0\n"
BARE = "I waited all day.\t25\tx1\nThank you!\t0,15\tx2\n"
BY_NUMBER = {"text": 1, "label": 3}


@pytest.fixture
def rows(tmp_path):
    def of(name, content, accepted, gold=True, **keys):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [
            item if not isinstance(item, tuple) else item[1]
            for item in open_source(Source(path=str(path), **keys), accepted, gold).rows()
        ]

    return of


@pytest.mark.parametrize("gold", [True, False])
def test_a_txt_file_with_tabs_and_a_header_is_a_table(rows, gold):
    read = rows("reviews.txt", HEADED, (Labelled,), gold)
    assert [(row.text, row.label) for row in read] == [
        ("good film", "1" if gold else None),
        ("slept well", "0" if gold else None),
    ]
    assert [row.text for row in rows("reviews.txt", HEADED, ROW_TYPES)] == ["good film", "slept well"]


@pytest.mark.parametrize("accepted", [(Text,), (Chat, PromptCompletion, Text)])
@pytest.mark.parametrize("content", [HEADED, HEADED.replace("document", "text")])
def test_the_lines_of_such_a_file_are_trained_as_prose_only_if_the_recipe_asks_for_it(rows, accepted, content):
    with pytest.raises(DataError) as refused:
        rows("reviews.txt", content, accepted)
    if accepted == (Text,) or "\ttext" in content:
        assert "header of a table" in str(refused.value) and "format: text" in str(refused.value)
    assert [row.text for row in rows("reviews.txt", content, accepted, format="text")] == content.splitlines()
    column = "text" if "\ttext" in content else "document"
    assert [row.text for row in rows("reviews.txt", content, (Text,), columns={"text": column})] == ["good film", "slept well"]


def test_prose_with_tabs_stays_prose(rows):
    for content in ("\tindented text\nno tab\n", "a\tb\nc\td\n", "text\tonce\n"):
        assert [row.text for row in rows("prose.txt", content, (Text,))] == content.splitlines()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.tsv", BARE), ("a.txt", BARE), ("a.csv", "0,bad film\n0,worse film\n"), ("a.csv", "bad film,0\nworse,0\n")],
)
def test_a_table_without_a_header_asks_for_one_or_for_column_numbers(rows, name, content):
    with pytest.raises(DataError, match=r"header line.*columns: \{text: 1, label: 2\}") as refused:
        rows(name, content, (Labelled,))
    assert "no format fits" not in str(refused.value)


@pytest.mark.parametrize("name", ["a.tsv", "a.txt"])
def test_columns_by_number(rows, name):
    assert rows(name, BARE, (Labelled,), columns=BY_NUMBER) == [
        Labelled("I waited all day.", label="x1"),
        Labelled("Thank you!", label="x2"),
    ]
    several = rows(name, BARE, (Labelled,), columns={"text": 1, "labels": 2}, separator=",")
    assert [row.labels for row in several] == [("25",), ("0", "15")]


def test_numbers_that_are_column_names_stay_names(rows):
    flags = rows("a.csv", "text,1,2\nt,1,0\n", (Labelled,), columns={"labels": [1, 2]})
    assert flags == [Labelled("t", labels=("1",))]


@pytest.mark.parametrize(
    ("columns", "message"), [({"text": 2, "label": 3}, r"by name \(document, label\)"), ({"text": 1, "label": 4}, "from 1 to 3")]
)
def test_column_numbers_of_a_file_with_a_header_or_beyond_its_columns_are_refused(rows, columns, message):
    (problem,) = rows("a.tsv", HEADED, (Labelled,), columns=columns)
    assert problem.fatal and message.replace("\\", "") in str(problem)


SWALLOWED = {
    "closed by the quote of a later row": ("a.tsv", 'id\ttext\tlabel\n1\tgood\t1\n2\t"bad\t0\n3\tslept\t0\n4\tnever"\t0\n5\tlast\t1\n', "lines 3 to 5"),
    "closed inside a later field": ("a.tsv", 'id\ttext\tlabel\n1\tgood\t1\n2\t"bad\t0\n3\tnever "again\t0\n5\tlast\t1\n', "opens on line 3 and closes inside a field of line 4"),
    "a row too short": ("a.tsv", 'id\ttext\tlabel\n1\tgood\t1\n2\t"bad\t0\n3\tslept"\n5\tlast\t1\n', "2 on lines 3 to 4"),
    "commas": ("a.csv", 'id,text,label\n1,good,1\n2,"bad,0\n3,slept,0\n4,tired,0\n5,never",0\n6,last,1\n', "lines 3 to 6"),
}  # fmt: skip


@pytest.mark.parametrize("case", SWALLOWED)
def test_a_cell_that_swallows_rows_is_reported_by_row(rows, case):
    name, content, got = SWALLOWED[case]
    first, problem, last = rows(name, content, (Labelled,))
    assert (first.text, problem.row, problem.line, last.text) == ("good", 2, 3, "last") and got in problem.got


def test_line_breaks_and_commas_in_a_quoted_cell_are_text(rows):
    cell = "Dear all,\nfirst, second, third\nyours, me"
    assert rows("a.csv", f'text,label\n"{cell}",1\n', (Labelled,))[0].text == cell
    assert rows("a.tsv", 'text\tlabel\n"one\ntwo"\t1\n', (Labelled,))[0].text == "one\ntwo"


def test_names_in_another_encoding_are_reported(rows):
    for name, content in (("a.jsonl", '{"질문": "x"}\n'), ("a.csv", "질문,답변\nx,y\n")):
        try:
            (problem,) = rows(name, content.encode("cp949"), (Labelled,))
        except DataError as error:
            problem = error
        assert "UTF-8" in str(problem) and "iconv" in str(problem)
