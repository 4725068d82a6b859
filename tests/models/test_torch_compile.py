"""Layers compiled one by one: one form for all packings, the same gradients, clean names, and off where results differ.

The compiler is real (inductor with the machine's C++ compiler in one test), the kernel of packed attention is a stand-in.
"""

import json
import shutil
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import tunesmith
from tests.models import standin
from tests.numeric.test_parity import CPU, examples, take_gradients, with_gradients_everywhere
from tests.runs import apart, model_folder, recipe, weights
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer
from tunesmith.adaptations import lora
from tunesmith.data.batch.pack import PACKED, to_device
from tunesmith.errors import RecipeError
from tunesmith.models.fast import kernels, torch_compile, varlen
from tunesmith.models.heads import lm_head, noise
from tunesmith.models.network import base
from tunesmith.objectives import sft
from tunesmith.train import fast_path
from tunesmith.train.train_config import TrainConfig

SFT = sft.Objective(sft.Config())
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@pytest.fixture
def choose_route(monkeypatch):
    """model -> its route and rows, packed by the kernel, as on a GPU."""
    kernel = varlen.with_gqa(standin.traceable)
    monkeypatch.setattr(varlen, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(varlen, "torch_kernel", lambda: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "available", lambda tensor: False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def made(model):
        rows = examples(SFT, tiny_tokenizer())
        noise.install(model, 0, 5.0)
        chosen = fast_path.choose(model, SFT, rows, 64, "auto", CPU)
        assert chosen.packed_attention == "varlen"
        return chosen, rows

    yield made
    torch._dynamo.reset()


def gradients(model, rows):
    model.train()
    SFT.loss(model, SFT.collate(rows, PACKED))[0].backward()
    return take_gradients(model)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def without_codegen(monkeypatch):
    """All of the compiler but its last part, which makes C++ or Triton code: that takes most of a minute."""
    monkeypatch.setattr(torch_compile, "enable", partial(torch_compile.enable, backend="aot_eager"))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.long, needs_compiler])])
def test_compiled_code_has_the_gradients_of_the_plain_path(backend, choose_route, monkeypatch):
    """aot_eager is all of the compiler but its last part, which makes C++ or Triton code and takes most of a minute."""
    monkeypatch.setattr(torch_compile, "enable", partial(torch_compile.enable, backend=backend))
    model = tiny_model("llama")
    chosen, rows = choose_route(model)
    expected = gradients(model, rows[1:])
    fast_path.compile_layers(chosen)
    assert chosen.compiled and chosen.notes == []
    for key, gradient in gradients(model, rows[1:]).items():
        assert (gradient - expected[key]).abs().max() <= 1e-4 * expected[key].abs().max(), key
    assert graphs() == 1, "one piece of code for both layers and all packings"


def test_lora_compiled_and_recomputed_is_the_same_function_for_every_packing(choose_route, without_codegen):
    model = with_gradients_everywhere(
        lora.Adaptation(lora.Config(r=4, target_modules=["q_proj", "down_proj"])).apply(
            tiny_model("llama", num_hidden_layers=1), "lm"
        )
    )
    chosen, rows = choose_route(model)
    names, packings = list(model.state_dict()), [rows, rows[1:3], rows[2:]]
    expected = [gradients(model, some) for some in packings]
    fast_path.compile_layers(chosen)
    assert chosen.compiled and chosen.notes == []
    fast_path.recompute(chosen)
    assert chosen.recomputed and chosen.as_dict()["compiled"]
    so_far = graphs()
    assert so_far >= 1 and not torch._dynamo.utils.counters["graph_break"]
    for some, truth in zip(packings, expected):
        for key, gradient in gradients(model, some).items():
            assert (gradient - truth[key]).abs().max() <= 1e-4 * truth[key].abs().max(), key
    assert graphs() == so_far, "a new packing was compiled anew"
    assert list(model.state_dict()) == names and not any("_orig_mod" in name for name in names)
    with fast_path.plain_attention(model, chosen):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert graphs() == so_far, "generation was compiled"
    chosen.disable()
    assert not any(layer._compiled_call_impl for layer in torch_compile.layers(model))


