"""A pipeline trains each stage once on the result of an earlier one, and resumes in the stage where it was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.kill_points import in_fork
from tests.pipeline import stages
from tests.runs import apart, history, weights
from tunesmith.errors import RecipeError, StoppedError, UserError
from tunesmith.pipeline import run_stages, stage_checks, stage_manifest
from tunesmith.runs import run_folder
from tunesmith.train import loop

ALL = ("sft", "reward", "dpo")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A pipeline that ran without a break: (its file, its folder, its summary, the lines it printed)."""
    folder = tmp_path_factory.mktemp("pipeline")
    file, lines = stages.write(folder), []
    facts = run_stages.run_pipeline(stages.read(file, folder / "out"), note=lines.append)
    return file, folder / "out", facts, lines


@pytest.fixture
def copied(straight, tmp_path):
    """The finished pipeline in a folder of its own, with data of its own: (its file, its folder)."""
    file, out, _, _ = straight
    shutil.copytree(file.parent, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "pipe.yaml", tmp_path / "sft.yaml", *(tmp_path / "out" / "manifests").iterdir()):
        path.write_text(path.read_text(encoding="utf-8").replace(str(file.parent), str(tmp_path)), encoding="utf-8")
    return tmp_path / "pipe.yaml", tmp_path / out.name


def actions(pipeline, **keys):
    return {one.stage.name: one.action for one in run_stages.plan(pipeline, **keys)}


def reasons(pipeline, stage):
    (one,) = (one for one in run_stages.plan(pipeline) if one.stage.name == stage)
    return "; ".join(one.reasons)


def test_every_stage_trains_on_the_result_that_it_names(straight):
    _, out, facts, lines = straight
    manifests = {name: run_folder.read_mapping(out / name / "manifest.json") for name in ALL}
    assert manifests["sft"]["model"]["path"].endswith("base")
    for name in ("reward", "dpo"):
        assert manifests[name]["model"] == {"name": str(out / "sft"), "path": str(out / "sft" / "model"), "kind": "adapter"}
    assert [(one["stage"], one["action"], one["steps"]) for one in facts["stages"]] == [(name, "train", 2) for name in ALL]
    assert all((out / name / "report.html").is_file() for name in ALL)
    assert [line.partition(",")[0] for line in lines if line.startswith("stage ")] == [
        f"stage {number} of 3: {name}" for number, name in enumerate(ALL, 1)
    ]
    assert json.loads((out / "summary.json").read_text()) == facts


def test_the_models_answer_prompts_that_no_stage_was_trained_on(straight):
    file, _, facts, _ = straight
    compared = facts["comparison"]
    assert [row["model"] for row in compared["models"]] == ["base", "sft", "dpo"]  # a reward model writes nothing
    pairs = [json.loads(line) for line in (file.parent / "pairs.jsonl").read_text().splitlines()]
    shown = [one["prompt"] for one in compared["prompts"]]
    assert len(set(shown)) == 3 and set(shown) <= {pair["prompt"] for pair in pairs}
    for name in ALL:
        trained = stages_rows(facts, name)
        assert trained and not trained & set(shown)
    assert {*compared["prompts"][0]["answers"]} == {*compared["prompts"][0]["rewards"]["reward"]} == {"base", "sft", "dpo"}
    scores = [score for one in compared["prompts"] for score in one["rewards"]["reward"].values()]
    assert any(isinstance(score, float) for score in scores)


def test_a_prompt_that_another_stage_was_trained_on_is_left_out(straight):
    """With another seed the other stages hold out other rows."""
    file, out, _, _ = straight
    pipeline = stages.read(file, out, "sft.seed=5", "reward.seed=6")
    ended = list(pipeline.stages)
    asked = run_stages.answer_comparison._held_out_prompts(ended, [ended[0], ended[2]], 24)
    alone = run_stages.answer_comparison._held_out_prompts(ended[2:], ended[2:], 24)
    assert {one.shown() for one in asked} < {one.shown() for one in alone}


