"""The update ratio is exact on small tensors and sampled on large ones; a tensor that does not move is named."""

import pytest
import torch

import tunesmith
from tests.numeric.test_invariance import OTHERS
from tests.runs import recipe
from tunesmith.runs import metrics_file
from tunesmith.train import master_weights, setup, update_ratio
from tunesmith.train.update_ratio import UpdateRatio


def after(made, move, rate=1.0):
    if (flags := made.moved_flags()) is not None:
        made.receive_flags(flags.tolist())
    made.sample_before()
    move()
    made.compare_after(rate)
    return made


def test_small_tensors_are_measured_whole():
    weights = {"a": torch.full((3, 4), 2.0), "b": torch.zeros(5)}
    found = after(UpdateRatio(weights), lambda: (weights["a"].add_(0.01), weights["b"].add_(0.02)))
    expected = (12 * 0.01**2 + 5 * 0.02**2) ** 0.5 / (12 * 2.0**2) ** 0.5
    assert found.value == pytest.approx(expected, rel=1e-4)


def test_a_sample_of_large_tensors_comes_near():
    generator = torch.Generator().manual_seed(0)
    weights = {"large": torch.randn(3000, 576, generator=generator), "small": torch.randn(64, generator=generator) * 5}
    update = {name: torch.randn(weight.shape, generator=generator) * 1e-3 * (len(name)) for name, weight in weights.items()}
    norms = [sum(float(x.square().sum()) for x in these.values()) ** 0.5 for these in (update, weights)]
    found = after(UpdateRatio(weights), lambda: [weights[name].add_(update[name]) for name in weights])
    assert found.value == pytest.approx(norms[0] / norms[1], rel=0.05)


def test_weights_of_zero_have_no_ratio():
    weights = {"b": torch.zeros(4)}
    assert str(after(UpdateRatio(weights), lambda: weights["b"].add_(1.0)).value) == "nan"


def test_a_tensor_that_does_not_move_is_named_once():
    weights = {name: torch.ones(4) for name in ("moves", "stands", "starts late")}
    found = UpdateRatio(weights)
    for step in range(update_ratio.PATIENCE + 3):
        after(found, lambda step=step: (weights["moves"].add_(1e-3), weights["starts late"].add_(1e-3 * (step > 0))))
        said = found.warning()
        assert (said is not None) == (step == update_ratio.PATIENCE), step
        if said:
            assert "1 of 3 trained tensors did not move in 6 updates: stands." in said


def test_a_warm_up_from_zero_accuses_nobody():
    weights = {"a": torch.ones(4)}
    found = UpdateRatio(weights)
    for _ in range(update_ratio.PATIENCE + 3):
        after(found, lambda: None, rate=0.0)
    assert found.warning() is None


def test_a_vocabulary_of_which_few_rows_are_seen_moves():
    weights = {"table": torch.ones(60_000, 64)}
    found = UpdateRatio(weights)
    for _ in range(update_ratio.PATIENCE + 1):
        after(found, lambda: weights["table"][777].add_(1e-3))
    assert found.warning() is None


MOVED = {"full": "full", "lora": {"type": "lora", "r": 4}, **{name: one for name, one in OTHERS.items() if name != "qlora"}}


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "bf16") for name in MOVED]
    + [pytest.param(name, "fp32", marks=[] if name in ("full", "lora") else pytest.mark.long) for name in MOVED],
)
def test_at_a_small_rate_every_trained_tensor_moves(name, precision, tmp_path, monkeypatch):
    made = recipe(tmp_path, adaptation=MOVED[name], learning_rate=1e-5, max_steps=6, precision=precision, logging_steps=1)
    first = {}
    build = setup.build

    def kept(*given):
        built = build(*given)
        first.update({name: master.detach().clone() for name, master in built.update.masters.masters.items()})
        first["built"] = built
        return built

    monkeypatch.setattr(setup, "build", kept)
    tunesmith.train(made, out=tmp_path / "run")
    built = first.pop("built")
    still = [name for name, master in built.update.masters.masters.items() if master.equal(first[name])]
    assert still == []
    assert not any("did not move" in note for note in built.notes)
    ratios = [
        record["update_ratio"] for record in metrics_file.read(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"
    ]
    assert len(ratios) == 6
    assert all(1e-7 < one < 1e-3 for one in ratios)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_parameter_that_no_gradient_reaches_is_reported(decay, tmp_path, monkeypatch):
    """A hook sets its gradient to zero: the run goes on and reports that this tensor is not trained, except by weight decay."""
    listen = master_weights.Masters.install_hooks

    def cut(self):
        listen(self)
        name = next(name for name in self.parameters if "mlp.down_proj" in name)
        self.parameters[name].register_hook(torch.zeros_like)

    monkeypatch.setattr(master_weights.Masters, "install_hooks", cut)
    tunesmith.train(recipe(tmp_path, max_steps=7, weight_decay=decay), out=tmp_path / "run")
    manifest = (tmp_path / "run" / "manifest.json").read_text()
    but = ", except by weight decay," if decay else ""
    assert f"1 of 20 trained tensors did not move{but} in 6 updates: model.layers.0.mlp.down_proj.weight. No" in manifest


def test_the_sample_does_not_lie_in_one_column():
    """A fixed stride that divides the width would look at one feature of every row."""
    columns = torch.arange(576.0).expand(49_152, 576)
    assert len(set(update_ratio._sample(columns).tolist())) > 500


def test_a_gradient_is_searched_until_it_is_found():
    """A pass over the gradient of every weight in each of the first steps cost full fine-tuning 7% of its speed."""
    searched = []

    class Gradient(torch.Tensor):
        def any(self):
            searched.append(self.tag)
            return torch.tensor(bool(self.sum()))

    weights = {name: torch.ones(4) for name in ("at once", "later")}
    found = UpdateRatio(weights)
    for step in range(update_ratio.PATIENCE + 1):
        for name, weight in weights.items():
            weight.grad = torch.full((4,), float(step >= 2 or name == "at once")).as_subclass(Gradient)
            weight.grad.tag = name
        after(found, lambda: [weight.add_(1e-3) for weight in weights.values()])
    assert searched == ["at once", "later", "later", "later"]
    assert found.warning() is None
