"""The copy of step 0 holds what is trained and no more, and the run says what its weights take."""

import torch
from torch import nn

from tunesmith.train.weights_at_start import WeightsAtStart, weights_line


def test_the_line_counts_every_weight_once():
    frozen, adapter = nn.Linear(1000, 1000, bias=False).bfloat16(), nn.Linear(1000, 10, bias=False).bfloat16()
    frozen.requires_grad_(False)
    network, trained = nn.ModuleList([frozen, adapter]), dict(adapter.named_parameters())
    start, masters = WeightsAtStart(trained), {"weight": adapter.weight.detach().float()}
    assert weights_line(network, masters, start) == (
        "weights: 2.08 MB in memory: the network 2.02 MB (1,010,000 parameters), "
        "fp32 masters of what is trained 40.0 kB (10,000 parameters), "
        "the reference, a copy of what is trained, 20.0 kB (10,000 parameters)"
    )
    own = dict(network[1].named_parameters())  # in fp32 the masters are the network's own parameters
    assert weights_line(network, own, None) == ("weights: 2.02 MB in memory: the network 2.02 MB (1,010,000 parameters)")


def test_the_weights_of_step_0_are_exchanged_also_after_an_error():
    layer = nn.Linear(3, 2)
    start, first = WeightsAtStart(dict(layer.named_parameters())), layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    try:
        with start.installed():
            assert torch.equal(layer.weight, first)
            raise ValueError
    except ValueError:
        pass
    assert torch.equal(layer.weight, first + 1)
