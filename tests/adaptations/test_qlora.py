"""QLoRA: a LoRA on a 4-bit or 8-bit base equals peft's. The quantised weights never change and are made again on loading."""

import json
import sys

import pytest
import torch

import tunesmith
from tests import processes
from tests.numeric.test_parity import examples, plain_loss_and_gradients, take_gradients, with_gradients_everywhere
from tests.runs import apart, history, killed_before, model_folder, recipe, weights
from tests.tiny import TINY, save_tiny, tiny_model, tiny_tokenizer
from tunesmith.adaptations import lora, qlora
from tunesmith.errors import MissingExtra, RecipeError
from tunesmith.models.find.folder_summary import show
from tunesmith.models.load import compute_dtype, dequantized_linear, quantization
from tunesmith.models.load.load import load_model, locate
from tunesmith.models.network import base
from tunesmith.objectives import cpt, sft
from tunesmith.recipe import parse
from tunesmith.train import fast_path, memory_budget, setup

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", None)]


def adaptation(quant_type="nf4", twice=None, **keys):
    given = {} if twice is None else {"use_double_quant": twice}
    return qlora.Adaptation(qlora.Config(r=4, quant_type=quant_type, **given, **keys))


def adapted(folder, chosen, dtype=torch.float32):
    """A base on disk, quantised and adapted as a run does it, with an update that is not zero."""
    model = chosen.apply(load_model(locate(folder), dtype=dtype, trainable=True, **chosen.load_kwargs()), "lm")
    with_gradients_everywhere(model)
    compute_dtype.cast(model, dtype)
    return model


def bits(model):
    """Everything that the quantised layers are made of, by name."""
    return {
        f"{name}.{number}": tensor.clone()
        for name, layer in model.named_modules()
        if dequantized_linear.is_layer(layer)
        for number, tensor in enumerate(quantization._weight_tensors(layer))
    }


def equal(ours, theirs):
    return ours.keys() == theirs.keys() != set() and all(ours[name].equal(theirs[name]) for name in ours)


def relative(ours, theirs):
    """Return the difference of all gradients together, relative to their norm."""
    assert ours.keys() == theirs.keys()
    norm = sum(float(value.float().square().sum()) for value in theirs.values()) ** 0.5
    return sum(float((ours[name].float() - theirs[name].float()).square().sum()) for name in ours) ** 0.5 / norm


FP32, BF16 = (torch.float32, 1e-5), (torch.bfloat16, 2e-2)
"""Number format, and how far loss and gradients may differ."""
CELLS = [
    *(("llama", *kind, *FP32) for kind in KINDS), ("llama", "nf4", True, *BF16), ("llama", "int8", None, *BF16),
    ("qwen3", "fp4", False, *FP32), ("gemma", "int8", None, *FP32), ("gpt2", "nf4", False, *FP32), ("mistral", "nf4", True, *FP32),
]  # fmt: skip


@pytest.mark.parametrize(("name", "quant_type", "twice", "dtype", "limit"), CELLS)
def test_loss_and_gradients_are_pefts_own_on_the_same_bits(name, quant_type, twice, dtype, limit, tmp_path):
    model = adapted(model_folder(tmp_path, name), adaptation(quant_type, twice), dtype)
    objective = sft.Objective(sft.Config())
    rows = examples(objective, tiny_tokenizer("chatml"))
    for module in model.modules():
        if dequantized_linear.is_layer(module):
            module.__dict__.pop("forward", None)  # int8: bitsandbytes' own product for training
    model.train()
    loss, gradients = plain_loss_and_gradients(model, rows)

    compute_dtype.cast(model, dtype)
    chosen = fast_path.choose(model, objective, rows, max(len(row["input_ids"]) for row in rows), "auto", CPU)
    assert chosen.notes == [] or name == "mistral"
    assert chosen.fused.kinds and (name == "gpt2" or "mlp" in chosen.fused.kinds or name == "gemma")
    batch = objective.collate(rows, chosen.layout)
    total, _ = objective.loss(model, batch)
    (total / int(objective.count(batch))).backward()
    assert total.item() / int(objective.count(batch)) == pytest.approx(loss, rel=limit)
    assert relative(take_gradients(model), gradients) < (limit if dtype is torch.float32 else 4 * limit)