def stages_rows(facts, name):
    """The prompts that a stage was trained on, found without the code under test: all rows but those its run held out."""
    from tunesmith import recipe as recipes
    from tunesmith.train import distributed, setup

    recipe = recipes.load(Path(facts["out"]) / name / "recipe.yaml")
    ready = setup.read(recipe, distributed.state().device, lambda line: None)
    file = Path(recipe.data.train[0].path)
    prompts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    rows = {int(ready.data.train[index]["row"][1]) for index in range(len(ready.data.train))}
    return {prompts[row - 1] for row in rows}


def test_an_unchanged_pipeline_trains_nothing_and_answers_nothing_again(straight, monkeypatch):
    file, out, facts, _ = straight
    before = {path: path.stat().st_mtime_ns for name in ALL for path in (out / name).rglob("*")}
    monkeypatch.setattr("tunesmith.models.generate.decode.generate", None)
    monkeypatch.setattr(run_stages.run, "check", None)
    again = run_stages.run_pipeline(stages.read(file, out))
    assert [one["action"] for one in again["stages"]] == ["unchanged"] * 3
    assert again["comparison"] == facts["comparison"]
    assert before == {path: path.stat().st_mtime_ns for name in ALL for path in (out / name).rglob("*")}


def test_a_changed_stage_is_trained_again_and_the_earlier_run_is_kept(copied, monkeypatch):
    monkeypatch.setattr(run_stages.answer_comparison, "compare", lambda *arguments: None)
    file, out = copied
    old = weights(out / "dpo" / "model")
    lines = []
    facts = run_stages.run_pipeline(stages.read(file, out, "dpo.seed=3"), note=lines.append)
    assert [one["action"] for one in facts["stages"]] == ["unchanged", "unchanged", "train"]
    assert "stage 3 of 3: dpo, dpo on the result of sft: train (recipe: seed: was 0, is 3)" in lines
    assert apart(old, weights(out / "replaced" / "dpo-1" / "model")) == 0 < apart(old, weights(out / "dpo" / "model"))


def test_what_changed_is_named(copied, monkeypatch):
    file, out = copied
    pipeline = stages.read(file, out)
    assert set(actions(pipeline).values()) == {"unchanged"}
    free = stages.read(file, out, "sft.train.micro_batch_tokens=64", "sft.data.cache=false")
    assert set(actions(free).values()) == {"unchanged"}, "keys that change no result"
    sft = stages.read(file, out, "sft.train.learning_rate=0.02")
    assert reasons(sft, "sft") == "recipe: train.learning_rate: was 0.01, is 0.02"
    assert reasons(sft, "dpo") == "its input, sft, is trained first"
    with monkeypatch.context() as patch:
        patch.setattr(stage_manifest, "__version__", "9")
        assert reasons(pipeline, "reward") == "its input, sft, is trained first" and "is 9" in reasons(pipeline, "sft")
    pairs = file.parent / "pairs.jsonl"
    text = pairs.read_text()
    pairs.write_text(text.replace("question 1", "question X"))
    assert actions(pipeline) == {"sft": "unchanged", "reward": "train", "dpo": "train"}
    assert reasons(pipeline, "dpo") == f"data: the content of {pairs} changed"
    pairs.write_text(text)
    tokenizer = file.parent / "base" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"model_max_length": 77}))
    assert reasons(pipeline, "sft") == "inputs: the model at the key model changed"


def test_a_damaged_or_missing_result_is_trained_again(copied):
    file, out = copied
    pipeline = stages.read(file, out)
    (weight,) = (out / "reward" / "model").glob("*.safetensors")
    content = bytearray(weight.read_bytes())
    content[-1] ^= 1
    weight.write_bytes(content)
    assert "changed since it was saved" in reasons(pipeline, "reward")
    shutil.rmtree(out / "reward")
    assert actions(pipeline) == {"sft": "unchanged", "reward": "train", "dpo": "unchanged"}
    assert "its result cannot be used" in reasons(pipeline, "reward")


