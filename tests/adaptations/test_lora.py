"""LoRA: where it starts, which layers it takes, and that the fast forms of it are peft's."""

import hashlib
import itertools
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import tunesmith
from tests.runs import apart, history, killed_before, recipe, weights
from tests.tiny import ENCODER, SMALL, TINY, tiny_config, tiny_model
from tunesmith.adaptations import lora
from tunesmith.errors import RecipeError
from tunesmith.models.adapters import lora_factors, lora_init
from tunesmith.models.fast import fused_layers, linear_products
from tunesmith.models.find.folder_summary import show

STARTS = ("pissa", "olora", "pissa_niter_99")
VARIED = {"use_rslora": True, "r": {"default": 4, "q_proj": 2}, "lora_alpha": {"default": 8, "q_proj": 3.0, "down_proj": 40.0}}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 40, 41, 42]])


def adapted(model, **keys):
    torch.manual_seed(0)
    return lora.Adaptation(lora.Config(**{"r": 4, "lora_alpha": 8, **keys})).apply(model, "lm")


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


def steps(model, count, rate=1e-2):
    """The losses of ``count`` steps of Adam on what is trained."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate, eps=1e-4)
    losses = []
    for _ in range(count):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("name", "changes", "left_out"),
    [
        ("qwen2_moe", {"shared_expert_intermediate_size": 32}, "mlp.shared_expert_gate (32 x 1 is narrower than r = 8)"),
        ("phimoe", {"num_local_experts": 8}, "mlp.router (it chooses the experts)"),
        ("mamba", {"state_size": 16, "time_step_rank": 8}, "mixer.out_proj (a kernel reads its weight alone)"),
    ],
)
def test_by_default_gates_routers_and_kernel_weights_get_no_lora(name, changes, left_out):
    """One small gate of each layer once refused the whole run."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SMALL, **experts, **changes}))
    end = left_out.split()[0]
    adaptation = lora.Adaptation(lora.Config())
    model = adaptation.apply(model, "lm")
    adapted = {one.partition(".lora_A")[0] for one, _ in model.named_modules() if one.endswith(".lora_A")}
    assert adapted and not any(one.endswith(end) for one in adapted)
    assert adaptation.notes[0].startswith("no LoRA on 2 linear layers: ") and left_out in adaptation.notes[0]


def test_a_rank_above_the_width_of_ordinary_layers_is_still_an_error():
    with pytest.raises(RecipeError, match=r"the rank 24 is above the size of .*k_proj"):
        adapted(tiny_model("llama"), r=24)


def test_a_model_without_linear_layers_has_nothing_to_add_a_lora_to():
    with torch.device("meta"):
        config = AutoConfig.for_model("squeezebert", **ENCODER, embedding_size=32)
        model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(RecipeError, match="adds to linear layers, and this model has none besides classifier"):
        lora.Adaptation(lora.Config()).apply(model, "score")


@pytest.mark.parametrize("start", STARTS)
def test_a_start_from_the_base_trains_as_pefts_own_which_changes_the_base(start):
    ours = adapted(tiny_model("llama"), init_lora_weights=start)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=start, task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny_model("llama"), config)
    near = 3e-3 if start == "pissa_niter_99" else 1e-4  # each draws its own decomposition, which is nearly the exact one
    assert steps(ours, 12) == pytest.approx(steps(theirs, 12), abs=near)


def test_a_start_from_the_base_is_not_a_start_from_zero():
    first = adapted(tiny_model("llama"))
    assert steps(first, 6)[-1] != pytest.approx(steps(adapted(tiny_model("llama"), init_lora_weights="pissa"), 6)[-1], rel=1e-3)


