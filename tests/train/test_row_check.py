"""Before training, a row's hidden states are compared with those of transformers' own forward of its tokens alone."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.numeric.test_parity import examples
from tests.runs import labelled
from tests.tiny import ENCODER, SMALL, encoder_tokenizer, tiny_model, tiny_tokenizer
from tunesmith.data.rows import Labelled
from tunesmith.errors import ModelError
from tunesmith.models.heads import lm_head, noise, task_heads
from tunesmith.objectives import classify, sft
from tunesmith.train import fast_path, row_check

CPU = torch.device("cpu")
IDS = list(range(5, 29))
SFT = sft.Objective(sft.Config())


def encoder(name, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**ENCODER, "num_labels": 3, **changes})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    return model


def classified(model, packing="auto"):
    """The objective, its examples and the fast path that a run would choose."""
    objective = classify.Objective(classify.Config())
    rows = [Labelled(**row) for row in labelled(4)]
    objective.bind(model.config, encoder_tokenizer("bert"), None)
    objective.scan(rows)
    examples = [one for row in objective.encode(rows, encoder_tokenizer("bert")) for one in row]
    return objective, examples, fast_path.choose(model, objective, examples[:2], 64, packing, CPU)


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize(("name", "pad"), [("mpnet", 0), ("roberta", 0), ("roberta", 1), ("esm", 1), ("bert", 0)])
def test_a_batch_gives_every_row_the_logits_of_the_stock_forward(name, pad, packing):
    """mpnet counts positions from 2 whatever the padding token is, roberta from the one after it, esm like roberta."""
    model = encoder(name, pad_token_id=pad, mask_token_id=4)
    objective, examples, chosen = classified(model, packing)
    with torch.no_grad():
        ours = task_heads.score_logits(model, objective.collate(examples, chosen.layout))
        chosen.disable()
        theirs = [model(input_ids=torch.from_numpy(one["input_ids"].astype(np.int64))[None]).logits[0] for one in examples]
    assert torch.allclose(ours, torch.stack(theirs), atol=1e-5)


def test_positions_that_no_numbering_explains_are_left_to_the_model():
    model = tiny_model("gpt2")
    assert row_check.RowCheck(model, IDS, CPU).number_tokens() is None
    own = model.transformer.forward
    model.transformer.forward = lambda *given, position_ids=None, **named: own(
        *given, position_ids=None if position_ids is None else position_ids.flip(-1), **named
    )
    assert "of their norm" in row_check.RowCheck(model, IDS, CPU).number_tokens()
    assert "position_ids" not in lm_head.inputs(model, {"input_ids": torch.tensor([IDS]), "position_ids": torch.tensor([IDS])})


def test_a_model_that_sees_later_tokens_is_no_language_model():
    config = AutoConfig.for_model("bert-generation", **SMALL)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match="bert-generation: a token sees the tokens after it"):
        row_check.RowCheck(model, IDS, CPU).require_causal()
    config.is_decoder = True
    row_check.RowCheck(AutoModelForCausalLM.from_config(config).eval(), IDS, CPU).require_causal()


def test_a_model_that_mixes_padding_in_is_refused():
    model = encoder("bert")
    row_check.RowCheck(model, IDS, CPU).require_padding_ignored()
    model.bert.encoder.register_forward_hook(
        lambda module, given, out: out.__setitem__("last_hidden_state", out[0] - out[0].mean(1, True))
    )
    with pytest.raises(ModelError, match="bert gives a row other hidden states next to padding than alone"):
        row_check.RowCheck(model, IDS, CPU).require_padding_ignored()


def test_a_forward_that_fails_is_a_named_error():
    model = tiny_model("llama")
    model.model.forward = lambda **named: named["nothing"]
    with pytest.raises(ModelError, match=r"llama: transformers' own forward fails on the first row \(KeyError: 'nothing'\)"):
        row_check.RowCheck(model, IDS, CPU)


@pytest.mark.parametrize("name", ["distilbert", "modernbert"])
def test_keywords_that_attention_ignores_do_not_prevent_packing(name):
    special = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "local_attention": 256}
    model = encoder(name, **(special if name == "modernbert" else {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}))
    assert classified(model)[2].packed


@pytest.mark.parametrize(("name", "where"), [("gpt_neox_japanese", "attention_dropout"), ("biogpt", None)])
def test_training_mode_is_tried_before_the_first_step(name, where):
    """Dropout of attention probabilities once ended the first step of these two."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SMALL, "attention_dropout": 0.1, "attention_probs_dropout_prob": 0.1})
    model = AutoModelForCausalLM.from_config(config).eval()
    objective, rows = SFT, examples(SFT, tiny_tokenizer())
    noise.install(model, 0)
    chosen = fast_path.choose(model, objective, rows, 64, "auto", CPU)
    fast_path.check_training_mode(chosen)
    assert [f" in {where} is off: " in note for note in chosen.notes if note.startswith("dropout")] == [True] * (
        where is not None
    )
    model.train()
    lengths = [len(row["input_ids"]) for row in rows[:2]]
    with noise.override(model, rows=[0, 1], lengths=lengths, packed=chosen.packed):
        objective.loss(model, objective.collate(rows[:2], chosen.layout))


def test_a_network_that_fails_in_training_mode_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda module, given, out: out if not module.training else out.nothing)
    rows = examples(SFT, tiny_tokenizer())
    chosen = fast_path.choose(model, SFT, rows, 64, "auto", CPU)
    with pytest.raises(ModelError, match="llama: the model's own forward fails in training mode"):
        fast_path.check_training_mode(chosen)
