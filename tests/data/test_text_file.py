"""Opening data files: gzip, Git LFS pointers, and names without a known type."""

import gzip
import json

import pytest

from tunesmith.data.data_config import Source
from tunesmith.data.read import text_file
from tunesmith.data.read.row_files import read
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import Record, RowProblem
from tunesmith.data.rows import Tagged
from tunesmith.errors import DataError

FILES = {
    "a.jsonl": '\ufeff{"text": "둘"}\n{"text": "b"}\n',
    "a.json": '[{"text": "둘"}, {"text": "b"}]',
    "a.csv": 'text\r\n"둘"\r\nb\r\n',
    "a.txt": "둘\nb\n",
    "a.conll": "둘 O\n\nb O\n",
}


@pytest.mark.parametrize("name", FILES)
def test_text_packed_by_gzip_is_read_as_the_file_itself(tmp_path, name):
    content = FILES[name].encode()
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    plain, packed = list(read(str(tmp_path / name))), list(read(str(tmp_path / f"{name}.gz")))
    assert [(item.row, item.line, item.value) for item in packed] == [(item.row, item.line, item.value) for item in plain]
    assert len(packed) == 2


def test_a_damaged_gzip_file_is_a_problem_after_its_last_whole_row(tmp_path):
    lines = "".join(json.dumps({"text": str(number**9)}) + "\n" for number in range(9000)).encode()
    packed = gzip.compress(lines)
    for damaged in (packed[: len(packed) // 2], b"text,label\n", packed[:50_000] + b"\xff" * 50 + packed[50_050:]):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        *rows, problem = read(str(tmp_path / "a.jsonl.gz"))
        assert isinstance(problem, RowProblem) and problem.fatal and problem.row == len(rows) + 1 and "gunzip" in problem.fix


def test_a_gzip_bomb_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "SMALLEST_LIMIT", 1 << 16)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\nfirst\n" + b"a" * (1 << 21)))
    *_, problem = read(str(tmp_path / "a.csv.gz"))
    assert problem.fatal and "100 times" in problem.got


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv.gz"])
def test_a_git_lfs_pointer_is_named_as_such(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=r"Git LFS pointer.*git lfs pull --include a"):
        read(str(tmp_path / name))


UNKNOWN = [
    (
        "eng.testb",
        b"-DOCSTART- -X- O O\n\nSOCCER NN I-NP O\n- : O O\nJAPAN NNP I-NP I-LOC\n\nNadim NNP I-NP I-PER\n\n",
        "format=conll",
    ),
    ("rows.data", b'{"text": "a"}\n{"text": "b"}\n', "mv rows.data rows.jsonl"),
    ("rows.zip", b"PK\x03\x04", "unzip rows.zip"),
    ("rows.xlsx", b"PK\x03\x04\x00\xff", "Convert it"),
]


@pytest.mark.parametrize(("name", "content", "advice"), UNKNOWN)
def test_the_advice_for_an_unknown_type_depends_on_the_content(tmp_path, name, content, advice):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"no file type|unknown file type") as refused:
        read(str(tmp_path / name))
    assert advice in str(refused.value)


def test_a_conll_file_of_any_name_is_read_with_its_format(tmp_path):
    (tmp_path / "eng.testb").write_bytes(UNKNOWN[0][1])
    assert [item.value["tags"] for item in read(str(tmp_path / "eng.testb"), "conll") if isinstance(item, Record)] == [
        ["O", "O", "I-LOC"],
        ["I-PER"],
    ]


@pytest.mark.parametrize("name", ["ner.tsv", "ner.txt"])
def test_conll_under_the_name_of_another_type_asks_for_the_format(tmp_path, name):
    (tmp_path / name).write_text("## id-0\t<Kim:P> left\nKim\tB-P\nleft\tO\n\n## id-1\t<Lee:P>\nLee\tB-P\n")
    with pytest.raises(DataError, match=r"look like CoNLL.*\n.*format: conll"):
        open_source(Source(path=str(tmp_path / name)), (Tagged,))
    assert len(list(open_source(Source(path=str(tmp_path / name), format="conll"), (Tagged,)).rows())) == 2
