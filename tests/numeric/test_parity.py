"""Loss and gradients are those of transformers' own forward; a whole run is that of TRL's trainer on the same rows."""

import json

import pytest
import torch

import tunesmith
from tests.runs import documents, recipe, rows
from tests.tiny import TINY, tiny_model, tiny_tokenizer
from tunesmith.adaptations import full, lora
from tunesmith.data.rows import PromptCompletion, Text
from tunesmith.models.heads import noise
from tunesmith.objectives import cpt, sft
from tunesmith.runs import metrics_file
from tunesmith.train import fast_path

PACKS = {"llama": True, "qwen3": True, "gemma": True, "gpt2": True, "mistral": False, "gemma3": False}
CPU = torch.device("cpu")
LORA = lora.Config(r=4, target_modules="all-linear")


def examples(objective, tokenizer):
    made = (
        [PromptCompletion(**row) for row in rows(5)]
        if isinstance(objective, sft.Objective)
        else [Text(row["text"]) for row in documents(3)]
    )
    return [example for group in objective.encode(made, tokenizer) for example in group]


def plain_loss_and_gradients(model, batch_rows):
    """transformers' own forward, row by row, and cross-entropy at the learnt tokens (its own loss would round fp64 to fp32)."""
    total = sum(int(row["supervised"][1:].sum()) for row in batch_rows)
    value = 0.0
    for row in batch_rows:
        ids = torch.from_numpy(row["input_ids"]).long()[None]
        labels = ids.masked_fill(~torch.from_numpy(row["supervised"])[None], -100)
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum") / total
        loss.backward()
        value += loss.item()
    return value, take_gradients(model)


def take_gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def with_gradients_everywhere(model):
    """A fresh LoRA's B is zero, and then no gradient reaches A: give both values. So too a bottleneck's way up and down."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "bottleneck_up" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


CASES = [
    pytest.mark.parametrize("adaptation", [full.Adaptation(full.Config()), lora.Adaptation(LORA)], ids=["full", "lora"]),
    pytest.mark.parametrize("objective", [sft.Objective(sft.Config()), cpt.Objective(cpt.Config())], ids=["sft", "cpt"]),
    pytest.mark.parametrize("name", TINY),
]


def every_case(test):
    for case in CASES:
        test = case(test)
    return test


def ours_and_theirs(name, objective, adaptation, dtype):
    """(loss, gradients) of the routed batch and of transformers' own forward, for the same rows and weights in ``dtype``."""
    model = with_gradients_everywhere(adaptation.apply(tiny_model(name), "lm")).to(dtype)
    noise.install(model, 0)
    rows_ = examples(objective, tiny_tokenizer())
    theirs = plain_loss_and_gradients(model, rows_)
    chosen = fast_path.choose(model, objective, rows_, max(len(row["input_ids"]) for row in rows_), "auto", CPU)
    assert chosen.packed is PACKS[name]
    batch = objective.collate(rows_, chosen.layout)
    loss, _ = objective.loss(model, batch)
    (loss / objective.count(batch)).backward()
    return (loss.item() / int(objective.count(batch)), take_gradients(model)), theirs


def error(gradient, truth):
    """Largest difference, as a share of the tensor's largest gradient."""
    return float((gradient.double() - truth).abs().max() / truth.abs().max())


@every_case
def test_loss_and_gradients_are_those_of_transformers(name, objective, adaptation):
    """In exact enough arithmetic (fp64) nothing is left between the two."""
    (loss, gradients), (expected, truth) = ours_and_theirs(name, objective, adaptation, torch.float64)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert gradients.keys() == truth.keys()
    for key, gradient in gradients.items():
        assert error(gradient, truth[key]) <= (1e-6 if "gemma" in name else 1e-11), key  # gemma's norm rounds to fp32 inside


@every_case
def test_in_fp32_the_fast_path_is_as_exact_as_transformers(name, objective, adaptation):
    """Against the fp64 gradients: within 3e-6 of each tensor's largest, or at most twice as far off as transformers' own fp32.

    3e-6 is 25 units of fp32 rounding: sums in another order reach half of that, and how they are ordered is the machine's affair.
    """
    _, (expected, truth) = ours_and_theirs(name, objective, adaptation, torch.float64)
    (loss, gradients), (_, theirs) = ours_and_theirs(name, objective, adaptation, torch.float32)
    assert loss == pytest.approx(expected, rel=1e-6)
    worst = max(error(gradient, truth[key]) for key, gradient in theirs.items())
    for key, gradient in gradients.items():
        assert error(gradient, truth[key]) <= max(3e-6, 2 * worst), key


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_twenty_losses_are_those_of_trl(tmp_path, adapted):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = recipe(tmp_path, count=40, batch_size=8, max_steps=20, shuffle=False, learning_rate=1e-3, optim_args={"eps": 1e-8})
    base = ours["model"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapted:
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter", is_trainable=True
        )
        ours |= {"model": str(tmp_path / "adapter"), "adapter": "continue", "adaptation": "lora"}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, num_train_epochs=4, max_steps=20, learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to="none", max_length=None,
        train_sampling_strategy="sequential", disable_tqdm=True, seed=0,
    )  # fmt: skip
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    data = datasets.Dataset.from_list([json.loads(line) for line in lines])
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(base)
    )
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    outcome = tunesmith.train(ours, out=tmp_path / "run")
    found = [record for record in metrics_file.read(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"]
    assert len(found) == len(theirs) == outcome["steps"] == 20
    for our, their in zip(found, theirs):
        assert our["loss"] == pytest.approx(their["loss"], abs=1e-5), our["step"]
        assert our["learning_rate"] == pytest.approx(their["learning_rate"], abs=1e-12)
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-3)
