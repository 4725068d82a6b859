"""Runs under DeepSpeed's ZeRO-2 equal those of one process, their checkpoints do not depend on it, and a conflicting configuration is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

import tunesmith
from tests.runs import apart, model_folder, recipe, weights
from tests.train.launching import forked, launched
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.data.batch.step import Listed, Step
from tunesmith.errors import MissingExtra, RecipeError
from tunesmith.objectives import sft
from tunesmith.runs import metrics_file
from tunesmith.train import checkpoint, deepspeed_zero
from tunesmith.train.train_config import TrainConfig

ADAPTATIONS = {"full": "full", "lora": {"type": "lora", "r": 4, "lora_dropout": 0.3}}


def configuration(folder, content=None):
    path = folder / "ds_config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": "auto", **(content or {})}))
    return path


def run_of(tmp_path, adaptation, **train):
    """Steps of 5, 5 and 2 rows in micro-batches of about two: one of two processes is without rows now and then."""
    made = recipe(
        tmp_path, adaptation=ADAPTATIONS[adaptation],
        **{"max_steps": 6, "micro_batch_tokens": 40, "eval_steps": 2, "save_steps": 1, "save_total_limit": 9, **train},
    )  # fmt: skip
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl"), "limit": 3}
    return made


def records(run, kind, *keys):
    return [[record[key] for key in keys] for record in metrics_file.read(run / "metrics.jsonl") if record["kind"] == kind]


@pytest.mark.parametrize(
    ("adaptation", "launches"), [("lora", False), ("full", False), pytest.param("full", True, marks=pytest.mark.long)]
)
def test_two_processes_with_shards_make_the_run_of_one(adaptation, launches, tmp_path):
    pytest.importorskip("deepspeed")
    made = run_of(tmp_path, adaptation)
    tunesmith.train(made, out=tmp_path / "straight")
    if not launches:
        assert forked(made, tmp_path / "run", deepspeed=configuration(tmp_path)) == [0, 0]
    else:  # the command line must not print what DeepSpeed prints
        code, out, err = launched(made, tmp_path, "--json", "--deepspeed", configuration(tmp_path), fresh=True)
        assert code == 0 and json.loads(out)["steps"] == 6, err
        assert "DeepSpeed" not in err and "Warning" not in err, err
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert apart(weights(straight / "model"), weights(run / "model")) <= 1e-6
    for kind, keys in (("eval", ["eval_loss"]), ("train", ["loss", "grad_norm"])):
        assert np.allclose(records(straight, kind, *keys), records(run, kind, *keys), rtol=1e-6, atol=1e-6)

    ours, theirs = (checkpoint.load(one / "checkpoints", 6) for one in (straight, run))
    assert ours[0].keys() == theirs[0].keys()
    assert (
        max(float((ours[0][name].float() - theirs[0][name].float()).abs().max()) for name in ours[0] if "random" not in name)
        < 1e-5
    )


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_a_run_goes_on_with_shards_and_without(adaptation, tmp_path):
    """One process to step 1, two sharded ones to step 4 (they are stopped once step 3 is saved), then one again."""
    pytest.importorskip("deepspeed")
    made = run_of(tmp_path, adaptation)
    tunesmith.train(made, out=tmp_path / "straight")
    with pytest.raises(InterruptedError):
        tunesmith.train(made, out=tmp_path / "run", on_save=stop_at_once)
    sharded = {"resume": True, "deepspeed": configuration(tmp_path)}
    assert forked(made, tmp_path / "run", **sharded, on_save=stop_at_three) == [1, 1]
    assert max(checkpoint.steps(tmp_path / "run" / "checkpoints")) == 4
    outcome = tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert outcome["steps"] == 6
    assert apart(weights(tmp_path / "straight" / "model"), weights(outcome["model_dir"])) <= 1e-6


VARIED = {
    "bf16, full": {"train": {"precision": "bf16", "learning_rate": 1e-3}},
    "bf16, new tokens and a trained head": {
        "adaptation": {"type": "lora", "r": 4, "modules_to_save": ["lm_head"]}, "add_tokens": ["<tool>"], "train": {"precision": "bf16"},
    },
    "recomputed, new tokens": {"adaptation": {"type": "lora", "r": 4}, "add_tokens": ["<tool>"], "train": {"gradient_checkpointing": True}},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param("bf16, full", marks=pytest.mark.long), *(name for name in VARIED if name != "bf16, full")]
)
def test_precisions_new_tokens_and_recomputation_work_with_shards(name, tmp_path):
    """In bf16 the working copies are rounded with other random bits than without shards, so losses agree to a tolerance. A resumed run is equal."""
    pytest.importorskip("deepspeed")
    varied = VARIED[name]
    made = run_of(tmp_path, "full", **varied["train"], max_steps=4)
    made |= {key: value for key, value in varied.items() if key != "train"}
    if "modules_to_save" in str(varied):
        made["model"] = str(model_folder(tmp_path, "qwen3", tie_word_embeddings=False))
    tunesmith.train(made, out=tmp_path / "straight")
    sharded = configuration(tmp_path)
    assert forked(made, tmp_path / "run", deepspeed=sharded) == [0, 0]
    straight, run = tmp_path / "straight", tmp_path / "run"
    bf16 = varied["train"].get("precision") == "bf16"
    assert np.allclose(records(straight, "train", "loss"), records(run, "train", "loss"), rtol=5e-3 if bf16 else 1e-6)
    assert bf16 or apart(weights(straight / "model"), weights(run / "model")) <= 1e-6

    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    before = metrics_file.read(run / "metrics.jsonl")
    assert forked(made, tmp_path / "run", deepspeed=sharded, resume=True) == [0, 0]
    lasting = [{k: v for k, v in one.items() if k not in metrics_file.TIMING_KEYS} for one in before]
    assert [
        {k: v for k, v in one.items() if k not in metrics_file.TIMING_KEYS} for one in metrics_file.read(run / "metrics.jsonl")
    ] == lasting


def stop_at_once(folder, step):
    raise InterruptedError


def stop_at_three(folder, step):
    if step == 3:
        raise InterruptedError


def test_one_process_needs_no_launcher_and_compiles_nothing(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    made = run_of(tmp_path, "lora", max_steps=2)
    tunesmith.train(made, out=tmp_path / "straight")
    assert forked(made, tmp_path / "run", number=1, deepspeed=configuration(tmp_path)) == [0]
    assert apart(weights(tmp_path / "straight" / "model"), weights(tmp_path / "run" / "model")) <= 1e-6
    assert not (tmp_path / "extensions").exists()


REFUSED = {
    "no JSON": ("{", "ds_config.json:1: invalid JSON"),
    "a list": ("[]", 'expected an object with a key "zero_optimization"'),
    "no stage": ('{"zero_optimization": {}}', "zero_optimization.stage"),
    "stage 3": ('{"zero_optimization": {"stage": 3}}', r"stage\" is 3; expected 2"),
    "an optimiser": ('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}', "train.optim, train.learning_rate"),
    "a batch size": ('{"zero_optimization": {"stage": 2}, "train_batch_size": 64}', "train.batch_size"),
    "a number format": ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "train.precision"),
    "offloading": ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}', "offload_optimizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_the_recipe_or_is_untried_is_refused(name, tmp_path):
    content, told = REFUSED[name]
    path = tmp_path / "ds_config.json"
    path.write_text(content)
    with pytest.raises(RecipeError, match=told):
        deepspeed_zero.read(path, TrainConfig(), torch.float32)


@pytest.mark.parametrize(("optim", "compute"), [("adafactor", torch.float32), ("adamw", torch.float16)])
def test_an_optimiser_of_matrices_and_fp16_are_refused(optim, compute, tmp_path):
    with pytest.raises(RecipeError, match="conflicts with --deepspeed"):
        deepspeed_zero.read(configuration(tmp_path), TrainConfig(optim=optim), compute)


def test_its_absence_is_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"tunesmith\[deepspeed\]"):
        deepspeed_zero.read(configuration(tmp_path), TrainConfig(), torch.float32)


def test_communication_settings_of_the_file_are_kept_and_auto_is_filled_in(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    path = configuration(
        tmp_path,
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": "auto"}, "bf16": {"enabled": "auto"}},
    )
    made = deepspeed_zero.read(path, TrainConfig(max_grad_norm=0.5), torch.bfloat16).complete
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert made["bf16"] == {"enabled": True} and made["gradient_clipping"] == 0.5


@pytest.mark.parametrize("layout", [PACKED, PADDED], ids=["packed", "padded"])
def test_every_process_gets_as_many_micro_batches_while_its_rows_last(layout):
    rows = [{"input_ids": np.zeros(length), "supervised": np.ones(length, bool)} for length in (9, 1, 9, 1, 9, 1, 2, 1)]
    step = Step(1, Listed(rows, list("abcdefgh")), np.arange(8), sft.Objective(sft.Config()).collate)
    parts = [step.split(9, layout, process, 2) for process in (0, 1)]
    assert [len(groups) for groups in parts] == [4, 4] or [len(groups) for groups in parts] == [3, 3]
    assert sorted(place for groups in parts for group in groups for place in group) == list(range(8))
    for process in (0, 1):
        assert len(step.micro_batches(9, layout, process, 2, even=True)) == len(parts[0])
