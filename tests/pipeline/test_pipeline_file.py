"""The file of a pipeline: results of stages become folders, and every mistake is named with stage and line."""

from __future__ import annotations

import pytest

from tests.pipeline import stages
from tunesmith import recipe as recipes
from tunesmith.errors import RecipeError

SFT = """stages:
  sft:
    recipe: {model: base, data: {train: [{path: rows.jsonl}]}}
"""
REWARD = """  reward:
    recipe:
      model: {stage: sft}
      adapter: merge
      objective: reward
      data:
        train: [{path: pairs.jsonl}]
"""


@pytest.fixture
def read(tmp_path):
    def read_text(text, *overrides):
        (tmp_path / "pipe.yaml").write_text(text, encoding="utf-8")
        return stages.read(tmp_path / "pipe.yaml", tmp_path / "out", *overrides)

    return read_text


def test_the_result_of_a_stage_is_its_run_folder(read, tmp_path):
    sft, reward = read(SFT + REWARD).stages
    assert (sft.inputs, reward.inputs) == ({}, {"model": "sft"})
    assert reward.recipe.model == str(tmp_path / "out" / "sft") == str(sft.folder)
    assert reward.resolved()["model"] == {"stage": "sft"}
    assert reward.resolved()["train"]["learning_rate"] == reward.recipe.train.learning_rate is not None


def test_a_recipe_file_lies_next_to_the_pipeline_and_takes_overrides(read, tmp_path):
    (tmp_path / "one.yaml").write_text("model: base\ndata: {train: [{path: rows.jsonl}]}\ntrain: {epochs: 3}\n")
    overrides = "    overrides: {train.max_steps: 7, model: {stage: sft}, adapter: merge}\n"
    text = SFT + "  two:\n    recipe: one.yaml\n" + overrides
    two = read(text).stage("two")
    assert (two.recipe.train.max_steps, two.recipe.train.epochs) == (7, 1)  # one replaces the other, as with `train`
    assert two.inputs == {"model": "sft"} and two.source == str(tmp_path / "one.yaml")
    typed = read(text, "two.train.max_steps=9", "sft.seed=4", "two.model=other", "two.adapter=null")
    assert [stage.recipe.seed for stage in typed.stages] == [4, 0]
    assert typed.stage("two").recipe.train.max_steps == 9 and typed.stage("two").inputs == {}


def test_variables_of_a_template_are_no_stages(read):
    variables = "      samples: {count: 0}\n"
    text = SFT + REWARD.replace("objective: reward", "objective: sft").replace(
        "      data:\n", "      data:\n        template_kwargs: {stage: sft}\n"
    )
    assert read(text + variables).stage("reward").recipe.data.template_kwargs == {"stage": "sft"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", ["pipe.yaml", "expected a mapping with stages, compare"]),
        ("stages: {}", ["line 1", "`stages`", "expected a mapping"]),
        ("stage: {}", ["unknown key `stage`", "Did you mean `stages`"]),
        ("stages:\n  a b: {recipe: x.yaml}", ["line 2", "letters, digits"]),
        ("stages:\n  replaced: {recipe: x.yaml}", ["line 2", "other than manifests and replaced"]),
        ("stages:\n  a:\n    recipes: x.yaml", ["line 3", "unknown key `stages.a.recipes`", "`recipe`"]),
        ("stages:\n  a:\n    recipe: 3", ["line 3", "expected the path of a recipe"]),
        ("stages:\n  a:\n    recipe: x.yaml", ["line 2: stage a: recipe not found", "x.yaml"]),
        (SFT + "    overrides: [seed=1]", ["line 4", "expected a mapping such as {train.epochs: 2}"]),
        (SFT + "    overrides: {train.epoch: 2}", ["line 2: stage sft", "train.epoch=2", "Did you mean `epochs`"]),
        (SFT + REWARD.replace("adapter: merge", "adaptor: merge"), ["line 4: stage reward: ", "line 7: unknown key `adaptor`"]),
        (SFT + REWARD.replace("stage: sft", "stage: sfd"), ["line 6: {stage: sfd}: sfd is no stage", "earlier one: sft"]),
        (SFT + REWARD.replace("stage: sft", "stage: reward"), ["line 6", "reward runs later", "Move it up"]),
        (REWARD.join(["stages:\n", SFT.partition("\n")[2]]), ["line 2: stage reward", "sft runs later", "earlier one: none"]),
        (SFT + "compare: {count: -1}", ["line 4", "`compare.count`", "got -1"]),
        (SFT + "compare: {count: true}", ["`compare.count`", "got True"]),
        (SFT + "compare: {prompts: a}", ["`compare.prompts`", "a list of texts"]),
        (SFT + "compare: {max_new_tokens: 0}", ["`compare.max_new_tokens`", "above 0"]),
        (SFT + "compare: {count: 2, prompts: [a]}", ["set compare.prompts or compare.count"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(read, text, words):
    with pytest.raises(RecipeError) as raised:
        read(text)
    for word in words:
        assert word in str(raised.value)


def test_mistakes_of_all_stages_are_named_at_once(read):
    with pytest.raises(RecipeError) as raised:
        read(SFT.replace("model: base, ", "") + REWARD.replace("objective: reward", "objective: rewards"))
    first, second = str(raised.value).splitlines()[:2]
    assert "stage sft" in first and "model" in first and "stage reward" in second and "`reward`" in second


@pytest.mark.parametrize("override", ["train.epochs=2", "seed=1", "sft", "sftt.seed=1"])
def test_an_override_names_its_stage(read, override):
    with pytest.raises(RecipeError, match=r"expected STAGE\.KEY=VALUE with one of the stages sft"):
        read(SFT, override)


def test_no_file_is_its_own_error(tmp_path):
    with pytest.raises(RecipeError, match="pipeline not found"):
        stages.read(tmp_path / "none.yaml", tmp_path)


def test_a_recipe_alone_cannot_name_a_stage():
    with pytest.raises(RecipeError, match="only `tunesmith pipeline` knows stages"):
        recipes.parse({"model": {"stage": "sft"}, "data": {"train": [{"path": "x"}]}})
