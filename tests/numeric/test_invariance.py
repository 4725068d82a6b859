"""The update does not depend on how a step is split, laid out, or shared over processes."""

import json
import os
import subprocess
import sys

import pytest

import tunesmith
from tests.runs import apart, recipe, weights
from tests.tiny import TINY
from tunesmith.engine import tracking

SPLITS = [{"micro_batch_tokens": 1}, {"micro_batch_tokens": 60}, {"packing": "off"}, {"packing": "off", "micro_batch_tokens": 90}]
ADAPTATIONS = {"full": "full", "lora": {"type": "lora", "r": 4}, "lora-dropout": {"type": "lora", "r": 4, "lora_dropout": 0.3}}


def train(made, out):
    return weights(tunesmith.train(made, out=out)["model_dir"])


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("objective", ["sft", "cpt"])
@pytest.mark.parametrize("name", TINY)
def test_any_split_makes_the_same_update(name, objective, adaptation, tmp_path):
    made = recipe(tmp_path, name, objective, ADAPTATIONS[adaptation], learning_rate=1e-3, optim_args={"eps": 1e-3})
    whole = train(made, tmp_path / "whole")
    for number, split in enumerate(SPLITS):
        other = train({**made, "train": {**made["train"], **split}}, tmp_path / str(number))
        assert apart(whole, other) <= 1e-6, split


def test_model_dropout_makes_the_same_update_for_any_split(tmp_path):
    from tests.runs import model_folder

    model_folder(tmp_path, "gpt2", resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.1)
    made = recipe(tmp_path, "gpt2", learning_rate=1e-3, optim_args={"eps": 1e-3})
    whole = train(made, tmp_path / "whole")
    other = train({**made, "train": {**made["train"], "micro_batch_tokens": 1}}, tmp_path / "single")
    off = train({**made, "seed": 1}, tmp_path / "other-seed")
    assert apart(whole, other) <= 1e-6 < apart(whole, off)


@pytest.mark.parametrize("objective", ["sft", "cpt"])
def test_evaluation_is_the_same_for_any_split(objective, tmp_path):
    made = recipe(tmp_path, objective=objective, count=16, eval_steps=1)
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
    found = []
    for budget in (1, 50, 100, 4096):
        outcome = tunesmith.train({**made, "train": {**made["train"], "micro_batch_tokens": budget}}, out=tmp_path / str(budget))
        found.append((outcome["eval_loss_before"], outcome["eval_loss"]))
    assert all(one == pytest.approx(found[0], abs=1e-6) for one in found)


LAUNCHED = """
import sys, json, tunesmith
recipe, out = json.loads(sys.argv[1]), sys.argv[2]
print(json.dumps(tunesmith.train(recipe, out=out)))
"""


DRAWN_AND_RECOMPUTED = {"neftune_noise_alpha": 5.0, "gradient_checkpointing": True}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_noise_on_the_embeddings_and_recomputed_layers_make_the_same_update_for_any_split(name, tmp_path):
    made = recipe(tmp_path, name, "sft", ADAPTATIONS["lora-dropout"], learning_rate=1e-3, optim_args={"eps": 1e-3})
    made["train"] |= DRAWN_AND_RECOMPUTED
    whole = train(made, tmp_path / "whole")
    for number, split in enumerate(SPLITS):
        other = train({**made, "train": {**made["train"], **split}}, tmp_path / str(number))
        assert apart(whole, other) <= 1e-6, split


@pytest.mark.parametrize(("adaptation", "extra"), [("full", {}), ("lora-dropout", DRAWN_AND_RECOMPUTED)], ids=["full", "lora"])
def test_two_processes_make_the_update_of_one(adaptation, extra, tmp_path):
    made = recipe(
        tmp_path, "llama", "sft", ADAPTATIONS[adaptation], learning_rate=1e-3, optim_args={"eps": 1e-3}, eval_steps=2, **extra
    )
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    alone, both = tmp_path / "one", tmp_path / "two"
    expected = tunesmith.train(made, out=alone)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        json.dumps(made),
        str(both),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert apart(weights(expected["model_dir"]), weights(both / "model")) <= 1e-6
    for kind, figure in (("eval", "eval_loss"), ("train", "update_ratio")):
        ours, theirs = (
            [record[figure] for record in tracking.read(run / "metrics.jsonl") if record["kind"] == kind] for run in (alone, both)
        )
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