@pytest.mark.parametrize("name", TINY)
def test_the_number_of_trained_parameters_is_loras(name, tmp_path):
    """A weight of 4 bits has a shape of its own; the layer's size is not that."""
    counts = [
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        for model in (
            adapted(model_folder(tmp_path, name), adaptation()),
            lora.Adaptation(lora.Config(r=4)).apply(tiny_model(name), "lm"),
        )
    ]
    assert counts[0] == counts[1] > 0  # of LoRA's own the closed form is known


def test_the_product_is_the_one_with_its_numbers_written_out(tmp_path):
    """Stacked layers, a bias, one layer without LoRA: in fp64's place, the closed form with W as a plain matrix."""
    base = load_model(locate(model_folder(tmp_path, "llama")), **adaptation().load_kwargs())
    attention = base.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj]
    torch.manual_seed(0)
    x, a, b, bias = (torch.randn(*shape, requires_grad=True) for shape in ((5, 32), (3, 32), (48, 3), (48,)))
    whole = torch.cat([dequantized_linear.dequantize(layer, torch.float32) for layer in layers])
    outputs = dequantized_linear.Product.apply(x, layers, bias, a, b), x @ whole.t() + bias + x @ a.t() @ b.t()
    found = [torch.autograd.grad(y.square().sum(), (x, a, b, bias)) for y in outputs]
    assert torch.allclose(*outputs, atol=1e-4) and all(torch.allclose(*pair, rtol=1e-4, atol=1e-3) for pair in zip(*found))


def test_a_product_keeps_only_its_input(tmp_path):
    """Nothing of the size of a weight lives from forward to backward."""
    base = load_model(locate(model_folder(tmp_path, "llama")), **adaptation().load_kwargs())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one.numel()), one)[1], lambda one: one):
        x, a, b = torch.randn(2, 32, requires_grad=True), torch.randn(4, 32), torch.randn(64, 4)
        dequantized_linear.Product.apply(x, [base.model.layers[0].mlp.gate_proj], None, a, b)
    assert sum(kept) == 2 * (32 + 4) + a.numel() + b.numel() < 64 * 32


@pytest.mark.parametrize(("quant_type", "twice"), [("nf4", True), ("fp4", False), ("int8", None)])
def test_the_quantised_base_never_changes_and_loading_restores_it(quant_type, twice, tmp_path, monkeypatch):
    """After steps, evaluations and saves; then by ``tunesmith.load``, in the checkpoint's dtype or another."""
    built = []
    monkeypatch.setattr(setup, "build", lambda *given, build=setup.build: built.append(build(*given)) or built[0])
    keys = {} if twice is None else {"use_double_quant": twice}
    made = recipe(tmp_path, adaptation={"type": "qlora", "r": 4, "quant_type": quant_type, **keys}, max_steps=2, eval_steps=1)
    made["data"]["eval"] = {"fraction": 0.3}
    made["samples"] = {"count": 1, "max_new_tokens": 3}
    outcome = tunesmith.train(made, out=tmp_path / "run")
    fresh = load_model(locate(made["model"]), **adaptation(quant_type, twice).load_kwargs())
    trained = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): one for name, one in bits(built[0].model).items()
    }
    assert equal(trained, bits(fresh))
    loaded, _ = tunesmith.load(outcome["model_dir"])
    assert equal(bits(loaded), bits(built[0].model))
    other = load_model(locate(outcome["model_dir"]), dtype=torch.bfloat16)
    assert equal(bits(other), bits(loaded)) and other.dtype is torch.bfloat16
    before = loaded(torch.tensor([[5, 6, 7, 8]])).logits
    assert (other(torch.tensor([[5, 6, 7, 8]])).logits.float() - before).abs().max() < 0.05 * before.abs().max()


