"""Mathematics and JSON schemas, each with its optional library."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from tests.rollout.completions import answered
from tests.tiny import tiny_tokenizer
from tunesmith.errors import MissingExtra, RecipeError
from tunesmith.rollout import checked_answers
from tunesmith.rollout.checked_answers import JsonSchemaReward, MathReward


def scored(config, *answers):
    return config.scorer("objective.rewards.0", tiny_tokenizer())(answers)


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("7", "The answer is 7.", 1),
        ("7", "7 사과가 있고, 답은 8", 0),
        ("42", "답: 42", 1),
        (r"$\frac{1}{2}$", r"\boxed{0.5}", 1),
        ("$x^2+1$", "$1 + x^2$", 1),
        ("1,000", "1000", 1),
        ("7", "no number", 0),
        (7, "it is 7", 1),
        ("셋", " 셋 ", 1),  # a reference without mathematics is compared as text
        ("셋", "넷", 0),
    ],
)
def test_math(gold, text, reward):
    pytest.importorskip("math_verify")
    assert scored(MathReward(column="answer"), answered(text, answer=gold)) == [reward]


SCHEMA = {"type": "object", "properties": {"이름": {"type": "string"}, "age": {"type": "integer"}}, "required": ["이름"]}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ('{"이름": "김", "age": 3}', 1),
        ('```json\n{"이름": "김"}\n```', 1),
        ('```\n{"이름": "김"}\n```\n', 1),
        ('{"age": 3}', 0),
        ('{"이름": 3}', 0),
        ('{"이름": "김"} and more', 0),
        ("", 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_schema(text, reward, tmp_path):
    pytest.importorskip("jsonschema")
    assert scored(JsonSchemaReward(definition=SCHEMA), answered(text)) == [reward]
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert scored(JsonSchemaReward(definition=str(file)), answered(text)) == [reward]


def test_a_schema_that_is_none_is_refused(tmp_path):
    pytest.importorskip("jsonschema")
    with pytest.raises(RecipeError, match=r"objective\.rewards\.0\.definition is no JSON schema: 'text' is not valid"):
        scored(JsonSchemaReward(definition={"type": "text"}))
    with pytest.raises(RecipeError, match=r"none\.json cannot be read"):
        scored(JsonSchemaReward(definition=str(tmp_path / "none.json")))


@pytest.mark.parametrize(("config", "extra"), [(MathReward(column="a"), "math"), (JsonSchemaReward(definition={}), "json")])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, config, extra):
    monkeypatch.setattr(checked_answers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=rf"tunesmith\[{extra}\]"):
        scored(config)


def test_the_extras_are_declared():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"math", "json"} <= set(project["optional-dependencies"])
