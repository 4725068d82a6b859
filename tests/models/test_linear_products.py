"""Linear layers with LoRA as one product: output and every gradient are those of the layers one by one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.tiny import tiny_model
from tunesmith.models.fast import attention, fused_layers, linear_products

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def attention_layers(dtype, **keys):
    """The attention of a tiny model with a LoRA on some of its layers, all of whose weights are random."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, rank_pattern={"v_proj": 3}, **keys)
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
    layers = attention_layers(dtype, target_modules=targets)
    x = torch.randn(9, 32, dtype=dtype)
    parts = [layers.q_proj, layers.k_proj, layers.v_proj]
    expected = results(lambda x: torch.cat([part(x) for part in parts], dim=1), layers, x)
    found = results(linear_products.stack_linears(parts), layers, x)
    assert found.keys() == expected.keys() and len(found) == 2 + 2 * len(targets)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= TOLERANCE[dtype] * value.norm(), name


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_what_can_be_made_again_is_not_kept(trained):
    """The outputs of SwiGLU and of the norms are made again from tensors that their gradients need anyway."""
    model = tiny_model("llama")
    if trained == "lora":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear")).base_model.model
    layer = model.model.layers[0]
    kept: list[torch.Tensor] = []
    attention.register()
    model.set_attn_implementation(attention.NAME)
    fused = fused_layers.install(layer)
    assert fused.kinds["mlp"] == fused.kinds["attention"] == 1 and fused.kinds["norm"] == 2
    x, positions = torch.randn(1, 9, 32), torch.arange(9)[None]
    given = {"position_embeddings": model.model.rotary_emb(x, positions), "segments": (4, 5)}
    names = [name for name, weight in layer.named_parameters() if weight.requires_grad]
    found = []
    for _ in range(2):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            y = layer(x, **given)
        y = y[0] if isinstance(y, tuple) else y
        shapes = [tuple(tensor.shape) for tensor in kept]
        found.append(torch.autograd.grad(y.square().sum(), [layer.get_parameter(name) for name in names]))
        if len(found) == 1:
            width = model.config.intermediate_size
            assert (9, 2 * width) in shapes and (9, width) not in shapes
            # hidden states: the input of each norm, once for its own gradient and once to make its output again, and of o_proj
            assert len({tensor.data_ptr() for tensor in kept if tuple(tensor.shape) == (9, 32)}) == 3
            fused.disable()
    for name, ours, theirs in zip(names, *found, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * max(1.0, float(theirs.norm())), name