@pytest.mark.parametrize(("name", "start", "more"), [
    ("llama", "olora", VARIED), ("gpt2", "pissa", {"use_rslora": True}),
    ("llama", "pissa_niter_8", {"layers_to_transform": [1], "lora_dropout": 0.3}),
])  # fmt: skip
def test_what_is_saved_is_a_plain_lora_on_the_untouched_base(name, start, more, tmp_path):
    made = recipe(tmp_path, name, adaptation={"type": "lora", "r": 4, "lora_alpha": 8, "init_lora_weights": start, **more})
    base = tmp_path / f"model-{name}" / "model.safetensors"
    before = hashlib.sha256(base.read_bytes()).hexdigest()
    outcome = tunesmith.train(made, out=tmp_path / "run")
    assert hashlib.sha256(base.read_bytes()).hexdigest() == before
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == 8
    ours, _ = tunesmith.load(outcome["model_dir"])  # the probe of the trained network is compared
    theirs = AutoPeftModelForCausalLM.from_pretrained(outcome["model_dir"]).eval()
    assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=1e-5)
    plain = ours.get_base_model()
    with ours.disable_adapter():
        untouched, _ = tunesmith.load(made["model"])
        assert torch.equal(plain(IDS).logits, untouched(IDS).logits)
    assert not torch.allclose(ours(IDS).logits, untouched(IDS).logits, atol=1e-3)


def test_the_network_that_was_trained_and_the_saved_one_agree(tmp_path):
    model = adapted(tiny_model("llama"), init_lora_weights="pissa", **VARIED)
    steps(model, 8)
    expected = model(IDS).logits
    alphas = {name: alpha * 2**0.5 for name, alpha in VARIED["lora_alpha"].items()}
    plain = adapted(tiny_model("llama"), r={"default": 8, "q_proj": 4}, lora_alpha=alphas, use_rslora=True)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    lora.Adaptation(lora.Config(init_lora_weights="pissa", **VARIED)).save(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    names = {name.replace(".default", ""): value for name, value in plain.named_parameters() if value.requires_grad}
    assert names.keys() == saved.keys()
    for name, value in names.items():
        value.data = saved[name]
    assert torch.allclose(plain(IDS).logits, expected, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_an_update_starts_at_zero_exactly(start):
    base = tiny_model("llama").bfloat16()
    expected = base(IDS).logits
    assert torch.equal(adapted(base, init_lora_weights=start)(IDS).logits, expected)


@pytest.mark.parametrize("fast", [True, False])
def test_a_small_update_is_not_lost_in_bf16(fast):
    """Its factors are rounded like those of any LoRA; of a difference of two large products nothing would be left."""
    exact, rough = (
        adapted(tiny_model("llama"), init_lora_weights="pissa", target_modules=["o_proj"])
        .base_model.model.model.layers[0]
        .self_attn.o_proj
        for _ in range(2)
    )
    with torch.no_grad():
        for part in ("lora_A", "lora_B"):
            change = torch.randn_like(getattr(exact, part)["default"].weight) * 1e-4
            for layer in (exact, rough):
                getattr(layer, part)["default"].weight.copy_(change)
    x = torch.randn(64, 32)
    update = exact(x) - exact.base_layer(x)
    assert update.norm() < 0.005 * exact.base_layer(x).norm()
    for parameter in rough.parameters():
        parameter.data = parameter.data.bfloat16()
    rough.base_layer.weight.data.zero_()  # so that only the update is seen
    forward = linear_products.stack_linears([rough]).forward if fast else rough
    assert (forward(x.bfloat16()).float() - update).norm() < 0.02 * update.norm()


@pytest.mark.parametrize(("start", "precision"), [("pissa", "bf16"), ("pissa_niter_4", "fp32")])
def test_a_run_that_is_killed_goes_on_bit_for_bit(start, precision, tmp_path):
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 4, "init_lora_weights": start}, save_steps=2, precision=precision)
    whole = tunesmith.train(made, out=tmp_path / "whole")
    killed_before(4, made, tmp_path / "cut")
    resumed = tunesmith.train(made, out=tmp_path / "cut", resume=True)
    assert apart(weights(whole["model_dir"]), weights(resumed["model_dir"])) == 0


def test_a_run_goes_on_from_the_start_that_it_had_and_from_no_other(tmp_path, monkeypatch):
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 4, "init_lora_weights": "pissa"}, save_steps=2)
    killed_before(4, made, tmp_path / "run")
    real = lora_init.factors_of
    swapped = torch.tensor([1, 0, 2, 3])  # the same product: a decomposition that another machine might find
    others = {"turned": (lambda a, b: (-a, -b)), "swapped": (lambda a, b: (a[swapped], b[:, swapped]))}
    for other in others.values():
        monkeypatch.setattr(lora_init, "factors_of", lambda *given, other=other: other(*real(*given)))
        with pytest.raises(
            RecipeError, match=r"layers\.0\.self_attn\.q_proj starts from a decomposition.*\n  Resume it on that machine"
        ):
            tunesmith.train(made, out=tmp_path / "run", resume=True)
    monkeypatch.setattr(lora_init, "factors_of", lambda *given: tuple(one * (1 + 1e-6) for one in real(*given)))  # rounding
    assert tunesmith.train(made, out=tmp_path / "run", resume=True)["model_dir"]


