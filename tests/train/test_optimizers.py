"""Every optimiser follows its published formula at the rates of the recipe, and resumes from a checkpoint bit for bit."""

import math
import sys

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from tests.runs import apart, history, killed_before, model_folder, recipe, weights
from tests.tiny import tiny_config, tiny_model
from tunesmith import adaptations, objectives
from tunesmith.errors import MissingExtra, RecipeError
from tunesmith.models.heads import lm_head
from tunesmith.train import evaluation, optimizers
from tunesmith.train.master_weights import Masters
from tunesmith.train.train_config import TrainConfig
from tunesmith.train.update import Update

BNB = ("adamw_8bit", "lion")
ARGS = {
    "adamw": {"eps": 1e-4},
    "adamw_8bit": {"eps": 1e-3, "min_8bit_size": 256},
    "adafactor": {"eps": [1e-8, 1e-3], "beta1": 0.9},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "lion": {"betas": [0.9, 0.98]},
}


def needs(name):
    if name in BNB:
        pytest.importorskip("bitsandbytes")


def settings(name, **changes):
    needs(name)
    return {"optim": name, "optim_args": ARGS[name], "learning_rate": 1e-3, **changes}


# ------------------------------------------------------------------------------- each one beside its published formula


def by_adamw(p, g, s, t, rate, decay, betas=(0.9, 0.999), eps=1e-8):
    """Loshchilov and Hutter 2019, algorithm 2."""
    s["m"] = betas[0] * s.get("m", 0) + (1 - betas[0]) * g
    s["v"] = betas[1] * s.get("v", 0) + (1 - betas[1]) * g**2
    step = (s["m"] / (1 - betas[0] ** t)) / ((s["v"] / (1 - betas[1] ** t)).sqrt() + eps)
    return p - rate * decay * p - rate * step


def by_adafactor(p, g, s, t, rate, decay):
    """Shazeer and Stern 2018, algorithms 4 and 5, with a rate that is given, and decoupled decay."""
    keep = 1 - t**-0.8
    square = g**2 + 1e-30
    if g.dim() == 2:
        s["row"] = keep * s.get("row", 0) + (1 - keep) * square.mean(1)
        s["column"] = keep * s.get("column", 0) + (1 - keep) * square.mean(0)
        v = torch.outer(s["row"], s["column"]) / s["row"].mean()
    else:
        v = s["v"] = keep * s.get("v", 0) + (1 - keep) * square
    step = g / v.sqrt()
    return p - rate * decay * p - rate * step / step.square().mean().sqrt().clamp_min(1)


def by_sgd(p, g, s, t, rate, decay):
    g = g + decay * p
    s["m"] = 0.9 * s["m"] + g if "m" in s else g
    return p - rate * s["m"]


def by_lion(p, g, s, t, rate, decay):
    """Chen et al. 2023, algorithm 2."""
    m = s.get("m", torch.zeros_like(p))
    s["m"] = 0.99 * m + 0.01 * g
    return p - rate * ((0.9 * m + 0.1 * g).sign() + decay * p)


FORMULAS = {
    "adamw": ({}, by_adamw, 1e-6),
    "adamw_8bit": ({"min_8bit_size": 4}, by_adamw, 0.1),
    "adafactor": ({}, by_adafactor, 1e-5),
    "sgd": ({"momentum": 0.9}, by_sgd, 1e-6),
    "lion": ({}, by_lion, 1e-6),
}


