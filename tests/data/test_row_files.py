"""Readers: every file type, in constant memory, and typed problems for any bytes."""

from __future__ import annotations

import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.read import json_rows
from tunesmith.data.read.row_files import READERS, read
from tunesmith.data.row_problems import Record, RowProblem
from tunesmith.errors import DataError

ROWS = [{"text": "one"}, {"text": "둘 👋"}, {"text": 'th"r\nee'}]


def values(path):
    return [item.value for item in read(str(path))]


DRESSES = [("a.json", form) for form in ("array", "pretty", "lines", "objects")] + [("a.jsonl", "array"), ("a.jsonl", "lines")]


@pytest.mark.parametrize(("name", "form"), DRESSES)
def test_every_layout_of_json_is_read(tmp_path, name, form):
    each = [json.dumps(row, ensure_ascii=False, indent=2 if form == "objects" else None) for row in ROWS]
    text = {"array": json.dumps(ROWS), "pretty": json.dumps(ROWS, indent=2)}.get(form, "\n".join(each))
    path = tmp_path / name
    path.write_text("\ufeff" + text.replace("\n", "\r\n"), encoding="utf-8", newline="")
    assert values(path) == ROWS


def test_csv_with_bom_crlf_quotes_and_blank_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufefftext,label\r\n"a, ""b""\r\nc",1\r\n\r\n둘,2\r\n'.encode())
    assert values(path) == [{"text": 'a, "b"\r\nc', "label": "1"}, {"text": "둘", "label": "2"}]
    assert [item.line for item in read(str(path))] == [2, 5]


def test_csv_with_semicolons_and_tsv(tmp_path):
    (tmp_path / "a.csv").write_text("text;label\na, b;1\n")
    (tmp_path / "a.tsv").write_text("text\tlabel\na, b\t1\n")
    assert values(tmp_path / "a.csv") == values(tmp_path / "a.tsv") == [{"text": "a, b", "label": "1"}]


def test_each_line_of_text_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  \r\ntwo\r\n")
    assert [(item.row, item.line, item.value["text"]) for item in read(str(tmp_path / "a.txt"))] == [(1, 1, "one"), (2, 4, "two")]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == ROWS
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    (problem,) = read(str(tmp_path / "b.parquet"))
    assert isinstance(problem, RowProblem) and problem.fatal


@pytest.mark.parametrize(("name", "hint"), [("trian.json", "train.json"), ("x/y.json", "no folder"), ("", "folder")])
def test_the_error_for_a_missing_file_suggests_the_nearest(tmp_path, name, hint):
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(DataError, match=hint):
        read(str(tmp_path / name))


def test_an_array_is_read_through_a_small_window(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "CHUNK", 64)
    rows = [{"n": n, "text": "x" * (n % 97), "deep": {"a": [1, 2.5e3, True, None]}} for n in range(300)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=1))
    items = list(read(str(path)))
    assert [item.value for item in items] == rows
    text = path.read_text().split("\n")
    assert all(text[item.line - 1].strip() == "{" for item in items)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Twice the rows need less than 1.5 times the memory."""

    def peak(count):
        path = tmp_path / f"{count}.json"
        with path.open("w") as handle:
            handle.write("[" + ",".join(json.dumps({"text": "word " * 40}) for _ in range(count)) + "]")
        tracemalloc.start()
        assert sum(1 for _ in read(str(path))) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(20_000) < 1.5 * peak(10_000)


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != ".parquet"])
@settings(max_examples=80, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.text('[]{}",:\n\\ua1 \t-.e', max_size=120).map(str.encode)))
def test_any_bytes_give_records_or_problems(tmp_path_factory, kind, content):
    path = tmp_path_factory.mktemp("any") / f"a{kind}"
    path.write_bytes(content)
    items = list(read(str(path)))
    assert all(isinstance(item, Record | RowProblem) for item in items)
    assert [item.row for item in items] == list(range(1, len(items) + 1))
    for item in items[:-1]:
        assert not (isinstance(item, RowProblem) and item.fatal)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=4)),
        max_size=8,
    ),
    indent=st.none() | st.integers(0, 3),
    chunk=st.integers(1, 40),
)
def test_rows_that_json_writes_are_read_back(rows, indent, chunk):
    before, json_rows.CHUNK = json_rows.CHUNK, chunk
    try:
        items = list(json_rows.read_json(io.StringIO(json.dumps(rows, indent=indent)), "a.json"))
    finally:
        json_rows.CHUNK = before
    assert [item.value for item in items] == rows


def test_an_unknown_built_in_set_is_refused_with_the_valid_names():
    with pytest.raises(DataError, match="builtin:docstrings"):
        read("builtin:nothing")