def test_the_bits_come_from_the_checkpoints_own_numbers(tmp_path):
    """Were an fp32 checkpoint rounded to bf16 first, the run's precision would choose the bits."""
    folder = locate(model_folder(tmp_path, "llama"))
    kwargs = adaptation().load_kwargs()
    wide, narrow = (load_model(folder, dtype=dtype, **kwargs) for dtype in (torch.float32, torch.bfloat16))
    rounded = tiny_model("llama").to(torch.bfloat16)
    rounded.save_pretrained(tmp_path / "rounded")
    assert equal(bits(wide), bits(narrow))
    assert not equal(bits(wide), bits(load_model(locate(tmp_path / "rounded"), **kwargs)))


def test_a_fresh_process_finds_the_same_answers(tmp_path):
    made = recipe(tmp_path, adaptation={"type": "qlora", "r": 4})
    folder = tunesmith.train(made, out=tmp_path / "run")["model_dir"]
    code = (
        "import sys; from tunesmith.models.load import load, probe\n"
        "model, tokenizer = load.load(sys.argv[1]); print(probe.verify_probe(load.locate(sys.argv[1]).path, model, tokenizer))"
    )
    done = processes.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) < 1e-5, done.stderr
    kept = json.loads((tmp_path / "run" / "model" / "tunesmith.json").read_text())["quantization"]
    assert kept == {
        "quant_type": "nf4",
        "use_double_quant": True,
        "blocksize": 64,
        "compute_dtype": "float32",
        "skipped": list(quantization.OUTPUTS),
    }


@pytest.mark.parametrize(
    ("quant_type", "others"),
    [("nf4", [{"gradient_checkpointing": True}, {"packing": "off"}]), ("int8", [{"micro_batch_tokens": 40}])],
)
def test_how_a_step_is_computed_does_not_change_it(quant_type, others, tmp_path):
    made = recipe(tmp_path, adaptation={"type": "qlora", "r": 4, "quant_type": quant_type})
    tunesmith.train(made, out=tmp_path / "straight")
    for keys in others:
        out = tmp_path / next(iter(keys))
        outcome = tunesmith.train({**made, "train": {**made["train"], **keys}}, out=out)
        assert not json.loads((out / "manifest.json").read_text())["route"]["notes"]
        assert apart(weights(tmp_path / "straight" / "model"), weights(outcome["model_dir"])) < 2e-5


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    made = recipe(tmp_path, adaptation={"type": "qlora", "r": 4, "lora_dropout": 0.2}, save_steps=1, precision="bf16")
    tunesmith.train(made, out=tmp_path / "straight")
    killed_before(3, made, tmp_path / "killed")
    tunesmith.train(made, out=tmp_path / "killed", resume=True)
    assert history(tmp_path / "straight") == history(tmp_path / "killed")
    assert apart(weights(tmp_path / "straight" / "model"), weights(tmp_path / "killed" / "model")) == 0


def continued(made, folder, kind):
    return {**made, "model": str(folder), "adapter": "continue", "adaptation": kind}


def test_an_adapter_is_continued_on_the_base_it_knows(tmp_path):
    made = recipe(tmp_path, adaptation={"type": "qlora", "r": 4, "quant_type": "fp4"}, max_steps=8)
    first = {**made, "train": {**made["train"], "lr_scheduler_type": "constant", "max_steps": 4, "shuffle": False}}
    tunesmith.train(first, out=tmp_path / "run")
    on = tunesmith.train(continued(first, tmp_path / "run", "qlora"), out=tmp_path / "on")
    losses = [[record["loss"] for record in history(tmp_path / name) if record["kind"] == "train"] for name in ("run", "on")]
    assert losses[1][0] < losses[0][0]
    assert json.loads((tmp_path / "on" / "manifest.json").read_text())["quantization"]["quant_type"] == "fp4"
    assert quantization.record(tunesmith.load(on["model_dir"])[0])["quant_type"] == "fp4"
    with pytest.raises(RecipeError, match=r"quant_type \(it has fp4\)"):
        tunesmith.check(continued(first, tmp_path / "run", {"type": "qlora", "quant_type": "int8"}))
    with pytest.raises(RecipeError, match=r"trained on a base that was quantised to fp4.*\n.*adaptation: qlora"):
        tunesmith.check(continued(first, tmp_path / "run", "lora"))


