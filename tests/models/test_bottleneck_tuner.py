"""Bottleneck adapters as a tuner of peft: which layers have one, what they compute, and that peft's own functions work."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, mapping
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.tiny import SMALL, TINY, save_tiny, tiny_model
from tunesmith.errors import RecipeError
from tunesmith.models.adapters import bottleneck_tuner
from tunesmith.models.adapters.bottleneck_tuner import BottleneckConfig, BottleneckLayer, sublayers
from tunesmith.models.fast import attention, fused_bottleneck, fused_layers
from tunesmith.models.heads import noise

ENCODER = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
SMOLLM2 = {
    **SMALL, "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
}  # fmt: skip
MINILM = {"model_type": "bert", **ENCODER, "vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
          "num_attention_heads": 12}  # fmt: skip
FAMILIES: dict[str, Any] = {
    **{name: {"model_type": name, **values} for name, values in TINY.items()},
    "gemma2": {**SMALL, "model_type": "gemma2"},
    "phi3": {**SMALL, "model_type": "phi3"},
    "opt": {**SMALL, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
    "smollm2": SMOLLM2,
    "bert": {"model_type": "bert", **ENCODER},
    "roberta": {"model_type": "roberta", **ENCODER, "pad_token_id": 1},
    "distilbert": {"model_type": "distilbert", "vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "minilm": MINILM,
}
ENCODERS = ("bert", "roberta", "distilbert", "minilm")
IDS = torch.tensor([[5, 17, 40, 41, 3]])


def network(name: str) -> Any:
    """A random network: the body of an encoder, or a causal language model."""
    values = dict(FAMILIES[name])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return (AutoModel if name in ENCODERS else AutoModelForCausalLM).from_config(config)


def small(name: str) -> Any:
    torch.manual_seed(0)
    return network(name).eval() if name in ENCODERS else tiny_model(name)


def adapted(model: Any, **changes: Any) -> Any:
    """A peft model whose adapters hold random numbers."""
    bottleneck_tuner.register()
    job = "CAUSAL_LM" if hasattr(model, "generate") and model.get_output_embeddings() is not None else "FEATURE_EXTRACTION"
    made = get_peft_model(model, BottleneckConfig(**{"task_type": job, "bottleneck_size": 4, **changes})).eval()
    fill(made)
    return made


def fill(model: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def answer(model: Any) -> torch.Tensor:
    out = model(input_ids=IDS)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_number_of_parameters_is_the_papers(name: str, variant: str) -> None:
    """2 m d + d + m for each adapter (Houlsby et al. 2019, section 2.1)."""
    bottleneck_tuner.register()
    with torch.device("meta"):
        base = network(name)
        model = get_peft_model(base, BottleneckConfig(bottleneck_size=8, variant=variant))
    width, layers = base.config.hidden_size, base.config.num_hidden_layers
    adapters = layers * (2 if variant == "houlsby" else 1)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == adapters * (2 * 8 * width + width + 8)
    assert all(".bottleneck_" in name for name in trained)


@pytest.mark.parametrize(
    ("name", "attention", "forward"),
    [
        ("llama", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
        ("gemma3", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
        ("gpt2", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"),
        ("phi3", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
        ("opt", "model.decoder.layers.1.self_attn.out_proj", "model.decoder.layers.1.fc2"),
        ("bert", "encoder.layer.1.attention.output.dense", "encoder.layer.1.output.dense"),
        ("distilbert", "transformer.layer.1.attention.out_lin", "transformer.layer.1.ffn.lin2"),
    ],
)
def test_adapters_are_on_the_output_projections(name: str, attention: str, forward: str) -> None:
    with torch.device("meta"):
        model = network(name)
    assert sublayers(model, "houlsby")[-2:] == [attention, forward]
    assert sublayers(model, "pfeiffer")[-1:] == [forward]
    assert len(sublayers(model, "houlsby")) == 4


STRANGE: dict[str, Any] = {
    "mamba": ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "has 0 attentions"),
    "mixtral": ({"model_type": "mixtral", **SMALL, "num_local_experts": 2}, "experts"),
    "qwen2_moe": ({"model_type": "qwen2_moe", **SMALL, "num_experts": 4, "shared_expert_intermediate_size": 64}, "experts"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_network_that_is_built_otherwise_is_refused_untouched(name: str) -> None:
    values, why = STRANGE[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    before = [(name, type(module)) for name, module in model.named_modules()]
    bottleneck_tuner.register()
    with pytest.raises(RecipeError, match=f"{type(model).__name__} are not recognised.*{why}"):
        get_peft_model(model, BottleneckConfig())
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_layers_that_are_not_of_transformers_are_refused() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(RecipeError, match="2 of its 3 layers"):
        sublayers(model, "pfeiffer")


def by_hand(model: Any, targets: list[str], weights: dict[str, torch.Tensor], act: Any) -> None:
    """The same adapters in plain torch, as hooks on the outputs of the untouched network."""

    def hook(name: str) -> Any:
        d, d_bias, u, u_bias = (
            weights[f"base_model.model.{name}.bottleneck_{part}.default.{kind}"]
            for part in ("down", "up")
            for kind in ("weight", "bias")
        )
        return lambda module, given, y: y + act(y @ d.t() + d_bias) @ u.t() + u_bias

    for name in targets:
        model.get_submodule(name).register_forward_hook(hook(name))


@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma", "gemma3", "bert", "roberta"])
def test_output_and_gradients_are_those_of_a_few_lines_of_torch(name: str, variant: str) -> None:
    ours = adapted(small(name).double(), variant=variant, non_linearity="gelu").double()
    theirs = small(name).double().requires_grad_(False)
    copies = {name: p.detach().clone().requires_grad_() for name, p in ours.named_parameters() if p.requires_grad}
    by_hand(theirs, sublayers(theirs, variant), copies, torch.nn.functional.gelu)
    torch.testing.assert_close(answer(ours), answer(theirs), rtol=1e-12, atol=1e-12)
    answer(ours).square().sum().backward()
    answer(theirs).square().sum().backward()
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, copies[name].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("non_linearity", "formula"),
    [
        ("relu", lambda x: x.clamp_min(0)),
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("tanh", lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1)),
    ],
)
def test_the_non_linearity_is_the_one_that_was_named(non_linearity: str, formula: Any) -> None:
    layer = BottleneckLayer(torch.nn.Linear(6, 6), "default", BottleneckConfig(bottleneck_size=3, non_linearity=non_linearity))
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(layer.activation("default")(x), formula(x))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert"])
def test_a_fresh_adapter_changes_nothing_and_one_that_is_off_neither(name: str) -> None:
    expected = answer(small(name))
    bottleneck_tuner.register()
    model = get_peft_model(small(name), BottleneckConfig(bottleneck_size=4, variant="houlsby")).eval()
    assert answer(model).equal(expected)
    fill(model)
    assert not answer(model).equal(expected)
    with model.disable_adapter():
        assert answer(model).equal(expected)
    assert answer(model.unload()).equal(expected)


# ------------------------------------------------------------------------------------------------------- as one product


def layer_of(base: str, dtype: torch.dtype = torch.float64, width: int = 24, **changes: Any) -> BottleneckLayer:
    torch.manual_seed(0)
    made = {
        "linear": lambda: torch.nn.Linear(40, width, bias=False),
        "bias": lambda: torch.nn.Linear(40, width),
        "conv1d": lambda: bottleneck_tuner.Conv1D(width, 40),
    }[base]()
    layer = BottleneckLayer(made, "default", BottleneckConfig(**{"bottleneck_size": 5, "non_linearity": "silu", **changes}))
    fill(layer)
    layer.base_layer.requires_grad_(False)
    return layer.to(dtype)


@pytest.mark.parametrize("shape", [(7, 40), (1, 7, 40), (3, 4, 40)])
@pytest.mark.parametrize("base", ["linear", "bias", "conv1d"])
def test_one_product_is_the_layer_itself(base: str, shape: tuple[int, ...]) -> None:
    layer = layer_of(base)
    forward = fused_bottleneck.projection(layer)
    assert forward is not None
    found = []
    for function in (forward, layer):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = function(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
        layer.zero_grad()
    assert len(found[0]) == 6 and all(one is not None and one.any() for one in found[0])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_what_is_active_is_asked_at_each_call() -> None:
    layer = layer_of("linear")
    forward = fused_bottleneck.projection(layer)
    assert forward is not None
    x = torch.randn(4, 40, dtype=torch.float64)
    layer.update_layer("other", BottleneckConfig(bottleneck_size=3))
    layer.double()
    layer.set_adapter("other")
    torch.testing.assert_close(forward(x), layer.base_layer(x))  # a fresh one
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(forward(x), layer(x))
    layer.enable_adapters(False)
    assert forward(x).equal(layer.base_layer(x))


def test_a_trained_base_is_left_alone() -> None:
    layer = layer_of("linear")
    layer.base_layer.requires_grad_(True)
    assert fused_bottleneck.projection(layer) is None


def test_a_small_update_survives_bf16() -> None:
    """An update of a thousandth of y is below half a unit in y's last place, 0.2 to 0.4%: added to a rounded y it is lost."""
    layer = layer_of("linear", torch.bfloat16, width=512)
    x = torch.randn(300, 40).bfloat16()
    with torch.no_grad():
        exact = layer.base_layer.weight.double() @ x.double().t()
        layer.bottleneck_up["default"].bias.zero_()
        layer.bottleneck_up["default"].weight.mul_(0.0007)
        low = layer.activation("default")(layer.bottleneck_down["default"].double()(exact.t()))
        update = low @ layer.bottleneck_up["default"].weight.double().t()
        layer.bottleneck_down["default"].bfloat16()
        assert 2e-4 < update.norm() / exact.norm() < 2e-3

        def kept(y: torch.Tensor) -> float:
            """The share of the update that is in ``y``: its projection on the update's direction."""
            return float(((y.double() - exact.t()) * update).sum() / update.square().sum())

        together = kept(fused_bottleneck.projection(layer)(x))  # type: ignore[misc]
        apart = kept(layer(x))
    assert together == pytest.approx(1, abs=0.15)
    assert apart < 0.75