def problem():
    """Weights of both kinds (a matrix decays, a vector does not) and a loss that they can lower."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 24, generator=generator), torch.randn(64, 12, generator=generator)
    model = torch.nn.Linear(24, 12)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model, lambda weight, bias: torch.nn.functional.mse_loss(x @ weight.t() + bias, y)


@pytest.mark.parametrize("name", FORMULAS)
def test_an_optimiser_follows_its_formula(name):
    needs(name)
    arguments, formula, tolerance = FORMULAS[name]
    config = TrainConfig(optim={"type": name, **arguments}, learning_rate=0.02, weight_decay=0.1, warmup_steps=4, max_steps=40)
    model, loss_of = problem()
    plain = [p.detach().clone() for p in (model.weight, model.bias)]
    masters = Masters(model, torch.float32)
    optimizer = optimizers.build(masters.masters, config, (), {})
    update = Update(masters, optimizer, optimizers.schedule(optimizer, config, 40), 0.0, seed=0)
    ours, theirs, states = [], [], [{}, {}]
    for step in range(1, 41):
        loss = loss_of(model.weight, model.bias)
        update.backward(loss)
        update.norm(loss.detach())
        update.apply(step)
        ours.append(loss.item())
        plain = [p.requires_grad_() for p in plain]
        loss = loss_of(*plain)
        gradients = torch.autograd.grad(loss, plain)
        rate = 0.02 * ((step - 1) / 4 if step <= 4 else (41 - step) / 36)
        decays = (0.1, 0.0)
        plain = [
            formula(p.detach(), g, state, step, rate, decay)
            for p, g, state, decay in zip(plain, gradients, states, decays, strict=True)
        ]
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=tolerance)
    assert ours[-1] < 0.9 * ours[0]


@pytest.mark.long
def test_8_bit_moments_learn_as_32_bit_ones_do(tmp_path):
    pytest.importorskip("bitsandbytes")
    common = {"max_steps": 200, "batch_size": 4, "learning_rate": 1e-3}
    curves = []
    for name, arguments in (("adamw", {}), ("adamw_8bit", {"min_8bit_size": 256})):
        made = recipe(tmp_path, optim=name, **common)
        made["train"]["optim"] = {"type": name, **arguments}
        tunesmith.train(made, out=tmp_path / name)
        curves.append([record["loss"] for record in history(tmp_path / name) if record["kind"] == "train"])
    assert curves[0][-1] < 1.5 < 6 < curves[0][0]
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 0.1  # measured: 0.044, of a loss that falls from 6.3 to 1.4


# ------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ARGS)
def test_a_killed_run_goes_on_bit_for_bit(name, precision, tmp_path, monkeypatch):
    made = recipe(tmp_path, max_steps=5, save_steps=2, precision=precision, **settings(name, weight_decay=0.1))
    tunesmith.train(made, out=tmp_path / "straight")
    killed_before(4, made, tmp_path / "killed")
    tunesmith.train(made, out=tmp_path / "killed", resume=True)
    assert history(tmp_path / "killed") == history(tmp_path / "straight")
    ours, theirs = (load_file(tmp_path / run / "checkpoints" / "step-5" / "state.safetensors") for run in ("killed", "straight"))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype is theirs[key].dtype and ours[key].equal(theirs[key]) for key in theirs)
    kinds = {tensor.dtype for key, tensor in theirs.items() if key.startswith("optimizer.")}
    assert kinds == ({torch.float32, torch.uint8} if name == "adamw_8bit" else {torch.float32})


@pytest.mark.parametrize("name", ARGS)
def test_the_update_does_not_depend_on_the_split(name, tmp_path):
    made = recipe(tmp_path, **settings(name, learning_rate=1e-4 if name == "lion" else 1e-3))
    whole = weights(tunesmith.train(made, out=tmp_path / "whole")["model_dir"])
    made["train"].update(packing="off", micro_batch_tokens=90)
    other = weights(tunesmith.train(made, out=tmp_path / "split")["model_dir"])
    assert apart(whole, other) <= (2e-5 if name == "adamw_8bit" else 1e-6)  # a code of 8 bits may fall to the other side


@pytest.mark.parametrize("name", ARGS)
def test_a_small_rate_moves_every_master(name, tmp_path):
    rate = 1e-3 if name == "sgd" else 1e-5  # a gradient of 1e-5 times a rate of 1e-5 is less than fp32 holds of a weight of 0.1
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 4}, precision="bf16", **settings(name, learning_rate=rate))
    states = []
    for steps in (1, 4):
        made["train"].update(max_steps=steps, lr_scheduler_type="constant")
        tunesmith.train(made, out=tmp_path / str(steps))
        state = load_file(tmp_path / str(steps) / "checkpoints" / f"step-{steps}" / "state.safetensors")
        states.append({key: value for key, value in state.items() if key.startswith("master.")})
    assert all(".lora_" in name and value.dtype is torch.float32 for name, value in states[0].items())
    assert not [name for name in states[0] if states[0][name].equal(states[1][name])]


# ------------------------------------------------------------------------------------------- rates


def groups(optimizer, names):
    """Name of a parameter -> (rate, decay)."""
    by_id = {id(parameter): name for name, parameter in names.items()}
    return {by_id[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


def lora(**config):
    module = adaptations.module("lora")
    return module.Adaptation(module.Config(**config))


@pytest.mark.parametrize("config", [{}, {"use_dora": True, "bias": "all"}], ids=["plain", "vectors"])
def test_lora_plus_makes_the_groups_of_peft(config):
    from peft.optimizers import create_loraplus_optimizer

    adaptation = lora(loraplus_lr_ratio=16, **config)
    model = adaptation.apply(tiny_model("gpt2"), "lm")
    masters = Masters(model, torch.float32)
    train = TrainConfig(learning_rate=1e-4, weight_decay=0.1)
    ours = groups(optimizers.build(masters.masters, train, (), adaptation.learning_rates(masters.masters)), masters.masters)
    peft = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
    theirs = groups(peft, masters.masters)
    assert {name: rate for name, (rate, _) in ours.items()} == {name: rate for name, (rate, _) in theirs.items()}
    assert len({rate for rate, _ in ours.values()}) == 2
    assert {name: one for name, one in ours.items() if "lora_A" in name or "lora_B" in name}.items() <= theirs.items()


def test_lora_plus_reaches_the_b_of_an_embedding():
    adaptation = lora(target_modules=["embed_tokens", "q_proj"], loraplus_lr_ratio=8)
    masters = Masters(adaptation.apply(tiny_model("llama"), "lm"), torch.float32)
    rates = adaptation.learning_rates(masters.masters)
    assert {name.split(".")[-2 if "embedding" in name else -3] for name in rates} == {"lora_embedding_B", "lora_B"}
    assert set(rates.values()) == {8}
    assert len(rates) * 2 == len(masters.masters)


def test_lora_plus_changes_the_training_and_works_with_a_continued_adapter(tmp_path):
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 4})
    plain = tunesmith.train(made, out=tmp_path / "plain")
    made["adaptation"] = {"type": "lora", "r": 4, "loraplus_lr_ratio": 4.0}
    plus = tunesmith.train(made, out=tmp_path / "plus")
    assert apart(weights(plain["model_dir"]), weights(plus["model_dir"])) > 1e-3
    further = {
        **made,
        "model": plus["model_dir"],
        "adapter": "continue",
        "adaptation": {"type": "lora", "loraplus_lr_ratio": 4.0},
    }
    tunesmith.train(further, out=tmp_path / "further")
    (first, *_) = history(tmp_path / "further")
    assert first["learning_rate_x4"] == pytest.approx(4 * first["learning_rate"])
    with pytest.raises(RecipeError, match=r"names another r \(it has 4\)"):
        tunesmith.train({**further, "adaptation": {"type": "lora", "r": 3, "loraplus_lr_ratio": 4.0}}, out=tmp_path / "no")


def heads_of(model):
    model.requires_grad_(True)
    return sorted(lm_head.own_parameters(model))


def test_the_output_layer_is_found_whatever_it_is_called():
    from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoModelForTokenClassification

    llama = tiny_config("llama", tie_word_embeddings=False)
    assert heads_of(tiny_model("llama", tie_word_embeddings=False)) == ["lm_head.weight"]
    assert heads_of(tiny_model("llama")) == []
    assert heads_of(AutoModelForSequenceClassification.from_config(llama)) == ["score.weight"]
    assert heads_of(AutoModelForTokenClassification.from_config(llama)) == ["score.bias", "score.weight"]
    assert heads_of(AutoModelForQuestionAnswering.from_config(llama)) == ["qa_outputs.bias", "qa_outputs.weight"]


@pytest.mark.parametrize(
    "adaptation", ["full", {"type": "lora", "r": 4, "modules_to_save": ["lm_head"], "loraplus_lr_ratio": 2.0}]
)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_every_logged_rate_is_its_closed_form(adaptation, kind, tmp_path):
    model_folder(tmp_path, "llama", tie_word_embeddings=False)
    made = recipe(tmp_path, adaptation=adaptation, max_steps=8, warmup_steps=3, lr_scheduler_type=kind, head_learning_rate=5e-4)
    tunesmith.train(made, out=tmp_path / "run")
    records = [record for record in history(tmp_path / "run") if record["kind"] == "train"]
    for done, record in enumerate(records):
        left = (8 - done) / 5 if kind == "linear" else 0.5 * (1 + math.cos(math.pi * (done - 3) / 5))
        factor = done / 3 if done < 3 else left
        assert record["learning_rate"] == pytest.approx(1e-2 * factor)
        assert record["head_learning_rate"] == pytest.approx(5e-4 * factor)
        if adaptation != "full":
            assert record["learning_rate_x2"] == pytest.approx(2e-2 * factor)
    assert len(records) == 8


def test_the_output_layer_learns_at_its_own_rate(tmp_path):
    model_folder(tmp_path, "llama", tie_word_embeddings=False)
    made = recipe(tmp_path, max_steps=1, learning_rate=1e-2)
    before = weights(made["model"])
    made["train"]["head_learning_rate"] = 1e-4
    after = weights(tunesmith.train(made, out=tmp_path / "run")["model_dir"])
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert moved["lm_head.weight"] == pytest.approx(1e-4, rel=0.05)
    assert moved["model.layers.0.mlp.up_proj.weight"] == pytest.approx(1e-2, rel=0.05)


@pytest.mark.parametrize(
    ("adaptation", "tied"),
    [("full", True), ({"type": "lora"}, False), ({"type": "lora", "modules_to_save": ["lm_head"]}, True)],
)
def test_a_rate_for_an_output_layer_that_is_not_trained_on_its_own_is_refused(adaptation, tied, tmp_path):
    model_folder(tmp_path, "llama", tie_word_embeddings=tied)
    made = recipe(tmp_path, adaptation=adaptation, head_learning_rate=1e-3)
    with pytest.raises(RecipeError, match=r"train.head_learning_rate: this run trains no output layer of its own"):
        tunesmith.check(made)


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("adamw", {"beta": [0.9, 0.95]}, r"optim.beta: adamw has no such argument. Did you mean `betas`\?"),
        ("sgd", {"momentun": 0.9}, r"sgd has no such argument. Did you mean `momentum`\?"),
        ("sgd", {"betas": [0.9, 0.95]}, "sgd has no such argument. Valid: dampening, momentum, nesterov"),
        ("adafactor", {"clip_treshold": 1.0}, r"Did you mean `clip_threshold`\?"),
        ("lion", {"eps": 1e-8}, "lion has no such argument"),
        ("adamw_8bit", {"min_8bit_sise": 1}, r"Did you mean `min_8bit_size`\?"),
        ("adamw", {"lr": 1e-3}, "use train.learning_rate"),
        ("adamw_8bit", {"weight_decay": 0.1}, "use train.weight_decay"),
        ("adamw", {"fused": False}, "tunesmith chooses"),
        ("sgd", {"maximize": True}, "it would raise the loss"),
        ("adafactor", {"relative_step": True}, "tunesmith chooses"),
        ("lion", {"min_8bit_size": 5}, "its state has 32 bits"),
        ("adamw", {"eps": "1e-8"}, r"train\.optim\.eps: adamw does not take '1e-8': expected a value such as 1e-08"),
        ("adamw", {"betas": [0.9, 2.0]}, "Invalid beta parameter"),
        (
            "adamw",
            {"eps": 1e-6, "betas": [0.9]},
            r"train\.optim\.betas: adamw does not take \[0\.9\]: expected a value such as \[0\.9, 0\.999\], its default",
        ),
        ("adamw", {"eps": -1, "betas": [0.9]}, "train.optim={'type': 'adamw', 'eps': -1, 'betas': "),  # two are wrong
        ("adamw_8bit", {"betas": [0.9]}, r"train\.optim\.betas: adamw_8bit does not take"),
    ],
)
def test_arguments_that_an_optimiser_does_not_take_are_refused_before_anything_loads(name, arguments, said, tmp_path):
    needs(name)
    made = recipe(tmp_path, optim=name, optim_args=arguments)
    made["data"]["train"][0]["path"] = "nowhere.jsonl"  # never read
    with pytest.raises(RecipeError, match=said):
        tunesmith.check(made)


@pytest.mark.parametrize("name", BNB)
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=rf"train.optim={name} needs the package 'bitsandbytes'(.|\n)*tunesmith\[bnb\]"):
        tunesmith.check(recipe(tmp_path, optim=name, optim_args={}))


def test_8_bits_that_would_hold_nothing_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 4}, optim="adamw_8bit", optim_args={})
    with pytest.raises(RecipeError, match="has no effect: weights below 4096 elements keep their moments in 32 bits"):
        tunesmith.check(made)


@pytest.mark.parametrize("key", ["dampening", "nesterov"])
def test_keys_of_momentum_without_momentum_are_refused(key, tmp_path):
    made = recipe(tmp_path, optim="sgd", optim_args={key: 1})
    with pytest.raises(RecipeError, match=f"train.optim.{key} does nothing without"):
        tunesmith.check(made)


@pytest.mark.parametrize(("name", "instead"), [("paged_adamw", "adamw"), ("paged_adamw_8bit", "adamw_8bit")])
def test_pages_need_a_gpu(name, instead, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=rf"train\.optim={name}: only a CUDA device moves pages.*\n.*train\.optim={instead},"):
        optimizers.check(TrainConfig(optim=name))


@pytest.mark.parametrize(("metric", "lower"), [(None, False), ("calibration_error", True)])
def test_a_schedule_on_a_plateau_waits_for_the_better_direction_of_its_figure(metric, lower):
    """Accuracy that rises keeps the rate; the default mode of torch, min, would lower it."""
    train = TrainConfig(lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model=metric)
    traits = objectives.module("classify" if metric else "qa").Objective.traits
    _, best = evaluation.deciding_figure(train, traits)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = optimizers.schedule(optimizer, train, 4, best)
    assert (best == "min") is lower and schedule.mode == best
