"""RMSNorm and SwiGLU of passes over prompts: the layers' own results, only where they are right, and only during a pass."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from tunesmith.models.fast import kernels
from tunesmith.models.generate import prompt_layers
from tunesmith.models.generate.forward_passes import SlotPass
from tunesmith.models.generate.slot_cache import Piece

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")


def classes(layers: prompt_layers.Replaced) -> list[str]:
    return sorted({type(module).__name__ for module, _ in layers})


@torch.inference_mode()
def test_a_pass_over_prompts_runs_them_and_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = tiny_model("llama"), list[str]()
    for norm in (module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm"):
        norm.weight.add_(0.1 * torch.randn(norm.weight.shape))
    run, call = SlotPass(model), kernels.call
    assert classes(run.layers) == ["LlamaMLP", "LlamaRMSNorm"] and len(run.layers) == 3 * len(model.model.layers) + 1
    run.resize(1, 64)
    monkeypatch.setattr(kernels, "call", lambda name, *given: called.append(name) or call(name, *given))
    found = run([Piece(range(5, 25), 0, 0)])[0]
    assert called.count("rms_norm") == 2 * len(model.model.layers) + 1 and called.count("swiglu") == len(model.model.layers)
    called.clear()
    assert torch.allclose(found, model(torch.arange(5, 25)[None]).logits[0, -1], atol=1e-5)
    assert not called and not any("forward" in vars(module) for module in model.modules())


def test_layers_that_compute_something_else_and_other_precisions_keep_their_own() -> None:
    assert not prompt_layers.forwards(tiny_model("gemma"))  # it scales by 1 + weight, and has another activation
    assert not prompt_layers.forwards(tiny_model("llama").to(torch.bfloat16))


def test_a_forward_that_training_has_replaced_stays() -> None:
    model = tiny_model("llama")
    layers = prompt_layers.forwards(model)
    norm, own = model.model.norm, lambda x: x
    norm.forward = own  # type: ignore[method-assign]
    with prompt_layers.replaced(layers):
        assert norm.forward is own and "forward" in vars(model.model.layers[0].mlp)
    assert norm.forward is own and "forward" not in vars(model.model.layers[0].mlp)