def test_torchs_own_kernel_is_traced_without_a_break():
    """On the meta device there is no arithmetic, but the kernel's arguments are checked, and shapes go forward and back.

    gemma3 has layers of both kinds, with and without a sliding window.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    varlen.register(varlen.torch_kernel(), (9, 0))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("gemma3", num_hidden_layers=2)).to(torch.bfloat16).train()
    model.set_attn_implementation(varlen.NAME)
    torch_compile.enable(model, backend="aot_eager")
    seen = []
    for lengths in ((20, 13), (40, 9, 11)):
        batch = {"input_ids": torch.zeros(1, sum(lengths), dtype=torch.long), "segments": lengths}
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        hidden = lm_head.hidden_states(model, to_device(batch, "meta"))
        hidden.sum().backward()
        assert hidden.shape == (1, sum(lengths), 32)
        seen.append(graphs())
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())
    assert not torch._dynamo.utils.counters["graph_break"]
    assert seen[0] == seen[-1] <= 2, "one form for each kind of layer"
    torch._dynamo.reset()


def test_a_run_keeps_clean_names_and_records_whether_it_compiled(choose_route, tmp_path, monkeypatch):
    """The traced layers run without a code generator: the other tests compare compiled gradients."""
    monkeypatch.setattr(torch_compile, "enable", partial(torch_compile.enable, backend="eager"))
    model_folder(tmp_path, "llama", num_hidden_layers=1)
    made = recipe(tmp_path, "llama", max_steps=1, count=5)
    plain = tunesmith.train(made, out=tmp_path / "plain")
    made["train"]["torch_compile"] = True
    monkeypatch.setattr(fast_path, "check_compile", lambda *given: None)
    compiled_too = tunesmith.train(made, out=tmp_path / "compiled")
    ways = [json.loads((tmp_path / run / "manifest.json").read_text())["route"] for run in ("plain", "compiled")]
    assert [way["compiled"] for way in ways] == [False, True]
    assert {way["attention"] for way in ways} == {"varlen"}
    assert apart(weights(plain["model_dir"]), weights(compiled_too["model_dir"])) < 1e-5  # which asks for the same names
    model, _ = tunesmith.load(compiled_too["model_dir"])
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_code_that_differs_is_switched_off_and_reported(choose_route, monkeypatch):
    model = tiny_model("llama")
    chosen, _ = choose_route(model)
    real = torch_compile.enable

    def wrong(model):
        real(model)
        for layer in torch_compile.layers(model):
            layer._compiled_call_impl = lambda *args, _layer=layer, **kwargs: _layer._call_impl(*args, **kwargs) * 1.1

    monkeypatch.setattr(torch_compile, "enable", wrong)
    fast_path.compile_layers(chosen)
    assert not chosen.compiled and not model.training
    assert "torch.compile is off: on the first rows it failed or differed (loss by" in chosen.notes[-1]
    assert not any(layer._compiled_call_impl for layer in torch_compile.layers(model))


def test_a_compiler_that_fails_is_reported_and_the_run_goes_on(choose_route, monkeypatch):
    model = tiny_model("llama")
    chosen, rows = choose_route(model)
    before = gradients(model, rows)

    def fail(graph, inputs):
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(
        torch_compile, "enable", lambda model: [layer.compile(backend=fail) for layer in torch_compile.layers(model)]
    )
    fast_path.compile_layers(chosen)
    assert not chosen.compiled and "no compiler here" in chosen.notes[-1] and "long story" not in chosen.notes[-1]
    assert all(gradient.equal(before[key]) for key, gradient in gradients(model, rows).items())


def test_attention_by_segments_is_not_compiled():
    model, rows = tiny_model("llama"), examples(SFT, tiny_tokenizer())
    chosen = fast_path.choose(model, SFT, rows, 64, "auto", CPU)
    fast_path.compile_layers(chosen)
    assert not chosen.compiled and "row by row" in chosen.notes[-1]


def test_layers_are_found_under_an_adapter_and_in_other_architectures():
    assert len(torch_compile.layers(tiny_model("gpt2"))) == 2
    adapted = lora.Adaptation(lora.Config(r=4)).apply(tiny_model("qwen3"), "lm")
    assert torch_compile.layers(adapted) == list(base(adapted).model.layers)


@pytest.mark.parametrize(
    ("name", "changes", "rate", "refused"),
    [("llama", {}, 0.0, None), ("llama", {}, 0.3, "0.3"), ("gpt2", {"resid_pdrop": 0.2}, 0.0, "0.2"), ("gpt2", {"attn_pdrop": 0.1, "embd_pdrop": 0.1}, 0.0, None)],
)  # fmt: skip
def test_dropout_inside_a_layer_is_refused(name, changes, rate, refused):
    model = lora.Adaptation(lora.Config(r=4, lora_dropout=rate)).apply(tiny_model(name, **changes), "lm")
    why = torch_compile.why_not(model)
    assert (why is None) if refused is None else f"its layers drop {refused} of" in why


def test_a_model_without_marked_layers_is_refused():
    assert "which modules of this model" in torch_compile.why_not(tiny_model("llama").model.layers[0].mlp)


def test_a_cpu_refuses_before_weights_load(tmp_path):
    with pytest.raises(RecipeError, match=r"train.torch_compile is for GPUs, and this run is on a cpu device"):
        tunesmith.check(recipe(tmp_path, torch_compile=True))


@pytest.mark.parametrize(("dtype", "packing", "refused"), [(torch.float32, "auto", True), (torch.float32, "off", False), (torch.bfloat16, "auto", False)])  # fmt: skip
def test_packing_by_segments_is_refused_on_a_gpu(dtype, packing, refused, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    train = TrainConfig(torch_compile=True, packing=packing)
    if refused:
        with pytest.raises(RecipeError, match=r"takes fp16 and bf16, not float32"):
            fast_path.check_compile(train, torch.device("cuda"), dtype)
    else:
        fast_path.check_compile(train, torch.device("cuda"), dtype)


def test_a_map_of_devices_and_compiling_exclude_each_other(tmp_path):
    made = recipe(tmp_path, torch_compile=True) | {"device_map": "auto"}
    with pytest.raises(RecipeError, match=r"device_map: the hooks"):
        tunesmith.check(made)
