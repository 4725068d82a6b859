"""The copy for plain transformers of an adapter that the stock class cannot open: it is written and reported, and cannot fail the run."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import tunesmith
from tests.runs import labelled, questions, recipe
from tunesmith.errors import ModelError
from tunesmith.merge import merge_adapter as merging
from tunesmith.train import plain_copy


def trained(tmp_path, name, objective, adaptation, **more):
    return tunesmith.train(recipe(tmp_path, name, objective, adaptation, max_steps=2, **more), out=tmp_path / "run")


def notes(tmp_path):
    return [
        note for note in json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"] if "plain transformers" in note
    ]


def test_an_adapter_on_a_renamed_body_has_a_copy_that_answers_the_same(tmp_path):
    found = trained(tmp_path, "llama", "qa", "lora")
    assert found["merged_dir"] == str(tmp_path / "run" / "merged")
    model, tokenizer = tunesmith.load(found["model_dir"])
    stock = AutoModelForQuestionAnswering.from_pretrained(found["merged_dir"], dtype=torch.float32).eval()
    ids = tokenizer(questions(1)[0]["context"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = model.float()(input_ids=ids), stock(input_ids=ids)
    assert torch.allclose(ours.start_logits, theirs.start_logits, atol=1e-4)
    assert torch.allclose(ours.end_logits, theirs.end_logits, atol=1e-4)
    assert len(notes(tmp_path)) == 1 and "initialises it randomly" in notes(tmp_path)[0] and "merged/" in notes(tmp_path)[0]


def test_the_copy_on_a_bf16_base_is_written_in_fp32_and_keeps_the_answers(tmp_path):
    made = recipe(tmp_path, "llama", "qa", "lora", max_steps=2)
    AutoModelForCausalLM.from_pretrained(made["model"], dtype=torch.bfloat16).save_pretrained(made["model"])
    found = tunesmith.train(made, out=tmp_path / "run")
    model, tokenizer = tunesmith.load(found["model_dir"], dtype=torch.float32)
    stock = AutoModelForQuestionAnswering.from_pretrained(found["merged_dir"]).eval()
    assert stock.dtype == torch.float32
    ids = tokenizer(questions(1)[0]["context"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = model(input_ids=ids), stock(input_ids=ids)
    assert torch.allclose(ours.start_logits, theirs.start_logits, atol=1e-4)


@pytest.mark.parametrize("adaptation", ["lora", "ia3"])
def test_three_labels_are_named_by_a_plain_pipeline(tmp_path, adaptation):
    found = trained(tmp_path, "bert", "classify", adaptation)
    texts = [row["text"] for row in labelled(6)]
    AutoModelForSequenceClassification.from_pretrained(found["merged_dir"])
    stock = pipeline("text-classification", found["merged_dir"], dtype=torch.float32)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ours = [one["label"] for one in tunesmith.predict(found["model_dir"], tmp_path / "texts.jsonl")]
    assert [one["label"] for one in stock(texts)] == ours
    assert AutoTokenizer.from_pretrained(found["merged_dir"]).pad_token is not None


@pytest.mark.parametrize(
    ("name", "objective", "adaptation"),
    [
        ("bert", "qa", "lora"),
        ("llama", "qa", "full"),
        ("llama", "sft", "lora"),
        ("bert", {"type": "classify", "pooling": "mean"}, "lora"),
    ],
)
def test_no_copy_where_the_stock_class_opens_it_or_where_none_would(tmp_path, name, objective, adaptation):
    found = trained(tmp_path, name, objective, adaptation)
    assert "merged_dir" not in found and not (tmp_path / "run" / "merged").exists() and not notes(tmp_path)


def test_an_adapter_that_no_weight_can_replace_is_reported(tmp_path):
    found = trained(tmp_path, "llama", "qa", "prefix")
    assert "merged_dir" not in found and "nothing to merge" in notes(tmp_path)[0]


def test_too_little_memory_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_copy, "BYTES_PER_PARAMETER", 10**9)
    found = trained(tmp_path, "llama", "qa", "lora")
    assert "merged_dir" not in found and f"tunesmith merge {found['model_dir']}" in notes(tmp_path)[0]


def test_a_copy_that_fails_costs_no_run(tmp_path, monkeypatch):
    def fails(*given):
        raise ModelError("the two differ.\nmore")

    monkeypatch.setattr(merging, "fold", fails)
    found = trained(tmp_path, "llama", "qa", "lora")
    assert "merged_dir" not in found and "the two differ." in notes(tmp_path)[0] and found["model_dir"]