def test_the_forecast_of_a_continued_adapter_counts_its_quantisation(tmp_path):
    made = recipe(
        tmp_path, adaptation={"type": "qlora", "r": 4, "quant_type": "int8", "modules_to_save": ["down_proj"]}, max_steps=1
    )
    tunesmith.train(made, out=tmp_path / "run")
    first, on = (setup.read(parse(one), CPU, lambda line: None) for one in (made, continued(made, tmp_path / "run", "qlora")))
    assert on.outline.quantized == first.outline.quantized


def test_an_adapter_of_an_unquantised_base_is_not_continued_on_a_quantised_one(tmp_path):
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 4})
    tunesmith.train(made, out=tmp_path / "run")
    with pytest.raises(RecipeError, match=r"trained on a base that was not quantised.*\n.*adaptation: lora"):
        tunesmith.check(continued(made, tmp_path / "run", "qlora"))


def test_without_bitsandbytes_the_extra_is_named_before_anything_loads(tmp_path, monkeypatch):
    made = recipe(tmp_path, adaptation="qlora")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    monkeypatch.setattr(setup, "prepare", lambda *given, **keys: pytest.fail("data were read"))
    with pytest.raises(MissingExtra, match=r"adaptation=qlora needs the package 'bitsandbytes'.*\n.*tunesmith\[bnb\]"):
        tunesmith.train(made, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"init_lora_weights": "pissa"}, "pissa decomposes the base model's weights"),
        ({"init_lora_weights": "olora"}, "olora decomposes the base model's weights"),
        ({"init_lora_weights": "loftq"}, "loftq is not supported"),
        ({"quant_type": "int8", "use_double_quant": False}, "use_double_quant does nothing with quant_type: int8"),
        ({"quant_type": "int4"}, "`adaptation.quant_type`: expected 'nf4', 'fp4' or 'int8', got 'int4'"),
    ],
)
def test_contradictory_keys_are_refused_by_name(keys, expected, tmp_path):
    with pytest.raises(RecipeError) as raised:
        parse(recipe(tmp_path, adaptation={"type": "qlora", **keys}))
    assert expected in str(raised.value)


def test_gaussian_starts_are_plain_loras(tmp_path):
    made = recipe(tmp_path, adaptation={"type": "qlora", "r": 4, "init_lora_weights": "gaussian"})
    tunesmith.train(made, out=tmp_path / "run")
    assert quantization.record(tunesmith.load(tmp_path / "run")[0])


WIDE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=64, vocab_size=512)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("wide") / "model", **WIDE)


def test_four_bits_have_the_documented_size(wide):
    """0.5 byte a number and a scale for 64; double quantisation makes a scale 1 byte: 32/64 - (8/64 + 32/(64 * 256)) = 0.373 bit.
    The tables (64 B and 1 kB a layer) are 0.1 bit here and nothing in a real layer, so they are left out of the comparison.
    """
    found = {}
    for twice in (True, False):
        model = load_model(locate(wide), dtype=torch.bfloat16, **adaptation("nf4", twice).load_kwargs())
        facts = quantization.measure(model)
        tables = facts["layers"] * (64 + (1024 + 4) * twice)
        found[twice] = 8 * (facts["bytes"] - tables) / facts["parameters"]
        assert facts["base_bytes_before"] - facts["base_bytes"] == 2 * facts["parameters"] - facts["bytes"]
    assert found[False] == 4.5 and found[True] == pytest.approx(4.5 - 0.373, abs=1e-3)
    assert found[False] / 16 < 0.32


