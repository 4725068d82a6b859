"""A decoder's last layer that computes only what a head reads: the same hidden states and gradients as the whole layer."""

import pytest
import torch

from tests.models.test_shared_prefix import ROWS, example, packed_model, relative_error
from tunesmith.adaptations import lora
from tunesmith.data.batch import shared_prompts
from tunesmith.data.batch.pack import Layout
from tunesmith.models.fast import fused_layers, kernels, last_layer
from tunesmith.models.heads import lm_head
from tunesmith.models.network import base

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler on this machine, or the self-test failed")
LAYOUTS = [Layout(packed=True, shared=True), Layout(packed=True, shared=False)]


def last_tokens(layout, rows=ROWS):
    batch, places = shared_prompts.arrange(rows, layout)
    return {**batch, "positions": torch.tensor([int(place[-1]) for place in places])}


def states_and_gradients(model, states):
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.dtype)
    (states * weights).float().sum().backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return {"states": states.detach(), **found}


def assert_equal_to_the_whole_layer(model, batch, limit):
    """Also count the tokens that the last feed-forward network computes in each."""
    tokens = []
    last = base(model).base_model.layers[-1]
    handle = last.mlp.register_forward_hook(lambda module, given, out: tokens.append(given[0].shape[1]))
    whole = lm_head.hidden_states(model, batch)[0][batch["positions"]]
    expected = states_and_gradients(model, whole)
    found = states_and_gradients(model, lm_head.outputs_at(model, batch))
    handle.remove()
    assert tokens == [batch["input_ids"].numel(), len(batch["positions"])]
    assert found.keys() == expected.keys()
    if whole.dtype is torch.bfloat16:
        found, expected = (
            {"states": all_of.pop("states"), "gradients": torch.cat([x.flatten() for x in all_of.values()])}
            for all_of in (found, expected)
        )
    for name, value in expected.items():
        assert relative_error(found[name], value) <= limit, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=["shared prompts", "separate"])
@pytest.mark.parametrize(("name", "kind"), [("llama", "attention"), ("qwen3", "mlp"), ("gemma", "attention")])
def test_only_what_is_read_is_computed(name, kind, layout):
    """qwen3's attention has no fused forward: its last layer restricts what follows attention."""
    model = packed_model(name)
    kinds = fused_layers.install(model).kinds
    assert kind in kinds and kinds["last layer"] == 1
    assert_equal_to_the_whole_layer(model, last_tokens(layout), 1e-5)


def test_in_bf16_and_with_lora():
    model = lora.Adaptation(lora.Config(r=4, target_modules="all-linear")).apply(packed_model("llama"), "lm")
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert fused_layers.install(model).kinds["last layer"] == 1
    assert_equal_to_the_whole_layer(model, last_tokens(LAYOUTS[0]), 3e-2)


def test_a_layer_that_computes_more_keeps_its_own_forward():
    """granite has llama's modules, and multiplies what it adds to the hidden states."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import SMALL
    from tunesmith.models.fast import attention

    attention.register()
    granite = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **SMALL, residual_multiplier=0.5)).eval()
    granite.set_attn_implementation(attention.NAME)
    fused = fused_layers.install(granite)
    assert fused.kinds["norm"] and "last layer" not in fused.kinds and not last_layer.most_read(granite.base_model)
    assert last_layer.find(packed_model("gemma3").base_model) is None  # norms around both parts


def test_most_positions_read_and_recomputed_layers_take_the_whole_layer():
    model, rows = packed_model("llama"), [example(2, 30, 31)]
    fused_layers.install(model)
    batch, places = shared_prompts.arrange(rows, LAYOUTS[0])
    many = {**batch, "positions": torch.cat([torch.from_numpy(place) for place in places]).unique()}
    assert torch.equal(lm_head.outputs_at(model, many), lm_head.hidden_states(model, many)[0][many["positions"]])
    few = last_tokens(LAYOUTS[0], rows)
    expected = states_and_gradients(model, lm_head.outputs_at(model, few))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = states_and_gradients(model.train(), lm_head.outputs_at(model, few))
    assert all(relative_error(found[name], value) <= 1e-5 for name, value in expected.items())