def test_from_and_until_choose_a_part(copied):
    file, out = copied
    changed = stages.read(file, out, "sft.seed=1", "dpo.seed=1")
    assert actions(changed, first="reward") == {"sft": "not run", "reward": "unchanged", "dpo": "train"}
    assert actions(changed, first="reward", last="reward") == {"sft": "not run", "reward": "unchanged", "dpo": "not run"}
    planned = {one.stage.name: one.current for one in run_stages.plan(changed, last="reward")}
    assert planned == {"sft": False, "reward": False, "dpo": False}, "a result of another sft is not this pipeline's"
    with pytest.raises(RecipeError, match=r"no stage 'rewards'\. Did you mean `reward`"):
        run_stages.plan(changed, first="rewards")
    with pytest.raises(UserError, match="nothing would run"):
        run_stages.plan(changed, first="dpo", last="sft")
    shutil.rmtree(out / "sft")
    with pytest.raises(UserError, match="stage sft: --from reward takes the result of this stage"):
        run_stages.plan(changed, first="reward")


def test_a_run_of_somebody_else_is_not_replaced(copied):
    file, out = copied
    (out / "manifests" / "reward.json").unlink()
    with pytest.raises(UserError, match=r"stage reward: .*holds a run that this pipeline did not start"):
        run_stages.plan(stages.read(file, out))


def test_two_pipelines_in_one_folder_are_refused(copied):
    file, out = copied
    lock = run_folder.take_lock(out)
    try:
        with pytest.raises(UserError, match="another process"):
            run_stages.run_pipeline(stages.read(file, out))
    finally:
        lock.close()


@pytest.fixture(scope="module")
def killed(straight, tmp_path_factory):
    """A pipeline whose process was killed in step 2 of its second stage: (its file, its folder, exit code)."""
    file, out = straight[0], tmp_path_factory.mktemp("killed") / "out"

    def run():
        step = loop.train_step

        def kill_in_step_2_of_reward(job, now):
            if now.number == 2 and job.objective.traits.rewards:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(job, now)

        loop.train_step = kill_in_step_2_of_reward
        run_stages.run_pipeline(stages.read(file, out))

    code, _ = in_fork(run)
    return file, out, code


def test_a_killed_pipeline_goes_on_in_the_stage_where_it_was(straight, killed):
    file, out, code = killed
    assert code == -signal.SIGKILL and (out / "reward" / "checkpoints" / "step-1").is_dir()
    assert not (out / "dpo").exists()
    sft = {path: path.stat().st_mtime_ns for path in (out / "sft").rglob("*")}
    checkpoint = (out / "reward" / "checkpoints" / "step-1").stat().st_mtime_ns
    lines = []
    facts = run_stages.run_pipeline(stages.read(file, out), note=lines.append)
    assert [one["action"] for one in facts["stages"]] == ["unchanged", "resume", "train"]
    assert any("reward, reward on the result of sft: resume (interrupted after the checkpoint of step 1)" in one for one in lines)
    assert sft == {path: path.stat().st_mtime_ns for path in (out / "sft").rglob("*")}
    assert checkpoint == (out / "reward" / "checkpoints" / "step-1").stat().st_mtime_ns, "step 1 was taken again"
    for name in ALL:
        assert apart(weights(straight[1] / name / "model"), weights(out / name / "model")) == 0
        assert history(straight[1] / name) == history(out / name)
    assert facts["comparison"]["prompts"] == straight[2]["comparison"]["prompts"]


def test_an_error_names_its_stage_and_keeps_its_exit_code(copied, monkeypatch):
    file, out = copied

    def fail(*args, **keys):
        raise StoppedError("the loss is not finite")

    monkeypatch.setattr(run_stages.run, "train", fail)
    with pytest.raises(StoppedError, match=r"pipe.yaml, line \d+: stage dpo: the loss is not finite"):
        run_stages.run_pipeline(stages.read(file, out, "dpo.seed=3"))
    assert actions(stages.read(file, out, "dpo.seed=3"))["reward"] == "unchanged"