def test_a_saved_start_can_be_trained_on_and_merged(tmp_path):
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 4, "init_lora_weights": "pissa"})
    first = tunesmith.train(made, out=tmp_path / "first")
    further = {**made, "model": first["model_dir"], "adapter": "continue", "adaptation": {"type": "lora", "r": 8}}
    second = tunesmith.train(further, out=tmp_path / "second")
    assert apart(weights(first["model_dir"]), weights(second["model_dir"])) > 1e-4
    facts = tunesmith.merge(second["model_dir"], tmp_path / "merged")
    assert facts["max_logit_difference"] < 1e-4
    with pytest.raises(RecipeError, match=r"names another r \(it has 4\)"):
        tunesmith.train({**further, "adaptation": {"type": "lora", "r": 3}}, out=tmp_path / "no")


def test_numbers_by_layer_reach_peft_as_its_patterns():
    config = adapted(tiny_model("llama"), **VARIED).peft_config["default"]
    assert (config.r, config.rank_pattern) == (4, {"q_proj": 2})
    assert (config.lora_alpha, config.alpha_pattern) == (8, {"q_proj": 3, "down_proj": 40})
    assert lora.Config(r={"default": 4}) == lora.Config(r=4)


def test_an_adapter_with_numbers_by_layer_is_continued_with_the_same_only(tmp_path):
    same, other = {"default": 4, "q_proj": 2}, {"default": 4, "q_proj": 1}
    both = {"type": "lora", "r": same, "lora_alpha": same}
    made = recipe(tmp_path, adaptation=both, max_steps=1)
    first = tunesmith.train(made, out=tmp_path / "first")
    further = {**made, "model": first["model_dir"], "adapter": "continue"}
    tunesmith.check(further)
    for key, wrong in (("r", 4), ("r", other), ("lora_alpha", other)):
        with pytest.raises(RecipeError, match=rf"names another {key} \(it has {{'default': 4.*, 'q_proj': 2"):
            tunesmith.check({**further, "adaptation": {**both, key: wrong}})


FORMS = {
    "plain": {}, "rslora": {"use_rslora": True}, "patterns": VARIED, "one layer": {"layers_to_transform": 1},
    "two kinds": {"target_modules": ["k_proj", "gate_proj"]}, "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora", **VARIED},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_fused_forms_have_pefts_loss_and_gradients(form):
    model = adapted(tiny_model("llama"), **FORMS[form])
    steps(model, 3)
    model.eval()
    record = fused_layers.install(model)
    assert record.kinds.get("mlp") or record.kinds.get("lora")
    found = []
    for forward in (model, None):
        if forward is None:
            record.disable()
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        found.append((float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert (gradient - their_gradients[name]).norm() <= 1e-5 * max(1.0, float(their_gradients[name].norm())), name


@pytest.mark.parametrize(("form", "precision", "near", "length"), [("plain", "fp32", 1e-4, 80), ("pissa", "bf16", 2e-2, 30)])
def test_a_long_curve_is_that_of_pefts_layers(form, precision, near, length, tmp_path, monkeypatch):
    made = recipe(
        tmp_path,
        adaptation={"type": "lora", "r": 4, **FORMS[form]},
        max_steps=length,
        batch_size=2,
        learning_rate=2e-3,
        precision=precision,
    )
    tunesmith.train(made, out=tmp_path / "fused")
    kinds = json.loads((tmp_path / "fused" / "manifest.json").read_text())["route"]["fused"]
    assert kinds["attention"] == kinds["mlp"] == 2
    monkeypatch.setattr(fused_layers, "install", lambda model, stack=True: fused_layers.Fused())
    tunesmith.train(made, out=tmp_path / "plain")
    curves = [[one["loss"] for one in history(tmp_path / run) if one["kind"] == "train"] for run in ("fused", "plain")]
    assert curves[0] == pytest.approx(curves[1], abs=near)
    assert min(curves[0]) < curves[0][0] - 0.2


# ------------------------------------------------------------------------------------------------ which layers, how many numbers


def sizes(name):
    """(in, out) of the linear layers of one decoder layer of a tiny model, by the end of their names."""
    c = TINY[name]
    if name == "gpt2":
        d = c["n_embd"]
        return {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "c_fc": (d, 4 * d), "mlp.c_proj": (4 * d, d)}
    d, i, q, kv = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"] * 8, c["num_key_value_heads"] * 8
    return {
        "q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d),
        "gate_proj": (d, i), "up_proj": (d, i), "down_proj": (i, d),
    }  # fmt: skip


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "start"), itertools.product(TINY, (True, "pissa")))
def test_the_number_of_trained_parameters_in_closed_form(name, start):
    layers = sizes(name)
    first = next(iter(layers))
    with torch.device("meta"):
        model = adapted(_empty(name), init_lora_weights=start)
        assert trained(model) == 2 * sum(4 * (a + b) for a, b in layers.values())
        model = adapted(_empty(name), r={"default": 4, first: 2}, layers_to_transform=[1], init_lora_weights=start)
        assert trained(model) == sum((2 if end == first else 4) * (a + b) for end, (a, b) in layers.items())


