"""A corpus of broken files: every bad row is named, no row vanishes, nothing raises."""

from __future__ import annotations

import json
import re

import pytest

from tests.data.broken_files import BROKEN, GOOD, lines
from tests.data.zoo import ZOO
from tests.runs import recipe
from tests.tiny import tiny_tokenizer
from tunesmith.cli.main import main
from tunesmith.data.check.lint import lint
from tunesmith.data.data_config import Source


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def test_the_corpus_holds_forty_files():
    assert len({name for name, *_ in BROKEN}) >= 40


@pytest.mark.parametrize(("name", "content", "rows", "expected"), BROKEN, ids=[entry[0] for entry in BROKEN])
def test_each_bad_row_is_named(tmp_path, name, content, rows, expected):
    path = write(tmp_path, name, content)
    report = lint([Source(path=path)])
    (file,) = report.files
    assert file.rows == file.kept + file.rejected == rows
    assert len(report.problems) == len(expected) == file.rejected and not report.ok
    for problem, (row, field, text) in zip(report.problems, expected):
        assert problem.where.startswith(f"{path}:{row}:") and field in problem.field
        assert text in str(problem) and problem.expected and problem.fix
        str(problem).encode("utf-8")


def test_a_report_is_json(tmp_path):
    paths = [write(tmp_path, name, content) for name, content, *_ in BROKEN]
    report = lint([Source(path=path) for path in paths])
    assert json.loads(json.dumps(report.as_dict()))["ok"] is False
    assert len(report.problems) == sum(len(entry[3]) for entry in BROKEN)


@pytest.mark.parametrize("name", ["missing.json", "empty.jsonl", "odd.xyz", "columns.csv"])
def test_an_unusable_file_is_one_problem(tmp_path, name):
    if name != "missing.json":
        write(tmp_path, name, {"empty.jsonl": b"\n\n", "columns.csv": b"foo,bar\n1,2\n"}.get(name, b"x"))
    (problem,) = lint([Source(path=str(tmp_path / name))]).problems
    assert problem.field == "file" and name in problem.got and problem.where == str(tmp_path / name)
    assert str(problem) == problem.got  # one message, which names the file itself, and no row 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nofile.json", None, "data file not found: {path}. Data files in {folder}: neg.jsonl. Check the name and the folder."),
        ("neq.jsonl", None, "data file not found: {path}. Did you mean neg.jsonl?"),
        ("no/rows.json", None, "data file not found: {path}. There is no folder {folder}/no. Check the path."),
        ("empty.json", b"", "{path} has no rows. Expected at least one, such as "),
        ("noending", b"{}", "{path}: its name has no file type. Expected one of .json, "),
        ("odd.xyz", b"{}", "{path}: unknown file type '.xyz'. Expected one of .json, "),
    ],
)  # fmt: skip
def test_the_problem_of_a_file_is_reported_once(tmp_path, name, content, said):
    write(tmp_path, "neg.jsonl", lines(GOOD))
    write(tmp_path, "notes.md", b"")
    if content is not None:
        write(tmp_path, name, content)
    (problem,) = lint([Source(path=str(tmp_path / name))]).problems
    assert str(problem).startswith(said.format(path=tmp_path / name, folder=tmp_path))


def test_duplicates_inside_and_between(tmp_path):
    other = {"instruction": "Say bye", "output": "Bye!"}
    train = write(tmp_path, "train.jsonl", lines(GOOD, other, GOOD))
    held = write(tmp_path, "eval.jsonl", lines({"question": "x", "answer": "y"}, {"question": "Say bye", "answer": "Bye!"}))
    report = lint([Source(path=train)], [Source(path=held)])
    assert [(item.where, item.same_as) for item in report.duplicates] == [(f"{train}:3", f"{train}:1")]
    assert [(item.where, item.same_as) for item in report.leaked] == [(f"{held}:2", f"{train}:2")] and not report.ok


def test_duplicates_alone_are_no_fault(tmp_path):
    assert lint([Source(path=write(tmp_path, "a.jsonl", lines(GOOD, GOOD)))]).ok


def test_with_a_tokenizer_what_the_template_refuses_is_named(tmp_path):
    path = write(tmp_path, "a.jsonl", lines({**GOOD, "system": "Be brief."}, GOOD))
    (problem,) = lint([Source(path=path)], tokenizer=ZOO["gemma"].tokenizer()).problems
    assert problem.row == 1 and "System role not supported" in problem.got