GRPO = "dpo.objective={{type: grpo, rewards: [{}]}}"

MISFITS = [
    (("dpo.model={stage: reward}",), "dpo trains a language model, and {stage: reward} has a task head"),
    (("dpo.adapter=null",), "adapter: missing, and the result of stage sft is an adapter"),
    (("sft.adaptation=full",), "adapter: merge: the result of stage sft is a full model"),
    (("sft.adaptation=bottleneck",), "adapter: merge: the adapter of stage sft is a layer with a non-linearity"),
    (("dpo.adapter=continue", "dpo.adaptation=ia3"), "adapter: continue: the adapter of stage sft is of another type"),
    ((GRPO.format("{type: model, path: {stage: sft}}"),), "{stage: sft} is a model of sft, which gives no rewards"),
    (("dpo.data.train.0.path=none.jsonl",), "none.jsonl"),
    (("sft.train.batch_size=3", "dpo.train.max_length=9999"), "max_length 9999 is above the model's window"),
]


@pytest.mark.parametrize(("overrides", "words"), MISFITS, ids=lambda one: str(one)[:40])
def test_a_stage_that_cannot_work_is_found_before_the_first_one_starts(straight, tmp_path, overrides, words):
    file = straight[0]
    with pytest.raises(UserError) as raised:
        run_stages.run_pipeline(stages.read(file, tmp_path / "out", *overrides), dry_run=True)
    assert words in str(raised.value) and "pipe.yaml, line" in str(raised.value) and "stage " in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_reward_may_be_the_result_of_a_stage_and_its_code_is_part_of_the_stage(straight, tmp_path):
    file, out, _, _ = straight
    pipeline = stages.read(file, out, GRPO.format("{type: model, path: {stage: reward}}"))
    dpo = pipeline.stage("dpo")
    assert dpo.inputs == {"model": "sft", "objective.rewards.0.path": "reward"}
    assert dpo.recipe.objective.rewards[0].path == str(out / "reward")
    assert stage_checks.stand_in(pipeline, dpo, frozenset({"sft"})) is None, "its data are checked when there is a reward model"
    assert {*stage_manifest.describe(pipeline, dpo)["inputs"]} == {"model", "objective.rewards.0.path"}
    (tmp_path / "brevity.py").write_text("def reward(prompts, completions, rows): return [0.0] * len(prompts)\n")
    python = GRPO.format(f"{{type: python, call: 'brevity:reward', folder: {tmp_path}}}")
    before = stage_manifest.describe(pipeline := stages.read(file, out, python), pipeline.stage("dpo"))
    (tmp_path / "brevity.py").write_text("def reward(prompts, completions, rows): return [1.0] * len(prompts)\n")
    now = stage_manifest.describe(pipeline, pipeline.stage("dpo"))
    assert stage_manifest.changes(before, now) == [f"files: {tmp_path / 'brevity.py'} changed"]


def test_the_model_of_a_check_has_what_the_stages_before_it_save(straight, tmp_path):
    """The result of sft is not there yet: the base model stands in, with the tokens and the template that sft would save."""
    tokens, template = "sft.add_tokens=['<x>', '<y>']", "sft.data.template=alpaca"
    pipeline = stages.read(straight[0], tmp_path / "out", tokens, template, "dpo.add_tokens=['<y>', '<z>']")
    recipe = stage_checks.stand_in(pipeline, pipeline.stage("dpo"), frozenset())
    assert recipe.model.endswith("base") and recipe.adapter is None
    assert recipe.add_tokens == ["<x>", "<y>", "<z>"] and recipe.data.template == "alpaca"
    there = stage_checks.stand_in(pipeline, pipeline.stage("dpo"), frozenset({"sft"}))
    assert there == pipeline.stage("dpo").recipe
