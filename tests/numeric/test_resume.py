"""A run that was killed and resumed is the undisturbed run: weights, optimiser, row order and metrics, bit for bit."""

import json
import os
import signal
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tunesmith
from tests import processes
from tests.numeric.test_invariance import OTHERS
from tests.runs import apart, history, killed_before, model_folder, recipe, weights
from tests.shortened import shortened
from tunesmith.data.store import hold_out
from tunesmith.errors import Interrupted, RecipeError
from tunesmith.models.load import compute_dtype
from tunesmith.train import loop, update_ratio

ADAPTATIONS = {
    "full": "full",
    "lora": {"type": "lora", "r": 4, "lora_dropout": 0.2},
    "prefix": {"type": "prefix", "num_virtual_tokens": 3, "prefix_projection": True},
    "prompt": {"type": "prompt", "num_virtual_tokens": 3},
}


class Killed(BaseException):
    """Stands for a kill: nothing in the product catches it."""


def longer(tmp_path, adaptation="lora", **train):
    made = recipe(
        tmp_path,
        "llama",
        "sft",
        ADAPTATIONS[adaptation],
        count=14,
        **{"max_steps": 9, "logging_steps": 2, "eval_steps": 4, **train},
    )
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl"), "limit": 4}
    made["samples"] = {"count": 1, "max_new_tokens": 3}
    return made


def same_checkpoint(one, other):
    ours, theirs = load_file(one / "state.safetensors"), load_file(other / "state.safetensors")
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


STOPPED = [
    ("lora", 1, "fp32", (1, 9)),
    ("lora", 1, "fp32", (4,)),
    ("full", 5, "fp32", (4, 9)),
    ("full", 3, "bf16", (5,)),
    ("prefix", 3, "bf16", (4,)),
    ("prompt", 5, "fp32", (9,)),
]


@pytest.mark.parametrize(("adaptation", "save_steps", "precision", "victims"), shortened(STOPPED, [STOPPED[0], STOPPED[3]]))
def test_stopped_at_any_step_and_resumed(adaptation, save_steps, precision, victims, tmp_path, monkeypatch):
    made = longer(tmp_path, adaptation, save_steps=save_steps, save_total_limit=20, precision=precision)
    straight = tmp_path / "straight"
    expected = tunesmith.train(made, out=straight)
    train_step = loop.train_step
    for victim in victims:
        run = tmp_path / f"killed-{victim}"

        def dies(job, step, victim=victim):
            if step.number == victim:
                raise Killed
            return train_step(job, step)

        monkeypatch.setattr(loop, "train_step", dies)
        with pytest.raises(Killed):
            tunesmith.train(made, out=run)
        monkeypatch.setattr(loop, "train_step", train_step)
        outcome = tunesmith.train(made, out=run, resume=True)
        assert history(run) == history(straight)
        assert same_checkpoint(run / "checkpoints" / "step-9", straight / "checkpoints" / "step-9")
        ours, theirs = weights(outcome["model_dir"]), weights(expected["model_dir"])
        assert all(ours[name].equal(theirs[name]) for name in theirs)
        assert (run / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


@pytest.mark.parametrize("adaptation", shortened(["bottleneck", "prefix", "prompt", "qlora", "ia3"], ["bottleneck", "prompt"]))
def test_the_networks_own_dropout_is_drawn_as_it_would_have_been(adaptation, tmp_path):
    if adaptation == "qlora":
        pytest.importorskip("bitsandbytes")
    model_folder(tmp_path, "gpt2", resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.1)
    made = recipe(tmp_path, "gpt2", adaptation=OTHERS[adaptation], precision="bf16", save_steps=1, logging_steps=1)
    tunesmith.train(made, out=tmp_path / "straight")
    killed_before(3, made, tmp_path / "run")
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert history(tmp_path / "run") == history(tmp_path / "straight")
    assert same_checkpoint(tmp_path / "run" / "checkpoints" / "step-4", tmp_path / "straight" / "checkpoints" / "step-4")


SCRIPT = """
import sys, json, os, tunesmith
recipe, out = json.loads(sys.argv[1]), sys.argv[2]
tunesmith.train(recipe, out=out, resume=os.path.exists(os.path.join(out, "recipe.yaml")))
"""


def start(made, out):
    return processes.start([sys.executable, "-c", SCRIPT, json.dumps(made), str(out)])


def wait_for_records(run, count, process):
    """Until the run has written ``count`` records, or has ended."""
    file = run / "metrics.jsonl"
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < count):
        time.sleep(0.002)


