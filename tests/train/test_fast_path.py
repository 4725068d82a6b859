"""The parity check before the first step covers every gradient and every product of the fast path, and does not change the model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.numeric.test_parity import CPU, examples
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tunesmith import objectives
from tunesmith.adaptations import bottleneck, lora
from tunesmith.data.rows import Ranking
from tunesmith.models.fast import fused_bottleneck, linear_products
from tunesmith.models.find.locate import locate
from tunesmith.models.load import load
from tunesmith.objectives import dpo, reward, sft
from tunesmith.train import fast_path, parity_check

SFT = sft.Objective(sft.Config())
KINDS = {"lora": lora, "bottleneck": bottleneck}
GIVEN = {"lora": (linear_products.Projection, 3), "bottleneck": (fused_bottleneck.Appended, 1)}
"""The function of the fast path, and which of its gradients is that of A, or of the middle."""
ROWS = examples(SFT, tiny_tokenizer())


def adapted(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return KINDS[kind].Adaptation(KINDS[kind].Config()).apply(tiny_model("llama"), "lm").to(dtype)


@pytest.fixture(params=[False, True], ids=["small", "large"])
def large(request, monkeypatch):
    """Whether the network counts as large, so that the check takes the fewest tokens."""
    if request.param:
        monkeypatch.setattr(parity_check, "CHECK_WORK", 0)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_network_in_fp32_is_checked_on_few_tokens(dtype, large):
    few = large and dtype == torch.float32
    tokens = parity_check.check_tokens(tiny_model("llama").to(dtype))
    assert tokens == (parity_check.FEWEST_TOKENS if few else parity_check.CHECK_TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_gradient_behind_zeros_is_seen(kind, dtype, large, monkeypatch):
    function, place = GIVEN[kind]
    right = function.backward

    def wrong(ctx, grad):
        found = list(right(ctx, grad))
        found[place] = None if found[place] is None else -found[place]
        return tuple(found)

    assert fast_path.choose(adapted(kind, dtype), SFT, ROWS, 64, "auto", CPU).notes == []
    monkeypatch.setattr(function, "backward", staticmethod(wrong))
    chosen = fast_path.choose(adapted(kind, dtype), SFT, ROWS, 64, "auto", CPU)
    assert "the fused layers are off" in chosen.notes[0] and not chosen.fused.kinds


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_that_loses_a_gradient_behind_zeros_is_seen(kind, monkeypatch):
    model = adapted(kind)
    chosen = fast_path.choose(model, SFT, ROWS, 64, "auto", CPU)
    inner = model.get_base_model()
    real = inner.gradient_checkpointing_enable

    def wrong(**keys):
        real(**keys)
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "down.default.weight" in name:
                parameter.register_hook(torch.zeros_like)

    monkeypatch.setattr(inner, "gradient_checkpointing_enable", wrong)
    fast_path.recompute(chosen)
    assert not chosen.recomputed and "gradient checkpointing is off" in chosen.notes[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_random_state_are_left_as_they_were(kind):
    model = adapted(kind)
    weights, state = {name: one.detach().clone() for name, one in model.named_parameters()}, torch.get_rng_state()
    chosen = fast_path.choose(model, SFT, ROWS, 64, "auto", CPU)
    fast_path.recompute(chosen)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one, weights[name]) and one.grad is None for name, one in model.named_parameters())
    assert any(not one.any() for one in weights.values())


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_wrong_product_is_seen_where_nothing_is_trained(without, large, monkeypatch):
    model = adapted("bottleneck").requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bottleneck_up" in name:
                parameter.normal_()
    right = fused_bottleneck.Appended.forward
    monkeypatch.setattr(fused_bottleneck.Appended, "forward", staticmethod(lambda *given: right(*given) * 1.5))
    with without():
        chosen = fast_path.choose(model, SFT, ROWS, 64, "auto", CPU)
    assert "the fused layers are off" in chosen.notes[0]


@pytest.mark.parametrize(("dtype", "accepted"), [(torch.bfloat16, True), (torch.float16, False), (torch.float32, False)])
def test_a_reward_may_be_rounded_further_in_half_precision(dtype, accepted):
    """There, plain bf16 differs from fp32 by 11%, so two bf16 paths may differ by 18%."""
    expected, got = (0.7, [torch.tensor([1.0, 0.0])]), (0.7, [torch.tensor([1.0, 0.18])])
    assert parity_check.difference(expected, got, dtype) is not None
    network = SimpleNamespace(dtype=dtype)
    check = parity_check.ParityCheck(network, reward.Objective(reward.Config()), (), CPU)
    assert (check.compare(expected, got) is None) == accepted
    assert replace(check, objective=SFT).compare(expected, got) is not None


@pytest.mark.parametrize("task", [dpo, reward], ids=["dpo", "reward"])
def test_long_answers_are_tried_in_part(task, large, tmp_path, monkeypatch):
    """A check of two whole rows of a thousand tokens would take longer than a step of many runs."""
    objective = task.Objective(task.Config())
    rows = [Ranking("what is the " * 300, (" a b" * 200, " the" * (200 + n)), (0, 1)) for n in range(2)]
    long = [one for row in objective.encode(rows, tiny_tokenizer(None)) for one in row]
    seen, loss = [], task.Objective.loss

    def watched(self, model, batch):
        seen.append(batch["input_ids"].numel())
        return loss(self, model, batch)

    monkeypatch.setattr(task.Objective, "loss", watched)
    folder = locate(save_tiny("llama", tmp_path))
    network = load.load_model(folder, head=objective.traits.head, trainable=True, head_config=objectives.head_config(objective))
    chosen = fast_path.choose(network, objective, long, 4096, "auto", CPU)
    assert min(len(one["input_ids"]) for one in long) > 1000 and max(seen) <= 2 * 2 * parity_check.check_tokens(network)
    assert chosen.packed and chosen.layout.shared and not chosen.notes
