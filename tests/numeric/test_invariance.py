"""The update does not depend on how a step is split, laid out, or shared over processes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

import tunesmith
from tests.runs import apart, model_folder, recipe, weights
from tests.tiny import TINY
from tunesmith.runs import metrics_file

SPLITS = [{"micro_batch_tokens": 1}, {"micro_batch_tokens": 60}, {"packing": "off"}, {"packing": "off", "micro_batch_tokens": 90}]
ADAPTATIONS = {"full": "full", "lora": {"type": "lora", "r": 4}, "lora-dropout": {"type": "lora", "r": 4, "lora_dropout": 0.3}}
OTHERS = {
    "features": {"type": "features", "train_last": 1},
    "head": {"type": "features", "target_modules": ["lm_head"]},
    "qlora": {"type": "qlora", "r": 4, "lora_dropout": 0.3},
    "bottleneck": {"type": "bottleneck", "bottleneck_size": 4, "variant": "houlsby", "dropout": 0.3},
    "prefix": {"type": "prefix", "num_virtual_tokens": 4},
    "projected": {"type": "prefix", "num_virtual_tokens": 4, "prefix_projection": True},
    "prompt": {"type": "prompt", "num_virtual_tokens": 4},
    "ia3": "ia3",
}
"""What a row's loss is, is the objective's affair and the same for all: these are split with one of them."""


def needs_bitsandbytes(adaptation):
    if adaptation == "qlora":
        pytest.importorskip("bitsandbytes")


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


@pytest.mark.parametrize("adaptation", OTHERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_any_split_makes_the_same_update_and_evaluation_of_every_adaptation(name, adaptation, tmp_path):
    needs_bitsandbytes(adaptation)
    made = recipe(tmp_path, name, "sft", OTHERS[adaptation], learning_rate=1e-3, optim_args={"eps": 1e-3}, eval_steps=2)
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
    runs = [{}, *SPLITS]
    found = [
        tunesmith.train({**made, "train": {**made["train"], **split}}, out=tmp_path / str(number))
        for number, split in enumerate(runs)
    ]
    whole = weights(found[0]["model_dir"])
    for split, outcome in zip(runs, found):
        assert apart(whole, weights(outcome["model_dir"])) <= 1e-6, split
        for figure in ("eval_loss_before", "eval_loss"):
            assert outcome[figure] == pytest.approx(found[0][figure], abs=1e-6), split
    assert found[0]["eval_loss"] != found[0]["eval_loss_before"]


def test_model_dropout_makes_the_same_update_for_any_split(tmp_path):
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
for recipe, out in json.loads(sys.argv[1]):
    tunesmith.train(recipe, out=out)
"""


def in_two_processes(runs, tmp_path):
    """Train each (recipe, folder), one after the other in one launch: most of its time is taken by imports."""
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command.append(json.dumps([(made, str(folder)) for made, folder in runs]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def same_run(one, other):
    """The weights of two finished runs, and what they said on the way."""
    assert apart(weights(one / "model"), weights(other / "model")) <= 1e-6, other.name
    for kind, figure in (("eval", "eval_loss"), ("train", "update_ratio")):
        ours, theirs = (
            [record[figure] for record in metrics_file.read(run / "metrics.jsonl") if record["kind"] == kind]
            for run in (one, other)
        )
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), other.name


DRAWN_AND_RECOMPUTED = {"neftune_noise_alpha": 5.0, "gradient_checkpointing": True}


@pytest.mark.parametrize("adaptation", ["lora-dropout", "bottleneck", "prefix", "prompt"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_noise_on_the_embeddings_and_recomputed_layers_make_the_same_update_for_any_split(name, adaptation, tmp_path):
    model_folder(tmp_path, name, **({"resid_pdrop": 0.2, "embd_pdrop": 0.1} if name == "gpt2" else {}))
    chosen = {**ADAPTATIONS, **OTHERS}[adaptation]
    made = recipe(tmp_path, name, "sft", chosen, learning_rate=1e-3, optim_args={"eps": 1e-3})
    made["train"] |= DRAWN_AND_RECOMPUTED
    whole = train(made, tmp_path / "whole")
    for number, split in enumerate(SPLITS):
        other = train({**made, "train": {**made["train"], **split}}, tmp_path / str(number))
        assert apart(whole, other) <= 1e-6, split


def test_two_processes_make_the_update_of_one(tmp_path):
    chosen = {"full": ("full", {}), "lora": (ADAPTATIONS["lora-dropout"], DRAWN_AND_RECOMPUTED)}
    chosen |= {name: (adaptation, {}) for name, adaptation in OTHERS.items() if name != "qlora" or find_spec("bitsandbytes")}
    runs = {}
    for name, (adaptation, more) in chosen.items():
        made = recipe(tmp_path, "llama", "sft", adaptation, learning_rate=1e-3, optim_args={"eps": 1e-3}, eval_steps=2, **more)
        made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
        tunesmith.train(made, out=tmp_path / name)
        runs[name] = (made, tmp_path / f"{name}-in-two")
    in_two_processes(list(runs.values()), tmp_path)
    for name, (_, both) in runs.items():
        assert json.loads((both / "manifest.json").read_text())["processes"] == 2
        same_run(tmp_path / name, both)
