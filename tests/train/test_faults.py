"""Faults of a run: a loss of NaN, a full disk, two processes in one folder. The last good state always survives."""

import errno
import json
import math
import os

import pytest
import torch

import tunesmith
from tests.runs import history, recipe, weights
from tunesmith import files
from tunesmith.errors import DiskFullError, NonFiniteError, UserError
from tunesmith.models.heads import lm_head
from tunesmith.runs import metrics_file, run_folder
from tunesmith.train import checkpoint, evaluation

LOSS = lm_head.lm_loss


def poisoned(label, value):
    """The loss function, with ``value`` added where a batch holds a row of exactly ``label`` supervised tokens."""

    def loss(model, batch):
        hit = label in batch.get("segments", ())
        return LOSS(model, batch) * (value if hit else 1.0)

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_row(value, tmp_path, monkeypatch):
    made = recipe(tmp_path, batch_size=2, max_steps=6, save_steps=1, shuffle=False, save_total_limit=9)
    growing = [json.dumps({"prompt": f"{n} question:" + " fox" * n, "completion": " x"}) for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(growing))
    short = {**made, "train": {**made["train"], "max_steps": 3, "lr_scheduler_type": "constant"}}
    made["train"]["lr_scheduler_type"] = "constant"
    expected = weights(tunesmith.train(short, out=tmp_path / "three")["model_dir"])
    guilty = _length_of_row(made, 7)
    monkeypatch.setattr(lm_head, "lm_loss", poisoned(guilty, value))
    with pytest.raises(NonFiniteError, match=r"step 4: .*no update") as caught:
        tunesmith.train(made, out=tmp_path / "run")
    assert caught.value.exit_code == 3
    assert "rows.jsonl:8" in str(caught.value) and "rows.jsonl:7" not in str(caught.value)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1, 2, 3]
    tensors, _ = checkpoint.load(tmp_path / "run" / "checkpoints", 3)
    assert all(torch.equal(tensors[f"master.{name}"], value) for name, value in expected.items())
    last = metrics_file.read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["kind"] == "stop" and not math.isfinite(last["loss"])


def _length_of_row(made, row):
    from tunesmith.data.data_config import DataConfig
    from tunesmith.data.store.prepare import prepare
    from tunesmith.models.load import load
    from tunesmith.objectives import sft

    tokenizer = load.load_tokenizer(load.locate(made["model"]))
    objective = sft.Objective(sft.Config())
    data = prepare(DataConfig.model_validate(made["data"]), objective, tokenizer, max_length=None, window=None, seed=0).train
    lengths = data.lengths.tolist()
    assert lengths.count(lengths[row]) == 1, "the row must be recognisable by its length"
    return lengths[row]


def test_a_gradient_that_is_not_finite_stops_too(tmp_path, monkeypatch):
    made = recipe(tmp_path, max_steps=2)

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan

    monkeypatch.setattr(
        lm_head, "lm_loss", lambda model, batch: Bad.apply(LOSS(model, batch)) if model.training else LOSS(model, batch)
    )
    with pytest.raises(NonFiniteError, match="each alone has a finite loss"):
        tunesmith.train(made, out=tmp_path / "run")


def test_no_room_for_a_checkpoint(tmp_path, monkeypatch):
    made = recipe(tmp_path, max_steps=4, save_steps=1, save_total_limit=9)
    free = files.free_disk_bytes
    calls = []

    def shrinking(path):
        calls.append(path)
        return 1000 if len(calls) > 2 else free(path)

    monkeypatch.setattr(files, "free_disk_bytes", shrinking)
    with pytest.raises(DiskFullError, match=r"needs .* are free"):
        tunesmith.train(made, out=tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1, 2]
    monkeypatch.setattr(files, "free_disk_bytes", free)
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    tunesmith.train(made, out=tmp_path / "straight")
    assert history(tmp_path / "run") == history(tmp_path / "straight")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("failing", ["state.safetensors", "state.json", "manifest.json"])
def test_the_disk_fills_while_a_checkpoint_is_written(number, failing, tmp_path, monkeypatch):
    tensors = {"master.w": torch.arange(4.0)}
    checkpoint.save(tmp_path, 1, tensors, {"a": 1})
    _fail_when_writing(monkeypatch, failing, number)
    with pytest.raises(DiskFullError):
        checkpoint.save(tmp_path, 2, tensors, {"a": 2})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert checkpoint.newest(tmp_path) == (1, {})
    found, state = checkpoint.load(tmp_path, 1)
    assert torch.equal(found["master.w"], tensors["master.w"]) and state == {"a": 1}


