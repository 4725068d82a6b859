"""The output of `tunesmith data preview` and `data lint`."""

from __future__ import annotations

import json

import pytest

from tests.tiny import save_tiny, tiny_tokenizer
from tunesmith.cli.main import main
from tunesmith.data.check.preview import split_by_supervision

ROWS = [
    {"instruction": "질문?", "output": "답변 👋."},
    {"instruction": "x", "output": ""},
    {"instruction": "Why?", "output": "Because."},
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def test_stretches_are_the_text_cut_where_learning_begins_and_ends():
    tokenizer = tiny_tokenizer("chatml")
    from tunesmith.data.encode.conversations import encode
    from tunesmith.data.rows import Chat

    ((example,),) = encode([Chat(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))], tokenizer)
    assert split_by_supervision(example, tokenizer) == [
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        ("b<|im_end|>", True),
        ("\n", False),
    ]


def test_preview_shows_the_answer_as_supervised(rows, model, capsys):
    assert main(["data", "preview", str(rows), "--model", str(model), "--json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    first, second = source["rows"]
    assert [piece["text"] for piece in first["pieces"] if piece["supervised"]] == ["답변 👋.<|im_end|>"]
    assert second["where"] == f"{rows}:3" and source["problems"][0]["where"] == f"{rows}:2:output"
    assert source["format"].startswith("alpaca") and first["supervised"] < first["tokens"]


def test_preview_can_supervise_every_token(rows, model, capsys):
    assert main(["data", "preview", str(rows), "--model", str(model), "--rows", "1", "--train-on", "all", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["sources"][0]["rows"]
    assert [piece["supervised"] for piece in row["pieces"]] == [True]


def test_preview_for_people(rows, model, capsys):
    assert main(["data", "preview", str(rows), "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "tokens supervised" in out and "답변" in out and "rows.json:2:output" in out
    assert "order: that of the file; training draws another one" in out


def test_preview_of_a_recipe(rows, model, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nobjective: sft\ndata:\n  train: [{{path: {rows}}}]\n  template: korean\n")
    assert main(["data", "preview", str(recipe), "--json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert source["rows"][0]["pieces"][0]["text"] == "### 질문:\n질문?\n\n### 답변:\n"


def test_variables_of_the_template_reach_preview_and_lint(rows, model, tmp_path, capsys):
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% if x %}{{ x }}{% endif %}{% endfor %}"
    recipe, file = tmp_path / "recipe.yaml", tmp_path / "own.jinja"
    file.write_text(template)
    keys = f"template: {file}\n  template_kwargs: {{x: yes}}\n"
    recipe.write_text(f"model: {model}\nobjective: sft\ndata:\n  train: [{{path: {rows}}}]\n  {keys}")
    assert main(["data", "preview", str(recipe), "--json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert source["rows"][0]["pieces"][0]["text"] == "<|im_start|>user\n질문?<|im_end|>yes"
    assert source["template"] == f'the template in {file}, with x: "yes"'
    wrong = ["--template", "chatml", "--template-kwarg", "x=1"]
    assert main(["data", "lint", str(rows), "--model", str(model), *wrong]) == 2
    assert "reads no variable 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(("objective", "row", "known"), [
    ("classify", {"text": "good", "label": "pos"}, "label pos"),
    ("tag", {"tokens": ["in", "Rome"], "ner_tags": ["O", "B-LOC"]}, "Rome/B-LOC"),
    ("qa", {"question": "Who?", "context": "Ann did.", "answers": {"text": ["Ann"], "answer_start": [0]}}, "'Ann' at 0"),
])  # fmt: skip
def test_preview_of_a_recipe_with_a_head(objective, row, known, model, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nobjective: {objective}\ndata:\n  train: [{{path: {tmp_path / 'rows.jsonl'}}}]\n")
    assert main(["data", "preview", str(recipe), "--json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert source["rows"][0]["known"] == known


def test_preview_needs_a_tokenizer(rows, capsys):
    assert main(["data", "preview", str(rows)]) == 2
    assert "--model" in capsys.readouterr().err


def test_lint_exits_with_two_when_something_is_bad(rows, capsys):
    assert main(["data", "lint", str(rows), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["problems"][0]["where"] == f"{rows}:2:output" and report["files"][0]["kept"] == 2


def test_lint_reports_that_no_row_is_bad(rows, tmp_path, capsys):
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(ROWS[0]) + "\n")
    assert main(["data", "lint", str(good)]) == 0
    assert "no bad rows" in capsys.readouterr().out
    assert main(["data", "lint", str(good), "--eval", str(good)]) == 2
    assert "also a training row" in capsys.readouterr().out


def test_lint_of_a_missing_file(tmp_path, capsys):
    assert main(["data", "lint", str(tmp_path / "none.json"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"][0]["fatal"]
