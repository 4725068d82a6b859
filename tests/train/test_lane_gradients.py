"""Gradients of micro-batches that run at the same time are added in a fixed order, straight into the masters' gradients."""

import pytest
import torch
from torch import nn

from tunesmith.models import lanes
from tunesmith.models.fast import linear_products, weight_gradients
from tunesmith.models.heads import lm_head
from tunesmith.models.load import compute_dtype
from tunesmith.train import lane_gradients
from tunesmith.train.master_weights import Masters


def masters_of(model, compute=torch.float32):
    masters = Masters(model, compute)
    compute_dtype.cast(model, compute)
    masters.install_hooks()
    return masters


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1], [2, 0, 1]])
def test_gradients_are_added_in_the_order_of_their_turns(order, compute):
    """2^30 + 1 - 2^30 is 0 in fp32; 2^30 - 2^30 + 1, in the order of arrival, is 1."""
    model = nn.Linear(1, 1, bias=False)
    masters = masters_of(model, compute)
    inputs = [2.0**30, 1.0, -(2.0**30)]
    for turn in order:
        masters.backward(model(torch.tensor([[inputs[turn]]], dtype=compute)).sum(), last=False, turn=turn)
    assert masters.gradients()["weight"].item() == 0
    masters.clear()
    for turn, place in enumerate([0, 2, 1]):
        masters.backward(model(torch.tensor([[inputs[place]]], dtype=compute)).sum(), last=False, turn=turn)
    assert masters.gradients()["weight"].item() == 1


def test_a_weight_without_a_gradient_does_not_stop_later_turns():
    model = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    masters = masters_of(model)
    for turn, part in ((0, 0), (2, 1), (1, 1)):
        masters.backward(model[part](torch.ones(1, 1)).sum(), last=False, turn=turn)
    assert [gradient.item() for gradient in masters.gradients().values()] == [1, 2]


def test_one_gradient_of_two_weights_is_added_to_both():
    model = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))])
    masters = masters_of(model)
    for turn in range(2):
        masters.backward((model[0] + model[1]).sum(), last=False, turn=turn)
    assert [gradient.tolist() for gradient in masters.gradients().values()] == [[2, 2], [2, 2]]


def test_discarded_gradients_are_not_added_later():
    model = nn.Linear(1, 1, bias=False)
    masters = masters_of(model)
    masters.backward(model(torch.full((1, 1), 7.0)).sum(), last=False, turn=1)  # turn 0 ran out of memory
    masters.clear()
    for turn in range(2):
        masters.backward(model(torch.ones(1, 1)).sum(), last=False, turn=turn)
    assert masters.gradients()["weight"].item() == 2


def test_lanes_begin_nothing_after_a_micro_batch_that_did_not_fit(monkeypatch):
    monkeypatch.setattr(lanes, "in_threads", lambda work, number: [work(lane) for lane in range(number)])
    ran = []

    def run(index, turn):
        ran.append(index)
        return 0 if index == 2 else (torch.tensor(1.0), {})

    assert lane_gradients.sums(run, [9] * 6, 18, 2) == 2
    assert ran == [0, 1, 2]


class Tied(nn.Module):
    """An embedding that is the output layer, too, and two layers of one shape between them, which share memory for gradients."""

    def __init__(self, padding=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 4, padding_idx=padding)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.products = [linear_products.output_forward(layer) for layer in self.layers]

    def forward(self, ids, fused):
        x = (
            weight_gradients.ReadRows.apply(ids, self.embedding.weight, self.embedding.padding_idx)
            if fused
            else self.embedding(ids)
        )
        for layer, product in zip(self.layers, self.products, strict=True):
            x = torch.tanh(product(x) if fused else layer(x))
        if fused:
            return lm_head.BlockedCrossEntropy.apply(x, self.embedding.weight, None, ids.flip(0))
        return nn.functional.cross_entropy(nn.functional.linear(x, self.embedding.weight), ids.flip(0), reduction="sum")


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_gradients_that_are_handed_over_are_those_of_autograd(order, padding, monkeypatch):
    """Ids repeat, the output layer's gradient comes in slices, and the last turn to come is the first to be added."""
    monkeypatch.setattr(weight_gradients, "SLICE", 5)
    model, batches = Tied(padding), [torch.tensor(ids) for ids in ([1, 3, 3, 7], [11, 7, 7, 2], [3, 4])]
    for ids in batches:
        model(ids, fused=False).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    masters, handed = masters_of(model), []
    receive = lane_gradients.LaneGradients._receive
    monkeypatch.setattr(
        lane_gradients.LaneGradients, "_receive", lambda self, *given: handed.append(given[1]) or receive(self, *given)
    )
    for turn in order:
        masters.backward(model(batches[turn], fused=True), last=False, turn=turn)
    found = masters.gradients()
    assert {id(weight) for weight in handed} == {id(parameter) for parameter in model.parameters()}
    assert len(handed) == 3 * (1 + 3 + 2), "rows of the embedding, slices of the output layer, two layers"
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-6)
    for ids in batches:  # without a receiver
        model(ids, fused=True).backward()
    assert torch.allclose(model.embedding.weight.grad, 2 * expected["embedding.weight"], rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_one_number_is_summed_too():
    model = nn.ParameterList([nn.Parameter(torch.tensor(3.0))])
    masters = masters_of(model)
    for turn in (1, 0, 2):
        masters.backward(model[0] * float(turn + 1), last=False, turn=turn)
    assert masters.gradients()["0"].item() == 6
