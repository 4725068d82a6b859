"""Encoders besides the bert family: padded where they cannot be packed, run with their own heads, or refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, pipeline

import tunesmith
from tests.runs import recipe
from tests.tiny import ENCODER, encoder_tokenizer
from tunesmith.cli.main import main
from tunesmith.data.batch import pack
from tunesmith.data.batch.pack import PADDED
from tunesmith.errors import ModelError
from tunesmith.models import network
from tunesmith.models.heads import head_types, noise, task_heads
from tunesmith.models.network import pooling

SIZES = {name: ENCODER[name] for name in ENCODER if not name.endswith("prob")}  # with dropout, as published
CONFIGS = {
    "deberta-v2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "deberta": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "mpnet": {**SIZES, "pad_token_id": 1, "max_position_embeddings": 130, "bos_token_id": 0, "eos_token_id": 2},
    "albert": {**SIZES, "embedding_size": 16, "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1},
    "modernbert": {**SIZES, "attention_dropout": 0.1, "mlp_dropout": 0.1, "classifier_dropout": 0.1, "classifier_pooling": "mean",
                   "bos_token_id": 3, "eos_token_id": 4, "cls_token_id": 3, "sep_token_id": 4},
}  # fmt: skip
REFUSED = {
    "convbert": {**SIZES, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3},
    "deberta-v2": {**CONFIGS["deberta-v2"], "conv_kernel_size": 3},
    "bart": {"vocab_size": 512, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    "xlnet": {"vocab_size": 512, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32},
}  # fmt: skip


def run(tmp_path, name, objective, values, kind=AutoModelForMaskedLM):
    """Return a recipe on a published model with its masked language modelling head."""
    torch.manual_seed(0)
    folder = tmp_path / f"model-{name}"
    kind.from_config(AutoConfig.for_model(name, **values)).save_pretrained(folder)
    encoder_tokenizer("roberta").save_pretrained(folder)
    return recipe(tmp_path, name, objective, "full", count=6, max_steps=1)


@pytest.mark.parametrize(
    ("name", "objective"), [*((name, "classify") for name in CONFIGS), ("deberta-v2", "tag"), ("modernbert", "qa")]
)
def test_they_are_trained(name, objective, tmp_path):
    """Every encoder with the head whose layers differ most (a pooler, a head of its own); the other heads once each."""
    made = run(tmp_path, name, objective, CONFIGS[name])
    whole = tunesmith.train(made, out=tmp_path / "whole")
    predicted = list(tunesmith.predict(whole["model_dir"], tmp_path / "rows.jsonl", precision="fp32"))
    assert len(predicted) == 6 and not any("error" in row for row in predicted)
    if objective == "classify":
        stock = pipeline("text-classification", model=whole["model_dir"], batch_size=2)
        texts = [json.loads(line)["text"] for line in Path(tmp_path / "rows.jsonl").read_text().splitlines()]
        assert [row["score"] for row in stock(texts)] == pytest.approx([row["score"] for row in predicted], abs=1e-5)


def test_virtual_tokens_are_as_wide_as_words(tmp_path):
    """albert's words are narrower than its layers."""
    made = {**run(tmp_path, "albert", "tag", CONFIGS["albert"]), "adaptation": {"type": "prompt", "num_virtual_tokens": 2}}
    found = tunesmith.train(made, out=tmp_path / "run")
    assert not any("error" in one for one in tunesmith.predict(found["model_dir"], tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("kind", ["score", "token", "span"])
@pytest.mark.parametrize("name", CONFIGS)
def test_their_heads_have_the_logits_of_transformers(name, kind):
    torch.manual_seed(0)
    network = head_types.auto_class(kind).from_config(AutoConfig.for_model(name, **CONFIGS[name])).eval()
    rows = [{"input_ids": np.arange(5, 5 + length).astype(np.int32)} for length in (7, 3)]
    one = kind == "score" and pooling(network.config) is None
    batch = pack.with_positions(rows, PADDED, [np.array([0]) if one else np.arange(len(row["input_ids"])) for row in rows])
    with torch.no_grad():
        expected = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        if kind == "score":
            pairs = [(task_heads.score_logits(network, batch), expected.logits)]
        elif kind == "token":
            pairs = [(task_heads.token_logits(network, batch), expected.logits.flatten(0, 1)[batch["positions"]])]
        else:
            both = (expected.start_logits, expected.end_logits)
            pairs = list(
                zip(task_heads.span_logits(network, batch), [one.flatten()[batch["positions"]] for one in both], strict=True)
            )
    assert all(float((ours - theirs).abs().max()) <= 1e-5 for ours, theirs in pairs)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_attention_drops_is_off_and_the_rest_is_drawn_by_row(name):
    network = head_types.auto_class("token").from_config(AutoConfig.for_model(name, **CONFIGS[name]))
    drawn, said = noise.install(network, 0)
    assert drawn.layers and any("attention probabilities (0.1) is off" in line for line in said)
    drawn.rows, drawn.lengths, drawn.packed = [0, 1], [6, 4], False
    ids, mask = torch.arange(5, 17).view(2, 6), torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    network.train()
    once, again = (network(input_ids=ids, attention_mask=mask).logits for _ in range(2))
    assert once.equal(again) and not once.equal(network.eval()(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("kind", ["lm", "score"])
@pytest.mark.parametrize("name", ["bart", "t5", "marian", "pegasus"])
def test_an_encoder_decoder_is_called_one(name, kind):
    with pytest.raises(ModelError, match=rf"{name} is an encoder-decoder: (?s:.*)Take a decoder .*, or an encoder"):
        head_types.require_class(AutoConfig.for_model(name), kind)


@pytest.mark.parametrize("name", ["canine", "lilt", "markuplm"])
def test_an_encoder_without_a_masked_language_model_is_no_decoder(name):
    assert not network.is_causal(AutoConfig.for_model(name))


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name, tmp_path, capsys):
    made = run(tmp_path, name, "classify", REFUSED[name], AutoModel)
    (tmp_path / "r.json").write_text(json.dumps(made))
    assert main(["train", str(tmp_path / "r.json"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "cannot run such a head" in said or "mixes padding" in said or "is an encoder-decoder" in said
    assert "XLNetForSequenceClassification" in said or f"{name} " in said
