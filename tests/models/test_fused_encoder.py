"""Packed and fused encoders equal transformers' own, row by row: outputs and gradients, in fp32 and bf16."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.tiny import ENCODER, ENCODERS
from tunesmith.adaptations import lora
from tunesmith.data.batch import pack
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.models.fast import attention, bidirectional_attention, fused_encoder, fused_layers, kernels, last_layer
from tunesmith.models.heads import lm_head, noise
from tunesmith.models.heads import task_heads as heads
from tunesmith.models.network import base

LENGTHS = (1, 5, 31, 16, 100, 2)
NEEDS_C = pytest.mark.skipif(kernels.library() is None, reason="no C compiler on this machine, or the self-test failed")
CONFIGS = {
    **{name: (name, values) for name, values in ENCODERS.items()},
    "electra": ("electra", {**ENCODER, "embedding_size": 32, "type_vocab_size": 2}),
    "distilbert": ("distilbert", dict(vocab_size=512, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=128,
                                      dropout=0.0, attention_dropout=0.0)),
}  # fmt: skip
KINDS = {"bert": 10, "roberta": 10, "electra": 10, "distilbert": 2}
"""How many modules of two layers, and the embeddings, get another forward."""


def network(name, dtype=torch.float32, kind=AutoModelForTokenClassification, **changes):
    torch.manual_seed(0)
    model_type, values = CONFIGS[name]
    model = kind.from_config(AutoConfig.for_model(model_type, **{**values, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.to(dtype)


def some_rows(name, lengths=LENGTHS):
    draw = np.random.default_rng(0)
    rows = [{"input_ids": draw.integers(5, 500, length).astype(np.int32)} for length in lengths]
    if CONFIGS[name][1].get("type_vocab_size") == 2:
        rows = [{**row, "token_type_ids": draw.integers(0, 2, len(row["input_ids"])).astype(np.uint8)} for row in rows]
    return rows


def packed(rows, read=None):
    return pack.with_positions(rows, PACKED, [np.arange(len(row["input_ids"])) if read is None else read for row in rows])


def results(model, outputs):
    """The outputs and the gradients of a fixed sum of them."""
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).to(outputs.dtype)
    (outputs * weights).sum().backward()
    found = {name: one.grad.double() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return {"outputs": outputs.detach().double(), **found}


def row_by_row(model, rows):
    """transformers' own forward of each row alone, positions and all (roberta's from the tokens)."""
    parts = []
    for row in rows:
        keywords = {key: torch.from_numpy(value.astype(np.int64))[None] for key, value in row.items()}
        parts.append(base(model).base_model(**keywords).last_hidden_state[0])
    return results(model, torch.cat(parts))


def assert_near(ours, theirs, limit):
    """A gradient that is zero but for rounding (that of a key's bias) is held against the largest one."""
    assert ours.keys() == theirs.keys()
    scale = max(float(one.norm()) for name, one in theirs.items() if name != "outputs")
    for name, expected in theirs.items():
        apart = float((ours[name] - expected).norm())
        assert apart <= limit * max(float(expected.norm()), 1e-2 * scale), (name, apart, float(expected.norm()))


def install_fast(model):
    attention.register()
    base(model).set_attn_implementation(attention.NAME)
    return fused_layers.install(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_are_rows_alone(name, monkeypatch):
    """Without C: short rows go together, padded."""
    monkeypatch.setattr(kernels, "available", lambda tensor: False)
    model, rows = network(name), some_rows(name)
    expected = row_by_row(model, rows)
    assert not install_fast(model).kinds
    assert_near(results(model, lm_head.outputs_at(model, packed(rows))), expected, 3e-6)


@NEEDS_C
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_layers_are_the_models_own(name, dtype, limit):
    model, rows = network(name, dtype), some_rows(name)
    expected = row_by_row(network(name, dtype).float(), rows)
    record = install_fast(model)
    assert sum(record.kinds.values()) - record.kinds.get("embedding", 0) == KINDS[name]
    assert_near(results(model, lm_head.outputs_at(model, packed(rows))), expected, limit)
    with record.disabled():
        assert_near(results(model, lm_head.outputs_at(model, packed(rows))), expected, limit)


@NEEDS_C
def test_rows_up_to_the_window():
    model = network("bert", max_position_embeddings=512)
    rows = some_rows("bert", (512, 1, 300, 129, 64, 65))
    expected = row_by_row(model, rows)
    install_fast(model)
    assert_near(results(model, lm_head.outputs_at(model, packed(rows))), expected, 5e-6)


@NEEDS_C
@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_the_last_layer_computes_only_what_is_read(name):
    model, rows = network(name), some_rows(name)
    batch = packed(rows, np.zeros(1, np.int64))
    hidden = lm_head.hidden_states(model, {**pack.arrange(rows, False)[0]})
    expected = results(model, hidden[:, 0])
    install_fast(model)
    seen = []
    body = base(model).base_model
    handle = body.encoder.layer[-1].intermediate.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    assert_near(results(model, lm_head.outputs_at(model, batch)), expected, 3e-6)
    lm_head.outputs_at(model, packed(rows))
    handle.remove()
    assert seen == [len(rows), sum(LENGTHS)]


@NEEDS_C
@pytest.mark.parametrize("read", [None, np.zeros(1, np.int64)], ids=["all", "first"])
def test_layers_computed_again_have_the_same_gradients(read):
    model, batch = network("bert").train(), packed(some_rows("bert"), read)
    install_fast(model)
    expected = results(model, lm_head.outputs_at(model, batch))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_near(results(model, lm_head.outputs_at(model, batch)), expected, 1e-6)


@NEEDS_C
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_on_the_layers_inside(dropout):
    config = lora.Config(r=4, target_modules=["query", "value", "dense"], lora_dropout=dropout)
    model = lora.Adaptation(config).apply(network("bert"), "token").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    rows = some_rows("bert")
    expected = row_by_row(model, rows)
    kinds = install_fast(model).kinds
    assert ("encoder attention" in kinds) is (dropout == 0)
    assert_near(results(model, lm_head.outputs_at(model, packed(rows))), expected, 1e-5)


def with_dropout(model, batch, rows, read=None):
    drawn = noise.of(model)
    drawn.rows, drawn.packed = list(range(len(rows))), "segments" in batch
    drawn.lengths = [len(row["input_ids"]) for row in rows]
    return results(model, heads.score_logits(model, batch))


@NEEDS_C
def test_dropout_is_the_same_packed_padded_fused_and_for_what_is_read_alone(monkeypatch):
    changes = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}
    model = network("bert", kind=AutoModelForSequenceClassification, **changes).train()
    _, said = noise.install(model, 3)
    assert said == ["the model's dropout of attention probabilities (0.1) is off"]
    rows = some_rows("bert")
    first = [np.zeros(1, np.int64)] * len(rows)
    padded = pack.with_positions(rows, PADDED, first)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "available", lambda tensor: False)
        expected = with_dropout(model, padded, rows)
    assert float((with_dropout(model.eval(), padded, rows)["outputs"] - expected["outputs"]).norm()) > 0.1
    install_fast(model.eval())
    model.train()
    assert_near(with_dropout(model, pack.with_positions(rows, PACKED, first), rows), expected, 5e-6)
    monkeypatch.setattr(last_layer, "most_read", lambda body: 0.0)
    assert_near(with_dropout(model, pack.with_positions(rows, PACKED, first), rows), expected, 5e-6)


