"""A layer with the names of a known one but another structure keeps its forward, and the run reports it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.numeric.test_parity import CPU, examples
from tests.tiny import SMALL, tiny_tokenizer
from tunesmith.models.fast import fused_layers, kernels, self_check
from tunesmith.objectives import sft
from tunesmith.train import fast_path

SFT = sft.Objective(sft.Config())
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "sliding_window": 128}


def chosen(name, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SMALL, **EXPERTS, **changes})).eval()
    return fast_path.choose(model, SFT, examples(SFT, tiny_tokenizer()), 64, "auto", CPU)


@pytest.mark.parametrize(
    ("name", "kept"),
    [("stablelm", "StableLmAttention"), ("gpt_oss", "GptOssAttention"), ("llama4_text", "Llama4TextAttention")],
)
def test_a_forward_that_fails_on_random_numbers_is_not_replaced(name, kept):
    """Rotary embedding over a part of the head, sinks, other arguments: each once ended a run."""
    found = chosen(name)
    if not kernels.available(torch.zeros(1)):
        pytest.skip("there is no C compiler")
    assert any(note.startswith(f"{kept} keeps its own forward: it failed on random numbers") for note in found.notes)
    assert "failed" in found.as_dict()["not_fused"][kept]


def test_rotary_embedding_over_half_of_the_head_keeps_the_models_own_attention():
    found = chosen("glm4_moe", n_routed_experts=4, n_group=1, topk_group=1)
    assert found.packed and found.notes == []


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_keywords_that_attention_ignores_do_not_prevent_packing(name):
    assert chosen(name).packed


class DoublingRMSNorm(LlamaRMSNorm):
    """A norm whose settings show in nothing but its output."""

    def __init__(self, doubles):
        super().__init__(64)
        self.doubles = doubles

    def forward(self, hidden_states):
        return super().forward(hidden_states) * (2 if self.doubles else 1)


@pytest.mark.skipif(not kernels.available(torch.zeros(1)), reason="there is no C compiler")
@pytest.mark.parametrize(("doubles", "checks"), [([False, False], 1), ([False, True], 2), ([True, True], 1)])
def test_one_layer_of_each_structure_is_checked(doubles, checks, monkeypatch):
    counted, why_not = [], self_check.why_not
    monkeypatch.setattr(self_check, "why_not", lambda *given: counted.append(given[0]) or why_not(*given))
    fused = fused_layers.install(torch.nn.ModuleList([torch.nn.Linear(64, 64), *map(DoublingRMSNorm, doubles)]))
    assert len(counted) == checks
    assert bool(fused.rejected) == any(doubles), "a norm that doubles is found, also after one that does not"