def test_fused_passes_are_used_around_the_adapters() -> None:
    attention.register()
    model = adapted(tiny_model("llama"), variant="houlsby")
    model.get_base_model().set_attn_implementation(attention.NAME)
    kinds = fused_layers.install(model).kinds
    if "norm" not in kinds:
        pytest.skip("no fused passes on this machine")
    assert kinds == {"attention": 2, "mlp": 2, "norm": 5, "last layer": 1}
    assert fused_layers.install(adapted(tiny_model("gpt2"), variant="houlsby")).kinds == {"bottleneck": 4}


@pytest.mark.parametrize("packed", [True, False])
def test_dropout_is_drawn_by_row_in_the_fused_passes_too(packed: bool) -> None:
    model = adapted(tiny_model("llama"), dropout=0.5)
    drawn, _ = noise.install(model, 0)
    assert drawn is not None and drawn.layers == 2
    drawn.step, drawn.rows, drawn.lengths, drawn.packed = 1, (0, 1), (4, 3), packed
    mlp = model.train().get_base_model().model.layers[0].mlp
    x = torch.randn(*((1, 7) if packed else (2, 4)), 32)
    plain = mlp(x)
    fused_layers.install(model.eval())
    torch.testing.assert_close(mlp.train()(x), plain)
    model.eval()
    assert not plain.allclose(mlp(x))


