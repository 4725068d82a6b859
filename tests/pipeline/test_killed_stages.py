"""A pipeline that is killed in every kind of stage, one after another, ends with what an undisturbed one makes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from typing import Any

import pytest

from tests.kill_points import in_fork
from tests.pipeline import stages
from tests.rollout import sampling
from tests.runs import apart, history, preferences, rows, weights
from tests.tiny import save_tiny
from tunesmith.errors import RewardError
from tunesmith.pipeline import answer_comparison, run_stages
from tunesmith.rollout.rewards import Rewards
from tunesmith.train import loop

ALL = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The file of a pipeline: sft, a reward model and PPO by the reward model, two iterations of two steps."""
    folder = tmp_path_factory.mktemp("stages")
    save_tiny("llama", folder / "base")
    for name, made in (("rows", rows(24)), ("pairs", preferences(24)), ("prompts", sampling.prompts(8))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    ppo: dict[str, Any] = {
        "type": "ppo", "rewards": [{"type": "model", "path": {"stage": "reward"}}], "rollout_batch_size": 4, "update_epochs": 2,
        "max_new_tokens": 4,
    }  # fmt: skip
    on_sft = {"model": {"stage": "sft"}, "adapter": "merge", "samples": {"count": 0}}
    listed = {
        "sft": stages.recipe(folder / "rows.jsonl", "sft", model=str(folder / "base"), samples={"count": 0}),
        "reward": stages.recipe(folder / "pairs.jsonl", "reward", **{**on_sft, "samples": None}),
        "ppo": stages.recipe(folder / "prompts.jsonl", ppo, **on_sft),
    }
    listed["ppo"]["train"] |= {"max_steps": 4}
    del listed["reward"]["samples"]
    content = {"stages": {name: {"recipe": one} for name, one in listed.items()}, "compare": {"count": 2, "max_new_tokens": 4}}
    return stages.dump(folder / "pipe.yaml", content)


@pytest.fixture(scope="module")
def straight(written, tmp_path_factory):
    """(folder, summary) of an undisturbed pipeline."""
    out = tmp_path_factory.mktemp("straight") / "out"
    return out, run_stages.run_pipeline(stages.read(written, out))


def kill_in_step(number, is_stage):
    def apply():
        train_step = loop.train_step

        def dies(job, step):
            if step.number == number and is_stage(job.objective.traits):
                os.kill(os.getpid(), signal.SIGKILL)
            return train_step(job, step)

        loop.train_step = dies

    return apply


def kill_in_comparison():
    answer_comparison.compare = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)


KILLS = [
    (kill_in_step(2, lambda traits: not traits.rewards), ["resume", "train", "train"]),
    (kill_in_step(2, lambda traits: traits.rewards), ["unchanged", "resume", "train"]),
    (lambda: sampling.kill_in("scoring"), ["unchanged", "unchanged", "resume"]),
    (lambda: sampling.kill_in("measuring"), ["unchanged", "unchanged", "resume"]),
    (kill_in_comparison, ["unchanged"] * 3),
]
"""(where the process ends, what the next start of the pipeline is to do)."""


def test_a_pipeline_that_is_killed_in_each_stage_ends_as_an_undisturbed_one(written, straight, tmp_path):
    out = tmp_path / "out"
    pipeline = stages.read(written, out)
    for kill, then in KILLS:

        def killed(kill=kill):
            kill()
            run_stages.run_pipeline(pipeline)

        assert in_fork(killed)[0] == -signal.SIGKILL
        shown = run_stages.run_pipeline(pipeline, dry_run=True)["plan"]
        assert [one["action"] for one in shown] == then
    facts = run_stages.run_pipeline(pipeline)
    assert not (out / "replaced").exists(), "no stage began again"
    for name in ALL:
        assert history(out / name) == history(straight[0] / name)
        assert apart(weights(out / name / "model"), weights(straight[0] / name / "model")) == 0
    assert facts["comparison"]["prompts"] == straight[1]["comparison"]["prompts"]


@pytest.fixture
def copied(written, straight, tmp_path):
    """The finished pipeline, with data of its own: (its file, its folder)."""
    shutil.copytree(written.parent, tmp_path / "stages")
    shutil.copytree(straight[0], tmp_path / "out")
    moved = {str(written.parent): str(tmp_path / "stages"), str(straight[0]): str(tmp_path / "out")}
    file, out = tmp_path / "stages" / "pipe.yaml", tmp_path / "out"
    for path in (file, *(out / "manifests").iterdir()):
        text = path.read_text(encoding="utf-8")
        for old, new in moved.items():
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    return file, out