def _fail_when_writing(monkeypatch, failing, number):
    from pathlib import Path

    save_file, write_text = checkpoint.save_file, Path.write_text

    def full(name):
        if name == failing:
            raise OSError(number, "no room")

    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path: (full(path.name), save_file(tensors, path)))
    monkeypatch.setattr(Path, "write_text", lambda path, *args, **kwargs: (full(path.name), write_text(path, *args, **kwargs))[1])


@pytest.mark.parametrize("name", [*checkpoint.FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "deleted"])
def test_any_damage_is_noticed(name, damage, tmp_path):
    checkpoint.save(tmp_path, 3, {"master.w": torch.arange(64.0)}, {"a": 1})
    checkpoint.save(tmp_path, 5, {"master.w": torch.arange(64.0)}, {"a": 2})
    file = tmp_path / "step-5" / name
    content = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        file.write_bytes({"empty": b"", "half": content[: len(content) // 2], "flipped": bytes(flipped)}[damage])
    step, damaged = checkpoint.newest(tmp_path)
    harmless = name == "manifest.json" and damage == "flipped" and step == 5 and checkpoint.load_state(tmp_path, 5) == {"a": 2}
    assert harmless or (step == 3 and list(damaged) == [5])


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    target = tmp_path / "model"
    files.publish_folder(target, lambda path: (path / "a").write_text("old") and None, 0)
    target.rename(tmp_path / ".model.replaced")
    (tmp_path / ".model.77.tmp").mkdir()
    (tmp_path / ".manifest.json.77.tmp").write_text("{")
    files.recover(target)
    assert (target / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rotation_keeps_the_newest_and_the_pinned(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, step, {"w": torch.zeros(1)}, {})
        checkpoint.rotate(tmp_path, 2, {2})
    assert checkpoint.steps(tmp_path) == [2, 4, 5]


def test_a_second_process_is_refused(tmp_path):
    held = run_folder.claim(tmp_path / "run")
    for start in ("new", "resume", "restart"):
        with pytest.raises(UserError, match=f"another process .pid {os.getpid()}"):
            run_folder.claim(tmp_path / "run", start)
    held.close()
    assert not (tmp_path / "run").exists()  # nothing was begun in it
    run_folder.claim(tmp_path / "run").close()


def test_a_folder_that_holds_something_is_never_overwritten(tmp_path):
    made = recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    for how in ({}, {"restart": True}, {"resume": True}):
        with pytest.raises(UserError, match=r"not a run folder|no run to resume"):
            tunesmith.train(made, out=tmp_path / "run", **how)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("save_steps", "kept_steps"), [(3, [10]), (2, [4, 10])])
def test_the_best_model_is_kept_whatever_rotates(save_steps, kept_steps, tmp_path, monkeypatch):
    """The best step is in the middle of the run. One checkpoint is kept, and that of the best evaluation if it was saved."""
    figures = iter([9.0, 5.0, 2.0, math.nan, 4.0, 3.0])
    monkeypatch.setattr(evaluation, "measure", lambda *args, **options: ({"eval_loss": next(figures), "perplexity": 1.0}, []))
    made = recipe(tmp_path, max_steps=10, eval_steps=2, save_steps=save_steps, save_total_limit=1)
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
    outcome = tunesmith.train(made, out=tmp_path / "run")
    assert (outcome["best_step"], outcome["eval_loss"], outcome["eval_loss_before"]) == (4, 2.0, 9.0)
    monkeypatch.undo()
    kept = weights(outcome["model_dir"])
    tensors, state = checkpoint.load(tmp_path / "run" / "checkpoints", 10)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == kept_steps
    assert state["progression"]["best_step"] == 4 and not all(torch.equal(kept[n], tensors[f"master.{n}"]) for n in kept)


def test_early_stopping_waits_for_the_patience(tmp_path, monkeypatch):

    figures = iter([9.0, 5.0, 5.5, 6.0, 7.0])
    monkeypatch.setattr(evaluation, "measure", lambda *args, **options: ({"eval_loss": next(figures), "perplexity": 1.0}, []))
    made = recipe(tmp_path, max_steps=10, eval_steps=1, early_stopping_patience=2)
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
    outcome = tunesmith.train(made, out=tmp_path / "run")
    assert outcome["steps"] == 3 and outcome["best_step"] == 1 and "no improvement in 2" in outcome["stopped"]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["result"]["steps"] == 3