@pytest.mark.parametrize(("quant_type", "twice"), KINDS)
@pytest.mark.parametrize("keys", [{}, {"modules_to_save": ["lm_head", "down_proj"]}], ids=["all", "some left out"])
def test_the_quantised_size_is_known_before_loading(wide, quant_type, twice, keys):
    kwargs = adaptation(quant_type, twice, **keys).load_kwargs()
    with torch.device("meta"):
        expected = quantization.estimate(_empty(wide), kwargs)
    facts = quantization.measure(load_model(locate(wide), **kwargs))
    assert expected.parameters == facts["parameters"]
    assert expected.bytes == pytest.approx(facts["bytes"], rel=0.04)


def _empty(folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def test_a_model_that_fits_only_in_four_bits_is_not_refused(wide, tmp_path):
    made = {**recipe(tmp_path, adaptation="lora"), "model": str(wide)}
    whole, four = (
        setup.read(parse({**made, "adaptation": kind}), CPU, lambda line: None)
        for kind in ({"type": "lora", "r": 1}, {"type": "qlora", "r": 1})
    )
    room = 4 * whole.outline.total
    with pytest.raises(RecipeError, match="or qlora"):
        memory_budget.check_weights(whole, room)
    memory_budget.check_weights(four, room)
    with pytest.raises(RecipeError, match="are missing before the first row"):
        memory_budget.check_weights(four, room // 16)


def test_the_base_models_memory_is_printed_and_recorded(tmp_path):
    outcome = tunesmith.train(recipe(tmp_path, adaptation={"type": "qlora", "r": 4}), out=tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (line,) = [note for note in manifest["notes"] if note.startswith("the base takes")]
    assert "14 layers in nf4, double quantisation" in line
    facts = manifest["quantization"]
    assert (outcome["base_bytes"], outcome["base_bytes_before"]) == (facts["base_bytes"], facts["base_bytes_before"])
    assert facts["base_bytes"] < facts["base_bytes_before"]
    assert "nf4, double quantisation" in show(tmp_path / "run")["quantization"]


@pytest.mark.parametrize(
    "keys",
    [
        {"use_dora": True, "loraplus_lr_ratio": 4.0},
        {"use_rslora": True, "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
        {"r": {"default": 4, "q_proj": 2}, "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_loras_own_keys_hold(keys, tmp_path):
    made = recipe(tmp_path, adaptation={"type": "qlora", "r": 4, **keys}, max_steps=1)
    made["add_tokens"] = ["<tool>"]
    folder = tunesmith.train(made, out=tmp_path / "run")["model_dir"]
    model, tokenizer = tunesmith.load(folder)
    assert len(tokenizer("<tool>", add_special_tokens=False)["input_ids"]) == 1
    for name in keys.get("modules_to_save", []):
        copies = [one for key, one in model.named_modules() if key.endswith(f"{name}.modules_to_save.default")]
        assert copies and not any(map(dequantized_linear.is_layer, (inner for one in copies for inner in one.modules())))


def test_lora_and_qlora_share_their_keys():
    assert set(qlora.Config.model_fields) - set(lora.Config.model_fields) == {"quant_type", "use_double_quant"}


def test_documents_too(tmp_path):
    model = adapted(model_folder(tmp_path, "llama"), adaptation())
    objective = cpt.Objective(cpt.Config())
    rows = examples(objective, tiny_tokenizer())
    assert fast_path.choose(model, objective, rows, 200, "auto", CPU).packed
    assert base(model).config.vocab_size == 512


def test_shards_are_refused_before_anything_loads(tmp_path):
    made = recipe(tmp_path, adaptation="qlora")
    with pytest.raises(RecipeError, match="--deepspeed is not supported with a 4-bit or 8-bit base"):
        tunesmith.train(made, out=tmp_path / "run", deepspeed=tmp_path / "ds.json")
