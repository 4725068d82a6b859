"""The memory limit: the largest micro-batch is tried first, and running out of memory changes no result."""

import dataclasses
import gc
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tunesmith
from tests.rollout.sampling import made as made_of_prompts
from tests.runs import TASKS, apart, history, recipe, rows, weights
from tunesmith import machine
from tunesmith.cli.main import main
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.data.batch.step import Listed, Step
from tunesmith.errors import OutOfMemoryError, RecipeError
from tunesmith.models.heads import lm_head
from tunesmith.objectives import sft
from tunesmith.runs import metrics_file
from tunesmith.train import forecast, loop, memory_budget
from tunesmith.train.session import RunSession
from tunesmith.train.train_config import TrainConfig

LOSS = lm_head.lm_loss
SUMS = {"optim_args": {"eps": 1e-3}, "learning_rate": 1e-3}
"""Settings under which another order of sums stays rounding noise."""


class TooLarge(torch.autograd.Function):
    """Runs out of memory in the middle of the backward pass, when some gradients have been made already."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def small_machine(monkeypatch, most, where="forward", first_steps=0):
    """Let batches of more than ``most`` tokens run out of memory. Returns the list of sizes that were tried."""
    tried = []

    def loss(model, batch):
        tokens = batch["input_ids"].numel()
        if model.training:
            tried.append(tokens)
        if model.training and tokens > most and len(tried) > first_steps:
            if where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            hook = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
            found = hook.register_forward_hook(lambda module, args, out: TooLarge.apply(out))
            value = LOSS(model, batch)
            found.remove()
            return value
        return LOSS(model, batch)

    monkeypatch.setattr(lm_head, "lm_loss", loss)
    return tried


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("packing", ["auto", "off"])
def test_a_micro_batch_that_does_not_fit_is_halved_and_the_update_stays_the_same(where, packing, tmp_path, monkeypatch):
    made = recipe(tmp_path, packing=packing, **SUMS)
    expected = weights(tunesmith.train(made, out=tmp_path / "whole")["model_dir"])
    tried = small_machine(monkeypatch, 90, where)
    got = weights(tunesmith.train(made, out=tmp_path / "halved")["model_dir"])
    assert max(tried) > 90, "nothing ran out"
    assert apart(got, expected) < 1e-6


def test_a_memory_limit_is_reported_and_kept_for_later_steps(tmp_path, monkeypatch):
    made = recipe(tmp_path, max_steps=4)
    heaviest = 3  # the pass in training mode and those of the rehearsal still fit
    tried = small_machine(monkeypatch, 60, first_steps=heaviest)
    tunesmith.train(made, out=tmp_path / "run")
    said = [record for record in metrics_file.read(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "memory"]
    assert said and said[0]["before"] == memory_budget.CPU_FP32 and said[-1]["micro_batch_tokens"] < 100
    limit = said[-1]["micro_batch_tokens"]
    after = tried[max(place for place, tokens in enumerate(tried) if tokens > limit) + 1 :]
    assert after, "later steps are cut to what fits from the start"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert any("ran out of memory" in note for note in manifest["notes"])


def test_a_resumed_run_keeps_the_smaller_micro_batches(tmp_path, monkeypatch):
    made = recipe(tmp_path, max_steps=6, save_steps=3)
    small_machine(monkeypatch, 60, first_steps=2)
    tunesmith.train(made, out=tmp_path / "straight")
    due = loop.due

    class Killed(BaseException):
        pass

    def killed(every, step, steps, per_epoch):
        if step == 4:
            raise Killed
        return due(every, step, steps, per_epoch)

    with monkeypatch.context() as patch:
        small_machine(patch, 60, first_steps=2)
        patch.setattr(loop, "due", killed)
        with pytest.raises(Killed):
            tunesmith.train(made, out=tmp_path / "broken")
    small_machine(monkeypatch, 60)
    tunesmith.train(made, out=tmp_path / "broken", resume=True)
    assert apart(weights(tmp_path / "broken" / "model"), weights(tmp_path / "straight" / "model")) == 0
    assert history(tmp_path / "broken") == history(tmp_path / "straight")


def test_a_single_row_that_does_not_fit_stops_the_run_and_is_named(tmp_path, monkeypatch):
    made = recipe(tmp_path)
    small_machine(monkeypatch, 3)
    with pytest.raises(OutOfMemoryError, match=r"rows\.jsonl:\d+, \d+ tokens.*\n.*gradient_checkpointing") as caught:
        tunesmith.train(made, out=tmp_path / "run")
    assert caught.value.exit_code == 3


def test_nothing_of_a_failed_pass_is_kept_alive(tmp_path, monkeypatch):
    """A reference to the traceback would keep the tensors that exceeded the memory."""
    made = recipe(tmp_path, max_steps=1)
    alive = []
    released = machine.release_memory

    def look(device):
        gc.collect()
        alive.append(sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.grad_fn is not None))
        released(device)

    monkeypatch.setattr(machine, "release_memory", look)
    small_machine(monkeypatch, 90, "backward")
    tunesmith.train(made, out=tmp_path / "run")
    assert alive and alive[0] == 0


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_the_first_thing_that_is_run_is_the_heaviest_micro_batch(packing, tmp_path, monkeypatch):
    made = recipe(tmp_path, count=40, batch_size=7, max_steps=None, micro_batch_tokens=120, packing=packing)
    del made["train"]["max_steps"]
    made["data"]["eval"] = {"fraction": 0.2}
    tried = small_machine(monkeypatch, 10**6)
    tunesmith.train(made, out=tmp_path / "ample")
    steps = tried.copy()
    monkeypatch.setattr(memory_budget, "AMPLE", float("inf"))
    tried.clear()
    tunesmith.train(made, out=tmp_path / "run")
    assert max(tried) == max(tried[:4]), "the route's trial takes two passes, the shortest row one"
    assert len(tried) > 8
    assert sorted(tried) == sorted([*steps, max(steps)]), "with ample memory the first step is the trial"
    assert history(tmp_path / "ample") == history(tmp_path / "run")


@pytest.mark.parametrize(("layout", "times_longer"), [(PADDED, 4), (PACKED, 1)])
@pytest.mark.parametrize("missing", [0, 1])
def test_a_micro_batch_is_not_tried_whose_upper_bound_is_a_third_of_the_free_memory(missing, layout, times_longer, monkeypatch):
    """The short row: 10 tokens and 100 bytes, 20 of them gradients. The heaviest micro-batch: one row of 40 tokens."""
    sizes, tried = np.array([40, 10]), []
    data = Listed([{"input_ids": np.zeros(size, np.int32)} for size in sizes], ["long", "short"])
    step = Step(1, data, np.arange(2), sft.Objective(sft.Config()).collate)
    masters, config = SimpleNamespace(size=5, share=1), SimpleNamespace(optim_name="sgd")
    update = SimpleNamespace(masters=masters, optimizer=SimpleNamespace(state={}))
    source = SimpleNamespace(preview=lambda most: [step])
    job = SimpleNamespace(source=source, layout=layout, budget=40, update=update, config=config, device=torch.device("cpu"))

    def passed(job, step, places):
        tried.append(int(sizes[places].sum()))
        return memory_budget.Pass(tried[-1], 1.0, 1000, 1000 + 10 * tried[-1])

    monkeypatch.setattr(memory_budget, "_pass", passed)
    bound = 20 + 80 * 4 * times_longer  # four times as many tokens, in a row that is four times as long
    memory = memory_budget.measure_memory(job, 1000 + 3 * (bound + 5 * 4) - missing, bound_suffices=True)
    assert tried == ([10, 40] if missing else [10])
    assert memory.peak == 1000 + 5 * 4 + (400 if missing else bound)
    assert memory_budget.measure_memory(job, 10**9).peak == 1420, "a measured check tries it on every machine"


def test_the_heaviest_is_found_in_a_run_too_long_to_be_looked_at_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_budget, "PREVIEWED", 2)
    made = recipe(tmp_path, batch_size=1, max_steps=12)
    long = [*rows(12), {"prompt": "long:" + " fox" * 60, "completion": " x"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, long)))
    made["train"]["max_steps"] = 13
    monkeypatch.setattr(memory_budget, "AMPLE", float("inf"))
    tried = small_machine(monkeypatch, 10**6)
    tunesmith.train(made, out=tmp_path / "run")
    assert max(tried) == max(tried[:4])


def test_the_error_of_a_run_above_the_memory_limit_names_the_excess_and_settings_that_fit(tmp_path, monkeypatch):
    made = recipe(tmp_path)
    monkeypatch.setattr(memory_budget, "limit_bytes", lambda device: 50_000_000)
    with pytest.raises(RecipeError, match=r"needs about .* and 50\.0 MB are available: .* are missing") as caught:
        tunesmith.train(made, out=tmp_path / "run")
    assert "gradient_checkpointing=true" in str(caught.value)
    assert history(tmp_path / "run") == []


def line(heaviest, per_token, pending=0):
    return memory_budget.Memory(memory_budget.Pass(heaviest, 1.0, 0, 10_000 + int(heaviest * per_token)), per_token, pending)


def one_row_of(tokens):
    """A source of one step of one example of so many tokens."""
    data = Listed([{"input_ids": np.zeros(tokens, np.int32)}], ["the row"])
    step = Step(1, data, np.arange(1), sft.Objective(sft.Config()).collate)
    return SimpleNamespace(preview=lambda most: [step])


def test_auto_takes_what_fits_and_counts_the_optimiser(tmp_path, monkeypatch):
    """Measured: 10,000 bytes and 10 a token; 1,000 bytes to come. Of 20,000 bytes nine tenths may be used: 700 tokens."""
    job = type("J", (), {})()
    job.budget, job.layout = 2048, PACKED
    job.model, job.update = torch.nn.Linear(4, 4), type("U", (), {"masters": type("M", (), {"size": 20})()})()
    job.source = one_row_of(300)
    job.config = type("C", (), {"gradient_checkpointing": False})()
    job.device = torch.device("cpu")
    monkeypatch.setattr(memory_budget, "measure_memory", lambda job, *given: line(job.budget, 10.0, 1000))
    memory_budget.settle(job, automatic=True, limit=20_000)
    assert job.budget == 640, "700, down to a multiple of 64"
    job.budget = 2048
    with pytest.raises(RecipeError, match=r"Would fit, with the same result: train\.micro_batch_tokens=640"):
        memory_budget.settle(job, automatic=False, limit=20_000)
    job.budget = 2048
    with pytest.raises(RecipeError, match="the longest row has 300 tokens"):
        memory_budget.settle(job, automatic=True, limit=12_500)


def test_auto_trains_the_same_model_and_the_budget_is_recorded(tmp_path):
    made = recipe(tmp_path, **SUMS)
    expected = weights(tunesmith.train(made, out=tmp_path / "plain")["model_dir"])
    made["train"]["micro_batch_tokens"] = "auto"
    got = weights(tunesmith.train(made, out=tmp_path / "auto")["model_dir"])
    assert apart(got, expected) < 1e-6
    assert json.loads((tmp_path / "auto" / "manifest.json").read_text())["micro_batch_tokens"] == memory_budget.CPU_FP32


@pytest.mark.parametrize(
    ("device", "compute", "default", "auto"),
    [
        ("cpu", torch.bfloat16, 1792, 1792),
        ("cpu", torch.float32, 1280, 1280),
        ("cuda", torch.float32, 2048, 16384),
        ("mps", torch.float32, 1792, 1792),
    ],
)
def test_the_budget_of_a_recipe_without_one_depends_on_the_device(device, compute, default, auto):
    budgets = [
        memory_budget.first_budget(TrainConfig(micro_batch_tokens=wanted), torch.device(device), compute)
        for wanted in (None, "auto", 77)
    ]
    assert budgets == [default, auto, 77]


def test_processes_agree_on_one_budget(tmp_path, monkeypatch):
    """Another process has less memory and halved its micro-batches more often: all processes use its numbers."""
    heard = []

    def gather(records):
        heard.append(records[0])
        if isinstance(records[0], tuple):
            over, _, budget = records[0]
            return [*records, (over + 1e12, 256, budget - 50)]
        return [*records, records[0] - 7] if not isinstance(records[0], bool) else records

    job = type("J", (), {})()
    job.budget, job.device, job.layout = 2048, torch.device("cpu"), PACKED
    job.source = one_row_of(100)
    monkeypatch.setattr(memory_budget.distributed, "gather", gather)
    monkeypatch.setattr(memory_budget, "measure_memory", lambda job, *given: line(job.budget, 10.0))
    memory_budget.settle(job, automatic=True, limit=10**9)
    assert heard[-1] == 256 and job.budget == 249


def test_a_measured_check_reports_memory_and_time_and_keeps_nothing(tmp_path):
    made = recipe(tmp_path, count=30)
    made["data"]["eval"] = {"fraction": 0.2}
    before = sorted(tmp_path.rglob("*"))
    found = tunesmith.check(made, measure=True)["forecast"]
    assert sorted(tmp_path.rglob("*")) == before
    assert found["fits"] and found["remedies"] == []
    assert found["evaluations"] == 2
    assert found["total_seconds"] >= found["train_seconds"] + 2 * found["evaluation_seconds"] > 0
    assert found["seconds_per_step"] * 4 == pytest.approx(found["train_seconds"])
    assert 0 <= found["peak_memory_bytes"] < found["needed_memory_bytes"] < found["memory_limit_bytes"]


def test_a_measured_check_of_a_policy_times_an_iteration(tmp_path, monkeypatch):
    """By a clock that stands still except in sampling, which takes 3 s, and in a step, which takes 1 s."""
    made = made_of_prompts(tmp_path, type="ppo", rewards=[{"type": "length", "target": 3}])
    made["data"]["eval"] = {"fraction": 0.25}
    before, now, asked = sorted(tmp_path.rglob("*")), [0.0], []

    def taking(seconds, function):
        def timed(*given):
            now[0] += seconds
            asked.append(len(given[1]))
            return function(*given)

        return timed

    monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(RunSession, "sample", taking(3.0, RunSession.sample))
    monkeypatch.setattr(loop, "train_step", taking(1.0, loop.train_step))
    found = tunesmith.check(made, measure=True)["forecast"]
    assert sorted(tmp_path.rglob("*")) == before
    assert asked == [16, 8, 8, 8, 8, 2], "an iteration of four steps, and an evaluation of two prompts"
    assert found["steps_per_iteration"] == 4 and found["seconds_per_step"] == (3 + 4) / 4
    assert found["train_seconds"] == found["steps"] * found["seconds_per_step"] and found["evaluation_seconds"] == 3


@pytest.mark.parametrize("objective", TASKS)
def test_a_measured_check_of_a_head_asks_it_to_write_nothing(objective, tmp_path):
    made = recipe(tmp_path, "llama", objective)
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
    assert tunesmith.check(made, measure=True)["forecast"]["evaluation_seconds"] > 0


def test_a_check_for_a_smaller_machine_fails_with_what_is_missing(tmp_path, capsys):
    made = recipe(tmp_path)
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(made))
    assert main(["check", str(file), "--measure", "--memory", "0.1"]) == 2
    shown = capsys.readouterr()
    assert "are missing" in shown.err and "gradient_checkpointing" in shown.err
    assert "parameters" in shown.out, "what is known without measuring is told first"
    assert main(["check", str(file), "--measure", "--memory", "0.1", "--json"]) == 2
    assert "are missing" in json.loads(capsys.readouterr().out)["error"]["message"], "exactly one object"


def test_a_micro_batch_that_would_be_far_too_large_is_not_tried_whole(tmp_path, monkeypatch):
    """On a CPU the system kills a process that takes too much memory, so the need of the whole is estimated from a part of it."""
    made = recipe(tmp_path, count=64, batch_size=64, micro_batch_tokens=10**6)
    tried = []
    real = memory_budget._pass

    def passes(job, step, places):
        tried.append(len(places))
        found = real(job, step, places)
        return dataclasses.replace(found, before=10**9, peak=10**9 + 10**6 * found.tokens)

    monkeypatch.setattr(memory_budget, "LARGEST", {"cpu": 200})
    monkeypatch.setattr(memory_budget, "_pass", passes)
    monkeypatch.setattr(memory_budget, "limit_bytes", lambda device: int(2e9))
    with pytest.raises(RecipeError, match=r"Would fit, with the same result: train\.micro_batch_tokens=\d+"):
        tunesmith.train(made, out=tmp_path / "run")
    assert max(tried) < 20


def test_weights_that_cannot_fit_are_refused_before_they_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_budget, "limit_bytes", lambda device: 100_000)
    monkeypatch.setattr(memory_budget.setup, "build", None)
    with pytest.raises(RecipeError, match="missing before the first row is read"):
        tunesmith.train(recipe(tmp_path), out=tmp_path / "run")


def test_memory_without_measure_is_refused(tmp_path, capsys):
    assert main(["check", "x.yaml", "--memory", "8"]) == 2
    assert "--measure" in capsys.readouterr().err


def test_the_watch_sees_a_peak_that_is_over_when_it_is_asked():
    with machine.PeakWatch(torch.device("cpu")) as watch:
        start = machine.memory_bytes()
        block = torch.ones(60_000_000)
        assert block.sum() > 0
        del block
    assert watch.peak >= start + 200_000_000


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory of what was learnt"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error, expected):
    assert machine.is_out_of_memory(error) is expected