def test_kill_nine_of_a_real_process(tmp_path):
    made = longer(tmp_path, max_steps=14, save_steps=2, logging_steps=1)
    straight, run = tmp_path / "straight", tmp_path / "killed"
    assert start(made, straight).wait() == 0
    for records in (4, 11):
        process = start(made, run)
        wait_for_records(run, records, process)
        process.kill()
        process.wait()
    process = start(made, run)
    assert process.wait() == 0, process.output()[1]
    assert history(run) == history(straight)
    assert same_checkpoint(run / "checkpoints" / "step-14", straight / "checkpoints" / "step-14")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(number, tmp_path, monkeypatch):
    made = longer(tmp_path)
    train_step = loop.train_step

    def signalled(job, step):
        record = train_step(job, step)
        if step.number == 3:
            os.kill(os.getpid(), number)
        return record

    monkeypatch.setattr(loop, "train_step", signalled)
    with pytest.raises(Interrupted, match="step 3"):
        tunesmith.train(made, out=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-3" / "manifest.json").exists()
    monkeypatch.setattr(loop, "train_step", train_step)
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    tunesmith.train(made, out=tmp_path / "straight")
    assert history(tmp_path / "run") == history(tmp_path / "straight")


def test_a_finished_run_stays_as_it_is(tmp_path):
    made = longer(tmp_path)
    first = tunesmith.train(made, out=tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json*")}
    assert tunesmith.train(made, out=tmp_path / "run", resume=True) == json.loads(json.dumps(first))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json*")} == before


def test_another_recipe_is_not_resumed(tmp_path):
    made = longer(tmp_path)
    tunesmith.train(made, out=tmp_path / "run")
    with pytest.raises(RecipeError, match=r"train.learning_rate: was 0.01, is 0.5"):
        tunesmith.train(made, out=tmp_path / "run", resume=True, overrides=["train.learning_rate=0.5"])


def test_a_run_goes_on_with_other_keys_that_change_no_result(tmp_path):
    """One that did not fit: smaller micro-batches, recomputed layers, and none of the result is another."""
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 4, "lora_dropout": 0.3}, save_steps=1, max_steps=4)
    straight = tunesmith.train(made, out=tmp_path / "straight")
    tunesmith.train(made, out=tmp_path / "run", on_save=lambda folder, step: step == 2)
    other = {**made, "train": {**made["train"], "micro_batch_tokens": 40, "gradient_checkpointing": True, "save_total_limit": 5}}
    outcome = tunesmith.train(other, out=tmp_path / "run", resume=True)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert outcome["steps"] == 4 and manifest["micro_batch_tokens"] == 40 and manifest["route"]["recomputed"]
    assert any("changed since the run was started" in note and "micro_batch_tokens" in note for note in manifest["notes"])
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["train"]["micro_batch_tokens"] == 40
    assert apart(weights(straight["model_dir"]), weights(outcome["model_dir"])) <= 1e-6


def test_another_number_format_is_said_and_fp16_keeps_its_scale(tmp_path, monkeypatch):
    """As on another machine: `auto` chose fp32 there, and chooses fp16 here."""
    made = recipe(tmp_path, save_steps=1, max_steps=4, precision="auto")
    kind = [torch.float32]
    monkeypatch.setattr(compute_dtype, "choose", lambda wanted, device: compute_dtype.ComputeDtype(kind[0], "this machine"))
    tunesmith.train(made, out=tmp_path / "run", on_save=lambda folder, step: step == 2)
    kind[0] = torch.float16
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]
    assert any("computed in float32 so far and continues in float16" in note for note in notes)
    assert [record.get("loss_scale") for record in history(tmp_path / "run") if record["kind"] == "train"] == [
        None,
        None,
        2.0**16,
        2.0**16,
    ]


def test_a_tensor_that_stands_still_changes_no_figure_of_a_resumed_run(tmp_path, monkeypatch):
    """It is looked at more closely once, counted from where a process began."""
    monkeypatch.setattr(update_ratio, "RUNS", 1)  # the sample misses what moves in the rest
    made = recipe(tmp_path, save_steps=3, max_steps=9)
    tunesmith.train(made, out=tmp_path / "straight")
    tunesmith.train(made, out=tmp_path / "run", on_save=lambda folder, step: step == 3)
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert history(tmp_path / "run") == history(tmp_path / "straight")


def test_changed_data_is_not_resumed(tmp_path):
    made = longer(tmp_path)
    tunesmith.train(made, out=tmp_path / "run")
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text().replace("question 0", "question zero"))
    with pytest.raises(RecipeError, match="changed since the run was started"):
        tunesmith.train(made, out=tmp_path / "run", resume=True)


def test_a_run_whose_held_out_rows_a_version_chose_otherwise_is_not_resumed(tmp_path, monkeypatch):
    made = longer(tmp_path, max_steps=2, eval_steps=None)
    made["data"]["eval"] = {"fraction": 0.3}
    tunesmith.train(made, out=tmp_path / "run")
    monkeypatch.setattr(hold_out, "hashes", lambda keys, seed: keys)
    with pytest.raises(RecipeError, match="holds out other rows"):
        tunesmith.train(made, out=tmp_path / "run", resume=True)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    made = longer(tmp_path, save_steps=3, save_total_limit=9)
    tunesmith.train(made, out=tmp_path / "straight")
    tunesmith.train(made, out=tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "step-9" / "state.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    outcome = tunesmith.train(made, out=tmp_path / "run", resume=True)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert any("step-9 is damaged (state.safetensors does not match its checksum)" in note for note in manifest["notes"])
    assert outcome["steps"] == 9 and history(tmp_path / "run") == history(tmp_path / "straight")