@NEEDS_C
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_is_the_same_in_c_and_torch(dtype, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(1, 40, 33).to(dtype).requires_grad_()
    drawn = noise.RowNoise(1, 2, [4, 9], [30, 10])
    ours = drawn.drop(x, 0.3, 5)
    (grad,) = torch.autograd.grad(ours.sum(), x)
    monkeypatch.setattr(kernels, "available", lambda tensor: False)
    assert torch.equal(ours, drawn.drop(x, 0.3, 5))
    kept = ours != 0
    assert torch.equal(grad, kept * torch.tensor(1 / 0.7).to(dtype)) and 0.67 < kept.float().mean() < 0.73


@NEEDS_C
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("segments", [(1,), (3, 1, 17), (64, 65, 300)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 8), (4, 2, 20), (2, 1, 64)])
def test_bidirectional_attention(dtype, limit, segments, heads, kv_heads, dim):
    torch.manual_seed(0)
    qkv = torch.randn(sum(segments), (heads + 2 * kv_heads) * dim).to(dtype).requires_grad_()
    grad = torch.randn(sum(segments), heads * dim).to(dtype)
    exact = qkv.detach().double().requires_grad_()
    q, k, v = (x.view(len(x), -1, dim) for x in exact.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1))
    parts = []
    for one in zip(*(x.split(segments) for x in (q, k, v)), strict=True):
        a, b, c = (x.transpose(0, 1).repeat_interleave(heads // x.shape[1], 0) for x in one)
        parts.append(((a @ b.transpose(1, 2) * 0.3).softmax(-1) @ c).transpose(0, 1).flatten(1))
    theirs = torch.cat(parts)
    ours = bidirectional_attention.BidirectionalAttention.apply(qkv, (heads, kv_heads, segments, 0.3))
    pairs = [(ours.detach(), theirs.detach())]
    pairs += [(*torch.autograd.grad(ours, qkv, grad), *torch.autograd.grad(theirs, exact, grad.double()))]
    for got, expected in pairs:
        assert float((got.double() - expected).norm()) <= limit * float(expected.norm().clamp_min(1e-6))


@NEEDS_C
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("shape", [(1, 9), (7, 100), (64, 384)])
def test_norm_of_a_sum(dtype, limit, shape):
    torch.manual_seed(0)
    given = [torch.randn(size).to(dtype).requires_grad_() for size in (shape, shape, shape[1:], shape[1:])]
    exact = [one.detach().double().requires_grad_() for one in given]
    grad = torch.randn(shape).to(dtype)
    ours = fused_encoder.AddNorm.apply(*given, 1e-5)
    theirs = torch.nn.functional.layer_norm(exact[0] + exact[1], shape[1:], *exact[2:], 1e-5)
    pairs = [(ours, theirs)]
    pairs += zip(torch.autograd.grad(ours, given, grad), torch.autograd.grad(theirs, exact, grad.double()), strict=True)
    for got, expected in pairs:
        assert float((got.double() - expected).norm()) <= limit * float(expected.norm())


@NEEDS_C
def test_the_number_of_threads_changes_nothing():
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        qkv = torch.randn(sum(LENGTHS), 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = bidirectional_attention.BidirectionalAttention.apply(qkv, (4, 4, LENGTHS, 0.3))
        found.append((out, *torch.autograd.grad(out.sum(), qkv)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
