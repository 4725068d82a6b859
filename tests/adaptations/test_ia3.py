"""(IA)^3: which layers are scaled, that peft reads what is saved, and that the fast form is peft's."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import nn
from transformers import AutoConfig, AutoModel

import tunesmith
from tests.runs import apart, killed_before, recipe, weights
from tests.tiny import TINY, tiny_model
from tunesmith.adaptations import ia3
from tunesmith.errors import RecipeError
from tunesmith.models.adapters import ia3_layers
from tunesmith.models.fast import fused_layers, linear_products

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 40, 41, 42]])


def adapted(model):
    return ia3.Adaptation(ia3.Config()).apply(model, "lm")


def moved(model, seed=1):
    """Vectors away from one, as training leaves them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", TINY)
def test_keys_values_and_the_inner_activation_are_scaled(name):
    c = TINY[name]
    with torch.device("meta"):
        model = adapted(tiny_shape(name))
    if name == "gpt2":
        expected = 2 * (3 * c["n_embd"] + 4 * c["n_embd"])  # the fused projection whole
    else:
        expected = 2 * (2 * c["num_key_value_heads"] * 8 + c["intermediate_size"])
    assert count(model) == expected
    assert all(".ia3_l." in name for name, p in model.named_parameters() if p.requires_grad)


def tiny_shape(name):
    from transformers import AutoModelForCausalLM

    from tests.tiny import tiny_config

    return AutoModelForCausalLM.from_config(tiny_config(name))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_bodies_of_encoders(kind):
    config = AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=12, num_attention_heads=4, intermediate_size=64, vocab_size=99
    )
    with torch.device("meta"):
        model = ia3.Adaptation(ia3.Config()).apply(AutoModel.from_config(config), "token")
    assert count(model) == 12 * (2 * 32 + 64)  # and not the attention's own output.dense
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "attention.output" in name]


def test_an_unknown_layer_is_refused_by_name():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.odd_proj = layer.self_attn.k_proj
        del layer.self_attn.k_proj
    with pytest.raises(RecipeError, match="odd_proj") as refused:
        adapted(model)
    assert "keys and values" in str(refused.value) and "adaptation: lora" in str(refused.value)
    with pytest.raises(RecipeError, match="which modules"):
        ia3.find_layers(nn.Sequential(nn.Linear(4, 2)))


def test_new_tokens_are_refused_and_the_others_named():
    with pytest.raises(RecipeError, match=r"adaptation=ia3 have no room(.|\n)*adaptation=lora, .* adaptation=full"):
        ia3.Adaptation(ia3.Config()).apply(tiny_model("llama"), "lm", new_rows=[512])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def trained(request, tmp_path_factory):
    """(recipe, model folder) of a run of four steps."""
    root = tmp_path_factory.mktemp(request.param)
    made = recipe(root, request.param, adaptation="ia3")
    return made, tunesmith.train(made, out=root / "run")["model_dir"]


def test_peft_opens_what_is_saved_and_merging_gives_the_same(trained, tmp_path):
    made, folder = trained
    ours, _ = tunesmith.load(folder)
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=1e-5)
    tunesmith.merge(folder, tmp_path / "merged")
    merged, _ = tunesmith.load(tmp_path / "merged")
    assert torch.allclose(merged(IDS).logits, ours(IDS).logits, atol=1e-5)
    base, _ = tunesmith.load(made["model"])
    assert not torch.allclose(base(IDS).logits, ours(IDS).logits, atol=1e-2)
    with ours.disable_adapter():
        assert torch.equal(ours(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_the_fused_form_has_pefts_loss_and_gradients(name):
    model = moved(adapted(tiny_model(name)))
    record = fused_layers.install(model)
    assert record.kinds.get("mlp") == 2
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append((float(loss.detach()), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}))
        record.disable()
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours == pytest.approx(theirs, rel=1e-5) and our_gradients.keys() == their_gradients.keys()
    for key, gradient in our_gradients.items():
        assert (gradient - their_gradients[key]).norm() <= 1e-5 * max(1.0, float(their_gradients[key].norm())), key


def test_a_product_of_scaled_layers_is_each_layers_own():
    attention = moved(adapted(tiny_model("llama"))).base_model.model.model.layers[0].self_attn
    x = torch.randn(9, 32)
    both = linear_products.stack_linears([attention.q_proj, attention.k_proj, attention.v_proj])
    assert torch.allclose(both(x), torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], dim=1), atol=1e-5)
    assert ia3_layers.read([attention.q_proj, attention.o_proj]).outer == [None, None]


def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path):
    made = recipe(tmp_path, adaptation="ia3", save_steps=2, precision="bf16")
    whole = tunesmith.train(made, out=tmp_path / "whole")
    killed_before(4, made, tmp_path / "cut")
    resumed = tunesmith.train(made, out=tmp_path / "cut", resume=True)
    assert apart(weights(whole["model_dir"]), weights(resumed["model_dir"])) == 0


def test_updates_smaller_than_the_spacing_of_bf16_are_kept(tmp_path):
    """2^-8 is half a step of bf16 above one: the masters take them, and what is saved are the masters."""
    found = []
    for precision in ("fp32", "bf16"):
        (tmp_path / precision).mkdir()
        made = recipe(tmp_path / precision, adaptation="ia3", precision=precision, learning_rate=5e-4, max_steps=12)
        found.append(weights(tunesmith.train(made, out=tmp_path / precision / "run")["model_dir"]))
    change, rough = (torch.cat([value.flatten() - 1 for value in one.values()]) for one in found)
    assert 0 < change.abs().max() < 2**-7
    assert (rough - change).norm() < 0.3 * change.norm()


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
def test_an_adapter_is_trained_on_as_ia3_alone(trained, tmp_path):
    made, folder = trained
    further = {**made, "model": folder, "adapter": "continue"}
    with pytest.raises(RecipeError, match="this adapter is ia3, and adaptation: lora"):
        tunesmith.check({**further, "adaptation": "lora"})
    second = tunesmith.train(further, out=tmp_path / "second")
    assert apart(weights(folder), weights(second["model_dir"])) > 1e-4
    config = json.loads((tmp_path / "second" / "model" / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3"


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
def test_show_counts_the_vectors(trained):
    from tunesmith.models.find.folder_summary import show

    parameters = show(trained[1])["parameters"]
    assert parameters["adapter: ia3 vectors"] == parameters["adapter"] == {"count": 192, "dtypes": ["F32"]}


def test_fused_layers_stay_under_deepspeed():
    """DeepSpeed moves trained weights, so layers that stack trained weights are not fused; layers under an adapter are."""
    kinds = fused_layers.install(adapted(tiny_model("llama")), stack=False).kinds
    assert kinds == fused_layers.install(adapted(tiny_model("llama"))).kinds and kinds.get("mlp") == 2
    assert "mlp" not in fused_layers.install(tiny_model("llama"), stack=False).kinds
