"""fp16: an overflowed gradient costs a step and nothing else; small gradients are not lost; what is trained stays in fp32."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import tunesmith
from tests.runs import apart, history, model_folder, recipe, weights
from tests.train.launching import forked
from tunesmith.errors import GradientOverflowError, ModelError, NonFiniteError
from tunesmith.models.fast import kernels
from tunesmith.models.heads import lm_head
from tunesmith.models.load import compute_dtype
from tunesmith.runs import metrics_file
from tunesmith.train import loop, optimizers, precision, setup
from tunesmith.train.master_weights import Masters
from tunesmith.train.precision import LossScale
from tunesmith.train.train_config import TrainConfig
from tunesmith.train.update import Update

# ------------------------------------------------------------------------------------------- rounding


def rounded(values, seeds):
    """(seeds, values): the fp16 numbers that the fp32 ``values`` become, in double."""
    x = torch.tensor(values, dtype=torch.float32)
    out = torch.empty(len(values), dtype=torch.float16)
    drawn = []
    for seed in seeds:
        kernels.stochastic_round(x, out, seed * 7919)
        drawn.append(out.double().numpy().copy())
    return np.array(drawn)


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=50), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_a_number_becomes_one_of_its_two_neighbours(values, seed):
    (found,) = rounded(values, [seed])
    exact = np.array(values, dtype=np.float32).astype(np.float64)
    nearest = exact.astype(np.float16)
    np.seterr(over="ignore")  # the neighbour of the largest number
    up = np.where(nearest.astype(np.float64) < exact, np.nextafter(nearest, np.float16(np.inf)), nearest).astype(np.float64)
    down = np.where(nearest.astype(np.float64) > exact, np.nextafter(nearest, np.float16(-np.inf)), nearest).astype(np.float64)
    assert ((found == up) | (found == down)).all()


@pytest.mark.parametrize("size", [1.0, 0.03, 7e-5, 3e-6, 1e-7])  # the last two lie where fp16 has fewer digits
def test_the_mean_over_seeds_is_the_number_itself(size):
    values = (np.random.default_rng(0).standard_normal(200) * size).astype(np.float32)
    drawn = rounded(values.tolist(), range(400))
    spacing = np.spacing(np.abs(values).astype(np.float16)).astype(np.float64)
    assert (np.abs(drawn.mean(0) - values) / spacing).max() < 0.1  # 0.5 / sqrt(400) is its deviation
    assert len(np.unique(drawn[:, 0])) == 2


def test_what_fp16_holds_stays_and_what_it_does_not_hold_is_infinite():
    exact = [0.0, -0.0, 1.0, -2.5, 65504.0, 6.103515625e-05, 5.960464477539063e-08]
    assert (rounded(exact, range(20)) == exact).all()
    assert (rounded([65510.0, -65519.0], range(50)) == [65504.0, -65504.0]).all()
    (found,) = rounded([65520.0, -1e38, float("inf"), float("nan")], [0])
    assert found[:3].tolist() == [np.inf, -np.inf, np.inf] and np.isnan(found[3])


# ------------------------------------------------------------------------------------------- which format


@pytest.mark.parametrize(("bf16", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_fp16_only_on_a_gpu_without_bf16(bf16, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert precision.choose("auto", torch.device("cuda")).compute is chosen
    for isa in ([], ["avx512_fp16"], ["amx_bf16"]):
        monkeypatch.setattr(compute_dtype.machine, "describe", lambda isa=isa: {"isa": isa})
        assert precision.choose("auto", torch.device("cpu")).compute is not torch.float16
    assert precision.choose("fp16", torch.device("cpu")).compute is torch.float16


@pytest.mark.parametrize("adaptation", ["full", {"type": "lora", "r": 4}])
def test_the_plan_is_what_there_is(adaptation, tmp_path, monkeypatch):
    made = recipe(tmp_path, adaptation=adaptation, precision="fp16")
    built = {}
    build = setup.build
    monkeypatch.setattr(setup, "build", lambda *args: built.setdefault("it", build(*args)))
    tunesmith.train(made, out=tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "manifest.json").read_text())["precision"]
    assert {name: plan[name] for name in ("compute", "trained_weights", "frozen_weights", "optimiser_state")} == {
        "compute": "float16",
        "trained_weights": "float32 master, float16 working copy",
        "frozen_weights": "float16",
        "optimiser_state": "float32",
    }
    update = built["it"].update
    assert {p.dtype for p in built["it"].model.parameters()} == {torch.float16}
    assert {master.dtype for master in update.masters.masters.values()} == {torch.float32}
    assert {value.dtype for state in update.optimizer.state.values() for value in state.values()} == {torch.float32}
    assert not any(kind != "lora" for kind in built["it"].fast_path.fused.kinds)  # the C passes know fp32 and bf16 alone


def test_fp16_learns_what_fp32_learns(tmp_path):
    found = {}
    for name in ("fp32", "fp16"):
        made = recipe(tmp_path, precision=name, max_steps=12, learning_rate=1e-3)
        tunesmith.train(made, out=tmp_path / name)
        found[name] = [record["loss"] for record in history(tmp_path / name) if record["kind"] == "train"]
    assert found["fp16"] == pytest.approx(found["fp32"], rel=1e-3)
    assert found["fp16"][-1] < found["fp16"][0] - 0.3


def test_a_weight_that_fp16_cannot_hold_is_named(tmp_path):
    model_folder(tmp_path, "llama")
    made = recipe(tmp_path, precision="fp16")
    from safetensors.torch import save_file

    file = tmp_path / "model-llama" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight holds numbers above 65504"):
        tunesmith.train(made, out=tmp_path / "run")


# ------------------------------------------------------------------------------------------- scaling


def one_weight(scale, dtype=torch.float16):
    model = torch.nn.Linear(64, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.5)
    masters = Masters(model, dtype)
    compute_dtype.cast(model, dtype)
    masters.install_hooks()
    config = TrainConfig(learning_rate=1e-3)
    optimizer = optimizers.build(masters.masters, config, (), {})
    return model, Update(masters, optimizer, optimizers.schedule(optimizer, config, 100), 0.0, 0, scale)


def gradient_of(update, model, x):
    loss = model(x).float().sum()
    update.backward(loss)
    update.norm(loss.detach())
    (gradient,) = (master.grad.clone() for master in update.masters.masters.values())
    update.clear_gradients()
    return gradient


def test_gradients_after_unscaling_are_the_unscaled_ones():
    x = torch.linspace(0.01, 1.0, 64, dtype=torch.float16)[None]
    (model, plain), (other, scaled) = one_weight(None), one_weight(LossScale(2.0**10))
    assert gradient_of(plain, model, x).equal(gradient_of(scaled, other, x))
    assert gradient_of(plain, model, x).dtype is torch.float32


def test_gradients_too_small_for_fp16_are_kept_by_the_scale():
    tiny = torch.full((1, 64), 2.0**-20)
    found = []
    for scale in (None, LossScale(2.0**16)):
        model, update = one_weight(scale)
        loss = (model(tiny.half()).float() * 2.0**-10).sum()
        update.backward(loss)  # 2^-30: below 2^-24, the smallest of fp16
        update.norm(loss.detach())
        found.append(next(iter(update.masters.masters.values())).grad)
    assert not found[0].any()
    assert (found[1] == 2.0**-30).all()


def test_the_blocked_head_takes_a_scale_that_fp16_itself_cannot_hold():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 8, generator=generator) / 64, torch.randn(20, 8, generator=generator) / 64
    labels = torch.tensor([3])
    gradients = []
    for dtype in (torch.float32, torch.float16):
        h, w = hidden.detach().to(dtype, copy=True), weight.detach().to(dtype, copy=True)
        loss = lm_head.BlockedCrossEntropy.apply(h.requires_grad_(), w.requires_grad_(), None, labels)
        (loss * 2.0**17).backward()
        assert h.grad.dtype is w.grad.dtype is dtype
        gradients.append((h.grad.float(), w.grad.float()))
    for exact, ours in zip(*gradients, strict=True):
        assert ours.isfinite().all()
        assert (exact - ours).norm() <= 3e-3 * exact.norm()


def test_a_sum_over_many_targets_does_not_overflow_before_it_is_divided():
    hidden = torch.full((2000, 4), 60.0, dtype=torch.float16)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    loss = lm_head.BlockedCrossEntropy.apply(hidden, weight, None, torch.zeros(2000, dtype=torch.long))
    (loss / 2000).backward()
    assert weight.grad[0].tolist() == pytest.approx([-60 * 7 / 8] * 4, rel=1e-3)  # their sum is -105,000


def test_the_scale_falls_with_each_overflow_and_doubles_after_2000_good_steps():
    scale = LossScale()
    assert scale.scale == 65536
    scale.update(finite=False)
    scale.update(finite=False)
    assert (scale.scale, scale.skipped, scale.in_a_row) == (16384, 2, 2)
    for _ in range(1999):
        scale.update(finite=True)
    assert (scale.scale, scale.in_a_row) == (16384, 0)
    scale.update(finite=True)
    assert (scale.scale, scale.good, scale.skipped) == (32768, 0, 2)


# ------------------------------------------------------------------------------------------- overflow


@dataclass
class Watched:
    """Masters, working copies, rows and learning rate of a step."""

    masters: dict
    copies: dict
    rows: list
    rate: float


def watch(monkeypatch, overflows=()):
    """Record every step; the gradient of the steps in ``overflows`` is made infinite during backward."""
    seen = {}
    train_step = loop.train_step

    def watched(job, step):
        if step.number in overflows:
            _name, master = next(iter(job.update.masters.parameters.items()))
            hook = master.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
        record = train_step(job, step)
        if step.number in overflows:
            hook.remove()
        masters = job.update.masters
        seen[step.number] = Watched(
            {name: value.detach().clone() for name, value in masters.masters.items()},
            {name: value.detach().clone() for name, value in masters.parameters.items()},
            step.names(),
            record["learning_rate"],
        )
        return record

    monkeypatch.setattr(loop, "train_step", watched)
    return seen


def same(one, other):
    return all(one[name].equal(other[name]) for name in one)


def test_an_overflowed_step_is_left_out_and_training_goes_on(tmp_path, monkeypatch):
    seen = watch(monkeypatch, overflows=(2, 3))
    made = recipe(tmp_path, precision="fp16", max_steps=6, warmup_steps=2)
    tunesmith.train(made, out=tmp_path / "run")
    records = [record for record in history(tmp_path / "run") if record["kind"] == "train"]
    assert [record["skipped_steps"] for record in records] == [0, 1, 2, 2, 2, 2]
    assert [record["loss_scale"] for record in records] == [65536, 32768, 16384, 16384, 16384, 16384]
    assert [record["grad_norm"] == float("inf") for record in records] == [False, True, True, False, False, False]
    assert same(seen[1].masters, seen[2].masters) and same(seen[1].copies, seen[2].copies)
    assert same(seen[1].masters, seen[3].masters) and same(seen[1].copies, seen[3].copies)
    assert not same(seen[3].masters, seen[4].masters) and not same(seen[3].copies, seen[4].copies)
    # the schedule waits: the rate of step 2 is that of 3 and 4, and rises after the first update that is made with it
    assert [seen[step].rate for step in range(1, 7)] == pytest.approx([0, 5e-3, 5e-3, 5e-3, 1e-2, 7.5e-3])
    epochs = [tuple(seen[step].rows) for step in range(1, 7)]
    assert len(set(epochs)) == 6


def test_real_overflows_end_when_the_scale_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(setup.precision, "LossScale", lambda: LossScale(2.0**26))
    made = recipe(tmp_path, precision="fp16", max_steps=14, learning_rate=1e-3)
    tunesmith.train(made, out=tmp_path / "run")
    records = [record for record in history(tmp_path / "run") if record["kind"] == "train"]
    skipped = records[-1]["skipped_steps"]
    assert 2 <= skipped <= 10 and records[-1]["loss_scale"] == 2.0 ** (26 - skipped)
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize("overflows", [(1, 2), (3,), (2, 4)])
def test_a_killed_run_goes_on_bit_for_bit_across_left_out_steps(overflows, tmp_path, monkeypatch):
    made = recipe(tmp_path, precision="fp16", max_steps=6, save_steps=2)
    original = loop.train_step
    watch(monkeypatch, overflows)
    tunesmith.train(made, out=tmp_path / "straight")
    disturbed = loop.train_step

    class Killed(BaseException):
        pass

    def dies(job, step):
        if step.number == 4 and not (tmp_path / "dead").exists():
            (tmp_path / "dead").touch()
            raise Killed
        return disturbed(job, step)

    monkeypatch.setattr(loop, "train_step", dies)
    with pytest.raises(Killed):
        tunesmith.train(made, out=tmp_path / "killed")
    tunesmith.train(made, out=tmp_path / "killed", resume=True)
    monkeypatch.setattr(loop, "train_step", original)
    assert history(tmp_path / "killed") == history(tmp_path / "straight")
    folders = [tmp_path / run / "checkpoints" / "step-6" for run in ("killed", "straight")]
    ours, theirs = (load_file(folder / "state.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys() and same(ours, theirs)
    states = [json.loads((folder / "state.json").read_text()) for folder in folders]
    assert states[0]["loss_scale"] == states[1]["loss_scale"]
    assert states[0]["loss_scale"]["skipped"] == len(overflows)


def test_a_gradient_that_always_overflows_stops_the_run(tmp_path, monkeypatch):
    seen = watch(monkeypatch, overflows=range(2, 100))
    made = recipe(tmp_path, precision="fp16", max_steps=60, save_steps=10)
    with pytest.raises(
        GradientOverflowError, match=r"step 21: the gradient overflowed fp16 in 20 steps in a row(.|\n)*precision=bf16"
    ):
        tunesmith.train(made, out=tmp_path / "run")
    assert same(seen[1].masters, seen[20].masters)
    assert (tmp_path / "run" / "checkpoints" / "step-20").is_dir()


def test_a_loss_that_is_not_finite_still_stops_the_run(tmp_path, monkeypatch):
    lm_loss, train_step = lm_head.lm_loss, loop.train_step
    at = {"step": 0}

    def numbered(job, step):
        at["step"] = step.number
        return train_step(job, step)

    def loss(model, batch):
        return lm_loss(model, batch) * (float("nan") if at["step"] == 3 else 1.0)

    monkeypatch.setattr(loop, "train_step", numbered)
    monkeypatch.setattr(lm_head, "lm_loss", loss)
    with pytest.raises(
        NonFiniteError, match=r"step 3: the loss is nan(.|\n)*use train.precision=bf16 \(fp16 holds no activation"
    ):
        tunesmith.train(recipe(tmp_path, precision="fp16"), out=tmp_path / "run")


def start_with_a_large_scale():
    setup.precision.LossScale = lambda: LossScale(2.0**23)


def test_two_processes_leave_out_the_same_steps(tmp_path, monkeypatch):
    made = recipe(tmp_path, precision="fp16", max_steps=8, learning_rate=1e-3, optim_args={"eps": 1e-3})
    monkeypatch.setattr(setup.precision, "LossScale", lambda: LossScale(2.0**23))
    alone = tunesmith.train(made, out=tmp_path / "one")
    assert forked(made, tmp_path / "two", before=start_with_a_large_scale) == [0, 0]
    skipped = [metrics_file.read(tmp_path / run / "metrics.jsonl")[-1]["skipped_steps"] for run in ("one", "two")]
    assert skipped[0] == skipped[1] > 0
    assert apart(weights(alone["model_dir"]), weights(tmp_path / "two" / "model")) <= 2e-4
