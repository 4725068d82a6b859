"""Linear layers with LoRA as one product: output and every gradient are those of the layers one by one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.tiny import tiny_model
from tunesmith.models.fast import linear_products

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def attention(dtype, **keys):
    """The attention of a tiny model with a LoRA on some of its layers, all of whose weights are random."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, rank_pattern={"q_proj": 3}, **keys)
    model = get_peft_model(tiny_model("llama"), config, autocast_adapter_dtype=False).to(dtype)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model.base_model.model.model.layers[0].self_attn


def results(forward, layers, x):
    x = x.clone().requires_grad_()
    y = forward(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype))
    gradients = {name: weight.grad for name, weight in layers.named_parameters() if weight.grad is not None}
    for weight in layers.parameters():
        weight.grad = None
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"], ["v_proj"]], ids=len)
def test_a_stack_is_its_layers(targets, dtype):
    """Of different ranks and heights, and layers without a LoRA between them."""
    layers = attention(dtype, target_modules=targets)
    x = torch.randn(9, 32, dtype=dtype)
    parts = [layers.q_proj, layers.k_proj, layers.v_proj]
    expected = results(lambda x: torch.cat([part(x) for part in parts], dim=1), layers, x)
    found = results(linear_products.stack_linears(parts), layers, x)
    assert found.keys() == expected.keys() and len(found) == 2 + 2 * len(targets)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= TOLERANCE[dtype] * value.norm(), name