def test_an_interrupted_stage_whose_checkpoints_are_damaged_begins_again(written, tmp_path):
    pipeline = stages.read(written, tmp_path / "out")

    def killed():
        kill_in_step(2, lambda traits: True)()
        run_stages.run_pipeline(pipeline)

    assert in_fork(killed)[0] == -signal.SIGKILL
    (tmp_path / "out" / "sft" / "checkpoints" / "step-1" / "state.json").unlink()
    (sft, *_) = run_stages.plan(pipeline)
    assert (sft.action, sft.reasons) == ("train", ("interrupted, and its checkpoints are damaged or gone",))


CODE = "def words(prompts, completions, rows):\n    return [{} for one in completions]\n"


def test_a_corrected_reward_goes_on_with_the_answers_of_its_stage(written, straight, tmp_path, monkeypatch):
    """A stage whose reward failed is not begun again because the code of the reward changed."""
    (tmp_path / "my_words.py").write_text(CODE.format("'many'"))
    reward = f"ppo.objective.rewards=[{{type: python, call: 'my_words:words', folder: {tmp_path}}}]"
    out = tmp_path / "out"
    shutil.copytree(straight[0], out, ignore=shutil.ignore_patterns("ppo", "ppo.json"))
    pipeline = stages.read(written, out, reward, "ppo.data.eval.fraction=0", "ppo.train.eval_steps=null")
    again = "needs no --resume: the same command goes on with this stage"
    with pytest.raises(RewardError, match=rf"stage ppo: reward words: expected a finite number(.|\n)*{again}"):
        run_stages.run_pipeline(pipeline, last="ppo")
    (tmp_path / "my_words.py").write_text(CODE.format("float(len(one.split()))"))
    ppo = run_stages.plan(pipeline)[-1]
    assert ppo.action == "resume" and any("my_words.py changed" in reason for reason in ppo.reasons)
    monkeypatch.setattr(Rewards, "score", sampling.rule)
    monkeypatch.setattr(answer_comparison, "compare", lambda *arguments: None)
    prompts, sample = [], sampling.session.RunSession.sample
    monkeypatch.setattr(sampling.session.RunSession, "sample", lambda self, asked: prompts.extend(asked) or sample(self, asked))
    run_stages.run_pipeline(pipeline)
    assert [request.prompt for request in prompts] == [4, 5, 6, 7]
    (tmp_path / "my_words.py").write_text(CODE.format("1.0"))
    assert run_stages.plan(pipeline)[-1].action == "train", "a finished stage is trained again with other code"


def test_a_full_disk_stops_the_stage_and_the_same_command_goes_on(written, straight, tmp_path):
    """No file may be as large as a checkpoint of the reward model."""
    out = tmp_path / "out"
    shutil.copytree(straight[0], out, ignore=shutil.ignore_patterns("reward", "reward.json", "ppo", "ppo.json", "summary.json"))
    limit = (straight[0] / "reward" / "checkpoints" / "step-2" / "state.safetensors").stat().st_size - 1
    pipeline = stages.read(written, out)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run_stages.run_pipeline(pipeline)

    code, answer = in_fork(full)
    assert code == 3 and "stage reward: " in answer and "the same command goes on with this stage" in answer
    assert [one.action for one in run_stages.plan(pipeline)] == ["unchanged", "resume", "train"]
    facts = run_stages.run_pipeline(pipeline, last="reward")
    assert facts["stages"][1]["current"]
    assert apart(weights(out / "reward" / "model"), weights(straight[0] / "reward" / "model")) == 0


def test_what_changed_decides_which_stages_run_again(copied):
    """The prompts belong to ppo alone, the pairs to the reward model and so to ppo, the base model to all."""
    file, out = copied
    pipeline = stages.read(file, out)

    def actions():
        return [one["action"] for one in run_stages.run_pipeline(pipeline, dry_run=True)["plan"]]

    assert actions() == ["unchanged"] * 3
    for name, expected in (("prompts", ["unchanged", "unchanged", "train"]), ("pairs", ["unchanged", "train", "train"])):
        data = file.parent / f"{name}.jsonl"
        text = data.read_text(encoding="utf-8")
        data.write_text(text.replace("question 1", "question 9"), encoding="utf-8")
        assert actions() == expected, name
        data.write_text(text, encoding="utf-8")
    shutil.rmtree(out / "sft" / "model")
    assert actions()[0] == "train"