def test_labels_that_training_refuses_are_problems_of_a_recipe(tmp_path):
    """What the objective refuses because of labels: a class or tag that it does not have, one class only, a list."""
    from tunesmith.data.rows import Labelled, Tagged
    from tunesmith.objectives import classify, tag

    def found(objective, accepted, train, held_out=()):
        sources = []
        for name, rows in (("train.jsonl", train), ("held.jsonl", held_out)):
            sources.append([Source(path=write(tmp_path, name, lines(*rows)))] if rows else [])
        return [str(problem) for problem in lint(*sources, (accepted,), None, objective).problems]

    classes = [{"text": "t", "label": number} for number in (0, 2, 0, 2)]
    unseen = {"text": "t", "label": 7}
    (problem,) = found(classify.Objective(classify.Config()), Labelled, classes, [classes[0], unseen])
    assert "held.jsonl:2:label" in problem and "objective.labels=[0, 2, 7]" in problem
    (problem,) = found(classify.Objective(classify.Config(labels=[0, 2])), Labelled, [*classes, unseen])
    assert "train.jsonl:5:label" in problem and "expected one of the labels 0, 2, got '7'" in problem
    assert "only the class '7'" in found(classify.Objective(classify.Config()), Labelled, [unseen])[0]
    assert found(classify.Objective(classify.Config()), Labelled, [*classes, unseen]) == []
    tags = [{"tokens": ["a", "b"], "tags": ["B-X", "O"]}, {"tokens": ["a"], "tags": ["B-Y"]}]
    (problem,) = found(tag.Objective(tag.Config(labels=["O", "B-X"])), Tagged, tags, tags)
    assert "train.jsonl:2:tags[0]" in problem and "objective.labels" in problem
    assert found(tag.Objective(tag.Config()), Tagged, tags, [*tags, {"tokens": ["a"], "tags": ["B-Z"]}]) == []


def test_lint_of_a_recipe_and_of_an_encoder(tmp_path, capsys):
    from tests.runs import recipe
    from tests.tiny import save_tiny_encoder
    from tunesmith.cli.main import main

    made = recipe(tmp_path, "bert", {"type": "classify", "labels": ["good", "bad"]})
    (tmp_path / "recipe.yaml").write_text(json.dumps(made), encoding="utf-8")
    assert main(["data", "lint", str(tmp_path / "recipe.yaml")]) == 2
    printed = capsys.readouterr().out
    assert printed.count("one of the labels good, bad") == 1 and "The same in 3 more rows" in printed
    encoder = save_tiny_encoder("bert", tmp_path / "encoder")
    path = write(tmp_path, "rows.jsonl", lines({"text": "t", "label": "x"}))
    assert main(["data", "lint", path, "--model", str(encoder)]) == 0
    assert "no row is rendered" in capsys.readouterr().out


CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]}
VANISHES = {"messages": [{"role": "user", "content": "x"}, CALL]}
TURNS = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
NO_ANSWER = {"messages": [{"role": "user", "content": "x"}]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
DAMAGED = {  # objective, rows, number of the first bad one
    "the template refuses first": ("sft", [TURNS] * 3 + [VANISHES, NO_ANSWER, VANISHES] + [TURNS] * 200, 4),
    "reading refuses first": ("sft", [TURNS, NO_ANSWER, VANISHES, NO_ANSWER], 2),
    "after the first batch": ("sft", [TURNS] * 300 + [VANISHES] + [TURNS] * 300 + [NO_ANSWER], 301),
    "pairs": ("dpo", [PAIR, PAIR | {"rejected": "b"}, PAIR | {"prompt": 3}], 2),
    "labels": (
        "classify",
        [{"text": "a", "label": "x"}, {"text": "", "label": "y"}, {"text": "b"}, {"text": "c", "label": "y"}],
        2,
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_lint_check_and_train_name_the_same_row_first(name, tmp_path, capsys):
    """The first bad row of the file, whether reading or the template refuses it, and whatever else is wrong later."""
    objective, rows, first = DAMAGED[name]
    made = recipe(tmp_path, "bert" if objective == "classify" else "llama", objective)
    if objective == "sft":
        tiny_tokenizer("chatml").save_pretrained(made["model"])
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    (tmp_path / "recipe.yaml").write_text(json.dumps(made))
    file = str(tmp_path / "recipe.yaml")
    for words in (["data", "lint", file], ["check", file], ["train", file, "--out", str(tmp_path / "run")]):
        assert main(words) == 2
        said = "".join(capsys.readouterr())
        assert re.search(r"rows\.jsonl:(\d+):", said)[1] == str(first), (words, said)


def test_what_a_file_that_cannot_be_read_leads_to_is_not_listed(tmp_path):
    """Such as that there are no labels: the file alone is to be mended."""
    from tunesmith.data.rows import Labelled
    from tunesmith.objectives import classify

    path = write(tmp_path, "a.tsv", b"I waited all day.\t25\tx1\nGood.\t7\tx2\n")
    (problem,) = lint([Source(path=path)], (), (Labelled,), None, classify.Objective(classify.Config())).problems
    assert "does not look like column names" in str(problem)