def _empty(name):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(tiny_config(name))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_number_of_trained_parameters_of_a_body(kind):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99
    )
    with torch.device("meta"):
        model = lora.Adaptation(lora.Config(r=4)).apply(AutoModel.from_config(config), "token")
    pooler = 4 * (32 + 32)
    assert trained(model) == pooler + 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64))


REFUSED = {
    "rank above a layer": ({"r": 17, "target_modules": ["q_proj", "k_proj"]}, ["r: the rank 17", "layers.0.self_attn.k_proj", "32 x 16"]),
    "rank above one by pattern": ({"r": {"default": 4, "v_proj": 20}}, ["adaptation.r.v_proj: the rank 20", "32 x 16"]),
    "rank pattern": ({"r": {"default": 4, "q_porj": 2}}, ["adaptation.r.q_porj", "nearest: `q_proj`"]),
    "alpha pattern outside the targets": ({"lora_alpha": {"default": 8, "q_proj": 2.0}, "target_modules": ["v_proj"]}, ["adaptation.lora_alpha.q_proj", "v_proj"]),
    "layers": ({"layers_to_transform": [0, 2]}, ["no layer 2", "layers 0 to 1"]),
    "layers and a pattern": ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, ["needs a list of target_modules"]),
    "start of an embedding": ({"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"}, ["embed_tokens is an embedding", "linear"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_before_the_model_is_changed(case):
    keys, said = REFUSED[case]
    model = tiny_model("llama")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(RecipeError) as refused:
        adapted(model, **keys)
    assert all(word in str(refused.value) for word in said), refused.value
    assert [name for name, _ in model.named_modules()] == before


def test_factors_of_one_lora_are_read_and_others_are_not():
    model = adapted(tiny_model("llama"), target_modules=["q_proj"], lora_dropout=0.5)
    assert lora_factors.read(model.base_model.model.model.layers[0].self_attn.q_proj) is None
    model = adapted(tiny_model("llama"), target_modules=["q_proj"], init_lora_weights="olora")
    found = lora_factors.read(model.base_model.model.model.layers[0].self_attn.q_proj)
    assert found.down().shape == (8, 32) and found.up().shape == (32, 8)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_a_module_trained_whole_is_named_by_its_dotted_end_and_plain_peft_takes_the_same(kind, tmp_path):
    """peft itself compares the letters at the end: ``norm`` would be every ``input_layernorm`` too."""
    made = recipe(tmp_path, adaptation={"type": kind, "modules_to_save": ["norm"]}, max_steps=1)
    outcome = tunesmith.train(made, out=tmp_path / "run")
    saved = {name for name in weights(outcome["model_dir"]) if "norm" in name}
    assert saved == {"base_model.model.model.norm.weight"}
    opened = AutoPeftModelForCausalLM.from_pretrained(outcome["model_dir"], is_trainable=True)
    trained = {name for name, one in opened.named_parameters() if one.requires_grad and "norm" in name}
    assert trained == {"base_model.model.model.norm.modules_to_save.default.weight"}
    assert show(outcome["model_dir"])["adapter"]["modules_to_save"] == ["norm"]