# ------------------------------------------------------------------------------------------------------------- in peft


def test_saved_and_opened_by_peft_again(tmp_path: Path) -> None:
    model = adapted(tiny_model("gpt2"), variant="houlsby")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("gpt2"), str(tmp_path)).eval()
    assert answer(again).equal(answer(model))
    assert again.peft_config["default"].variant == "houlsby"
    config = BottleneckConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, BottleneckConfig) and config.peft_type == "BOTTLENECK"
    assert config.target_modules == sublayers(tiny_model("gpt2"), "houlsby")


def test_two_adapters_on_one_base(tmp_path: Path) -> None:
    first = adapted(tiny_model("llama"))
    first.save_pretrained(tmp_path / "first")
    fill(first, 2)
    first.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "first")).eval()
    alone = answer(model)
    model.load_adapter(str(tmp_path / "second"), "second")
    assert answer(model).equal(alone)
    model.set_adapter("second")
    assert answer(model).equal(answer(first))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert answer(model).equal(alone)


def test_many_layers_are_named_shortly_and_in_one_order(tmp_path: Path) -> None:
    model = adapted(tiny_model("llama", num_hidden_layers=24), variant="houlsby")
    assert model.peft_config["default"].target_modules == ["down_proj", "o_proj"]
    assert len([module for module in model.modules() if isinstance(module, BottleneckLayer)]) == 48


def test_peft_does_not_merge_it() -> None:
    model = adapted(tiny_model("llama"))
    before = answer(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="non-linearity"):
            merge()
    assert answer(model).equal(before)


def test_a_tied_layer_that_is_trained_whole_stays_tied() -> None:
    model = adapted(tiny_model("llama"), modules_to_save=["lm_head"], ensure_weight_tying=True)
    core = model.get_base_model()
    first, last = (end.modules_to_save["default"].weight for end in (core.get_input_embeddings(), core.get_output_embeddings()))
    assert first is last and first.requires_grad


@pytest.mark.parametrize(
    "wrong", [{"variant": "parallel"}, {"non_linearity": "swish"}, {"bottleneck_size": 0}, {"dropout": 1.0}], ids=str
)
def test_a_config_that_cannot_be_names_its_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        BottleneckConfig(**wrong)


def test_plain_peft_opens_it_after_one_import_and_not_before(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(base))
    model.save_pretrained(tmp_path / "adapter")
    tables = [mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING, mapping.PEFT_TYPE_TO_PREFIX_MAPPING]
    for table in tables:  # as in a fresh process
        table.pop("BOTTLENECK", None)
    before = [dict(table) for table in tables]
    with pytest.raises(Exception, match="BOTTLENECK"):
        AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    importlib.reload(importlib.import_module("tunesmith.peft"))
    added = [table.keys() - old.keys() for table, old in zip(tables, before, strict=True)]
    assert added == [{"BOTTLENECK"}] * 3 and all(old.items() <= table.items() for table, old in zip(tables, before, strict=True))
    again = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter")).eval()
    assert answer(again).equal(answer(model))
