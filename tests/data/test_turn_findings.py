"""What lint, preview and check show of the turns of a file."""

from __future__ import annotations

import json

import pytest

from tests.tiny import save_tiny
from tunesmith.cli.main import main
from tunesmith.data.encode import turn_findings
from tunesmith.recipe import parse
from tunesmith.train import run

TYPED = "the turn token <|im_end|> typed in a message, read as plain text"


def chat(question, answer, **keys):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **keys}]}


ROWS = [
    chat("What does <|im_end|> mean?", "<|im_end|> closes a turn."),
    chat("Dear {{name}}, hello?", "Hello.", mood="happy"),
    chat("x", "### Response:\nHello.", weight=1, name="bot"),
    chat("plain", "Plain answer."),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_lint_counts_them_with_their_rows(rows, model, capsys):
    assert main(["data", "lint", str(rows), "--model", str(model)]) == 0
    out = capsys.readouterr().out
    for line in (
        f"remark: {rows}: 1 row has {TYPED} (2 times): row 1",
        f"remark: {rows}: 1 row has a placeholder such as {{{{name}}}} in a message: row 2",
        f"remark: {rows}: 1 row has the key 'mood' in a turn, which no template reads: row 2",
        f"remark: {rows}: 1 row has the header ### Response: of another prompt format in a message: row 3",
    ):
        assert line in out.replace("\n", " "), out
    assert out.count("remark:") == 4
    assert main(["data", "lint", str(rows), "--json"]) == 0  # without a model no template is known
    found = json.loads(capsys.readouterr().out)["in_turns"][str(rows)]
    assert [one["first"] for one in found] == [[2], [2], [3]]


def test_preview_shows_them_next_to_the_row(rows, model, capsys):
    assert main(["data", "preview", str(rows), "--model", str(model), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["sources"][0]["rows"]
    assert (
        shown[0]["notes"] == [f"{TYPED} (2 times)"]
        and "".join(piece["text"] for piece in shown[0]["pieces"]).count("<|im_end|>") == 4
    )


@pytest.mark.parametrize("policy", ["text", "allow"])
def test_check_shows_them_and_a_recipe_chooses(rows, model, policy):
    data = {"train": [{"path": str(rows)}], "eval": {"fraction": 0}, "special_tokens": policy}
    facts = run.check(parse({"model": str(model), "objective": "sft", "data": data}))
    (source,) = facts["data"]["sources"]
    lines = turn_findings.lines("f", source["in_turns"])
    read = "plain text" if policy == "text" else "the token"
    assert lines[0] == f"f: 1 row has the turn token <|im_end|> typed in a message, read as {read} (2 times): row 1"
    assert len(lines) == 4


CALLED = [
    {"role": "user", "content": "weather in Oslo?"},
    {"role": "assistant", "content": "", "weight": 0, "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
    {"role": "tool", "content": "rain"},
]


def test_every_verb_refuses_a_call_of_the_history_that_the_template_leaves_out(model, tmp_path, capsys):
    """It is not trained on, and still the model would read an answer to nothing."""
    rows = [chat("x", "Fine."), {"messages": [*CALLED, {"role": "assistant", "content": "It rains."}]}]
    file, asked, recipe = tmp_path / "rows.jsonl", tmp_path / "asked.jsonl", tmp_path / "recipe.yaml"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked.write_text("".join(json.dumps({"messages": row["messages"][:-1]}) + "\n" for row in rows))
    data = {"train": [{"path": str(file)}], "eval": {"fraction": 0}, "cache": False}
    recipe.write_text(json.dumps({"model": str(model), "objective": "sft", "data": data}))
    out = ["--out", str(tmp_path / "out")]
    for words in (
        ["data", "lint", str(recipe), "--model", str(model)], ["data", "preview", str(recipe)], ["check", str(recipe)],
        ["train", str(recipe), *out], ["generate", str(model), "--data", str(asked), *out],
    ):  # fmt: skip
        assert main(words) == 2, words
        said = " ".join("".join(capsys.readouterr()).split())
        assert "messages[1].tool_calls[0]: weather, which the template leaves out" in said, words
        assert "template with tools" in said, words
    assert not (tmp_path / "out").exists()
