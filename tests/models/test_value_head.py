"""Values and log-probabilities of the policy come from one pass, under any temperature; the head has a file of its own."""

import pytest
import torch
from torch import nn

from tests.numeric.test_parity import examples
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tunesmith.adaptations import full, lora
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.data.batch.shared_prompts import with_targets
from tunesmith.errors import ModelError
from tunesmith.models.fast import attention
from tunesmith.models.heads import lm_head, log_probs, value_head
from tunesmith.models.load import load
from tunesmith.models.network import base
from tunesmith.objectives import sft

TARGETS = {"attention": ["q_proj", "v_proj"], "head": ["lm_head"]}


def policy(adapted, name="llama"):
    model = tiny_model(name)
    if adapted:
        model = lora.Adaptation(lora.Config(r=4, target_modules=TARGETS[adapted])).apply(model, "lm")
    value_head.attach(model)
    nn.init.normal_(value_head.find(model).weight, generator=torch.Generator().manual_seed(0))
    return model


def by_hand(model, rows, temperature):
    """Row by row, from transformers' own logits and hidden states."""
    logps, values, entropies = [], [], []
    for row in rows:
        ids = torch.from_numpy(row["input_ids"]).long()[None]
        out = model(input_ids=ids, output_hidden_states=True)
        targets = [place for place in range(1, len(row["input_ids"])) if row["supervised"][place]]
        before = [place - 1 for place in targets]
        every = (out.logits[0, before] / temperature).log_softmax(-1)
        logps.append(every[range(len(targets)), ids[0, targets]])
        entropies.append(-(every.exp() * every).sum(-1))
        values.append(value_head.find(model)(out.hidden_states[-1][0, before])[:, 0])
    return torch.cat(logps), torch.cat(values), torch.cat(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("layout", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("adapted", [None, *TARGETS])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_pass_gives_log_probabilities_and_values(name, adapted, layout, temperature):
    """With a LoRA on lm_head the logits are the model's own."""
    if name == "gpt2" and adapted == "attention":
        pytest.skip("other names of layers")
    model, rows = policy(adapted, name), examples(sft.Objective(sft.Config()), tiny_tokenizer())
    passes = []
    base(model).base_model.register_forward_hook(lambda *_: passes.append(1))
    expected = by_hand(model, rows, temperature)
    passes.clear()
    attention.register()
    base(model).set_attn_implementation(attention.NAME if layout.packed else "sdpa")
    found = log_probs.at_targets(model, with_targets(rows, layout), temperature, entropies=True)
    made = found.logps, value_head.values_at(model, found.hidden), found.entropies
    assert len(passes) == 1
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(made, expected, strict=True))
    with torch.no_grad():
        again = log_probs.at_targets(model, with_targets(rows, layout), temperature, entropies=True)
    assert torch.equal(again.logps, made[0]) and torch.equal(again.hidden, found.hidden) and len(passes) == 2
    assert torch.allclose(again.entropies, made[2], atol=2e-5)
    ours, theirs = (
        torch.autograd.grad(
            one[0].sum() + one[1].square().sum() + one[2].sum(), [p for p in model.parameters() if p.requires_grad]
        )
        for one in (made, expected)
    )
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())) for a, b in zip(ours, theirs, strict=True))


def test_the_head_is_saved_next_to_the_model_and_loaded_from_there(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    model = policy(None)
    with value_head.set_aside(model):
        assert value_head.find(model) is None
        full.Adaptation(full.Config()).save(model, folder)
    value_head.save(model, folder)
    again = load.load(folder)[0]
    assert value_head.find(again) is None, "the model itself has no such head"
    value_head.attach(again, folder)
    assert torch.equal(value_head.find(again).weight, value_head.find(model).weight)
    wider = tiny_model("llama", hidden_size=64, head_dim=16)
    with pytest.raises(ModelError, match=r"value_head.safetensors is not the value head of this model: expected .*\[1, 64\]"):
        value_head.attach(wider, folder)


def test_an_error_while_saving_leaves_the_head_where_it_was():
    model = policy(None)
    with pytest.raises(OSError), value_head.set_aside(model):
        raise OSError
    assert value_head.find(model) is not None


def test_a_new_head_values_everything_at_zero_and_disturbs_no_gradient():
    model = tiny_model("llama")
    value_head.attach(model)
    hidden = torch.randn(7, 32, requires_grad=True)
    values = value_head.values_at(model, hidden)
    assert values.tolist() == [0.0] * 7
    (gradient,) = torch.autograd.grad((values - 1).square().sum(), hidden)
    assert not gradient.any()
    assert lm_head.takes_outputs(model)
