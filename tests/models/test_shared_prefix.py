"""Answers that share a prefix equal answers in rows of their own: outputs, gradients, and no influence on each other."""

import numpy as np
import pytest
import torch

from tests.models import standin, virtual_tokens
from tests.tiny import TINY, save_tiny_encoder, tiny_model
from tunesmith.data.batch import shared_prompts
from tunesmith.data.batch.pack import PACKED, Layout
from tunesmith.models.fast import attention, fused_layers, kernels, segments, torch_compile, varlen
from tunesmith.models.fast.attention import CannotPack
from tunesmith.models.heads import lm_head
from tunesmith.models.heads.log_probs import log_probs
from tunesmith.models.network import base

NAMES = ("llama", "gpt2", "qwen3", "gemma")
CPU = torch.device("cpu")
LONG = {name: {"n_positions": 1024} if name == "gpt2" else {"max_position_embeddings": 1024} for name in TINY}


def example(prefix, *answers, seed=0):
    ids = np.random.default_rng((seed, prefix, *answers)).integers(5, 500, prefix + sum(answers))
    return {"input_ids": ids.astype(np.int32), "answers": np.array([prefix, *answers], np.int32)}


# K of 1, 2, 4; prefixes of 0 to 500; answers beyond a block of 256 queries, and of one token
ROWS = [example(7, 3), example(500, 20, 31), example(1, 2, 3, 4, 270), example(0, 5, 6), example(64, 1, 290), example(257, 1)]
FEW = [example(9, 3, 5), example(0, 4, 2), example(1, 6), example(12, 2, 7, 1, 3)]


def packed_model(name, dtype=torch.float32, attend=attention.NAME, **changes):
    attention.register()
    varlen.register(varlen.with_gqa(standin.varlen_attn), (9, 0))
    model = tiny_model(name, **{**LONG[name], **changes}).to(dtype)
    model.set_attn_implementation(attend)
    return model


def outputs_and_gradients(model, rows, shared):
    """Return the outputs at the tokens of each answer and at the last token of its prefix, then all gradients of a weighted sum of them."""
    batch, places = shared_prompts.arrange(rows, Layout(packed=True, shared=shared))
    hidden = lm_head.hidden_states(model, batch)[0]
    counts = [int(count) for row in rows for count in row["answers"][1:]]
    own = [hidden[torch.from_numpy(place[-count - 1 :])] for place, count in zip(places, counts, strict=True)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(one.shape, generator=generator).to(one.dtype) for one in own]
    sum((one * weight).float().sum() for one, weight in zip(own, weights, strict=True)).backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return torch.cat(own).detach(), gradients


def relative_error(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def check_shared_equals_separate(model, rows, limit):
    """Compare each gradient; in bf16 all of them together, because a gradient whose parts cancel is half noise on any path."""
    (out, gradients), (expected, truth) = (outputs_and_gradients(model, rows, shared) for shared in (True, False))
    assert relative_error(out, expected) <= limit
    assert gradients.keys() == truth.keys() and len(truth) > 10
    if model.dtype is torch.bfloat16:
        gradients, truth = ({"all": torch.cat([one.flatten() for one in some.values()])} for some in (gradients, truth))
    for name, gradient in gradients.items():
        assert relative_error(gradient, truth[name]) <= limit, name


@pytest.mark.parametrize("way", ["plain", "fused", "torch alone", "recomputed"])
@pytest.mark.parametrize("name", NAMES)
def test_shared_rows_equal_separate_rows(name, way, monkeypatch):
    if way == "torch alone":
        monkeypatch.setattr(kernels, "available", lambda tensor: False)
    model = packed_model(name)
    if way in ("fused", "recomputed"):
        fused_layers.install(model)
    if way == "recomputed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    check_shared_equals_separate(model, ROWS, 1e-5)


@pytest.mark.parametrize("way", ["plain", "fused", "torch alone"])
@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_too(name, way, monkeypatch):
    if way == "torch alone":
        monkeypatch.setattr(kernels, "available", lambda tensor: False)
    model = packed_model(name, torch.bfloat16)
    if way == "fused":
        fused_layers.install(model)
    check_shared_equals_separate(model, ROWS[1:4], 2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_in_fp64_nothing_is_left(name):
    check_shared_equals_separate(
        packed_model(name, torch.float64), FEW, 1e-12 if name == "gpt2" else 1e-6
    )  # the norm of the others rounds to fp32 inside


@pytest.mark.parametrize("prefix", [1, 2, 255, 256, 257, 500])
@pytest.mark.parametrize("answers", [(1,), (3, 8), (260, 1, 5, 40)])
def test_every_length_of_a_prefix(prefix, answers):
    model = packed_model("llama")
    fused_layers.install(model)
    check_shared_equals_separate(model, [example(prefix, *answers), example(4, 3)], 1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3"])
def test_one_kernel_call_gives_the_same(name):
    """The sliding window of the last two is 16 tokens: shorter than a prefix and its answer. It stays exact there."""
    check_shared_equals_separate(
        packed_model(name, attend=varlen.NAME), ROWS[2:5] if name in NAMES else [example(30, 9, 20), example(2, 5, 1, 40)], 1e-5
    )


def test_a_window_as_long_as_the_row_is_accepted():
    model = packed_model("mistral", sliding_window=25)
    fused_layers.install(model)
    check_shared_equals_separate(model, [example(10, 15, 3)], 1e-5)


@pytest.mark.parametrize("fast", [False, True])
def test_a_window_shorter_than_the_row_is_refused(fast):
    model = packed_model("mistral", sliding_window=24)
    if fast:
        fused_layers.install(model)
    batch, _ = shared_prompts.arrange([example(10, 15, 3)], PACKED)
    with pytest.raises(CannotPack, match="slides over 24 tokens and a row has 25"):
        lm_head.hidden_states(model, batch)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("attend", [attention.NAME, varlen.NAME])
def test_an_answer_knows_nothing_of_the_others(fast, attend):
    model = packed_model("llama", attend=attend)
    if fast and attend == attention.NAME:
        fused_layers.install(model)
    row = example(30, 12, 9, 7)
    other = {**row, "input_ids": row["input_ids"].copy()}
    other["input_ids"][42:51] += 1  # answer 2
    outs = []
    for one in (row, other):
        batch, places = shared_prompts.arrange([one], PACKED)
        with torch.no_grad():
            hidden = lm_head.hidden_states(model, batch)[0]
        outs.append([hidden[torch.from_numpy(place[30:])] for place in places])
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][2], outs[1][2])
    assert not torch.allclose(outs[0][1], outs[1][1], atol=1e-3)


def test_no_gradient_flows_from_an_answer_to_another():
    model = packed_model("qwen3")
    batch, places = shared_prompts.arrange([example(6, 5, 4), example(3, 2, 2)], PACKED)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    keywords = lm_head.inputs(model, batch)
    keywords.pop("input_ids")
    hidden = model.model(inputs_embeds=embedded, **keywords).last_hidden_state[0]
    hidden[torch.from_numpy(places[1][6:])].square().sum().backward()
    reached = embedded.grad[0].abs().sum(1) > 0
    assert np.flatnonzero(reached.numpy()).tolist() == places[1].tolist()


def test_log_probs_are_those_of_separate_rows():
    model = packed_model("gpt2")
    found = []
    for shared in (True, False):
        batch, places = shared_prompts.arrange(FEW, Layout(packed=True, shared=shared))
        counts = [int(count) for row in FEW for count in row["answers"][1:]]
        after = [place[max(len(place) - count, 1) :] for place, count in zip(places, counts, strict=True)]
        before = [place[max(len(place) - count, 1) - 1 : -1] for place, count in zip(places, counts, strict=True)]
        batch["positions"] = torch.from_numpy(np.concatenate(before))
        batch["labels"] = batch["input_ids"].reshape(-1)[torch.from_numpy(np.concatenate(after))]
        out = log_probs(model, batch)
        (out * torch.linspace(-1, 2, len(out))).sum().backward()
        found.append((out.detach(), {name: one.grad for name, one in model.named_parameters()}))
        model.zero_grad()
    assert relative_error(*(one[0] for one in found)) <= 1e-6
    assert all(relative_error(gradient, found[1][1][name]) <= 1e-5 for name, gradient in found[0][1].items())


@pytest.mark.parametrize("kind", virtual_tokens.KINDS)
@pytest.mark.parametrize("attend", [attention.NAME, varlen.NAME])
def test_virtual_tokens_are_refused(kind, attend):
    packed_model("llama")
    model = virtual_tokens.adapted("llama", kind)
    base(model).set_attn_implementation(attend)
    batch, _ = shared_prompts.arrange([example(6, 5, 4)], PACKED)
    with pytest.raises(CannotPack, match="cannot share a prefix that follows virtual tokens"):
        lm_head.hidden_states(model, batch)


@pytest.mark.parametrize("attend", ["segments", "varlen"])
def test_virtual_keys_are_refused_by_attention_itself(attend):
    q, k = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 7, 8)
    with pytest.raises(CannotPack, match="virtual tokens"):
        if attend == "segments":
            attention.segment_attention(torch.nn.Identity(), q, k, k, None, segments=(2, 1, 2), behind=(-1, 0, 0))
        else:
            given = varlen.boundaries((2, 1, 2), CPU, (-1, 0, 0))
            varlen.attend_with(standin.varlen_attn, (9, 0))(torch.nn.Identity(), q, k, k, None, **given)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_encoders_are_refused(name, fast, tmp_path):
    from transformers import AutoModel

    attention.register()
    model = AutoModel.from_pretrained(save_tiny_encoder(name, tmp_path)).eval()
    model.set_attn_implementation(attention.NAME)
    if fast:
        assert "encoder attention" in fused_layers.install(model).kinds
    batch, _ = shared_prompts.arrange([example(6, 5, 4)], PACKED)
    with pytest.raises(CannotPack, match="only where attention is causal"):
        lm_head.hidden_states(model, batch)


@pytest.mark.parametrize("attend", [attention.NAME, varlen.NAME])
def test_a_soft_cap_is_refused(attend):
    given, attend_to = {"segments": (2, 1, 2), "behind": (-1, 0, 0)}, attention.segment_attention
    if attend == varlen.NAME:
        given, attend_to = varlen.boundaries((2, 1, 2), CPU, (-1, 0, 0)), varlen.attend_with(standin.varlen_attn, (9, 0))
    x = torch.zeros(1, 2, 5, 8)
    with pytest.raises(CannotPack, match="its attention uses softcap"):
        attend_to(torch.nn.Identity(), x, x, x, None, softcap=30.0, **given)


def test_a_prefix_and_its_first_answer_are_one_run():
    (first, second, third) = segments.families((3, 2, 4, 5, 6, 7), (-1, 0, 0, -1, -1, 4))
    assert first.runs == (segments.Run(0, 5, 0), segments.Run(5, 4, 3)) and (first.start, first.length) == (0, 9)
    assert second.runs == (segments.Run(9, 5, 0),)
    assert third.runs == (segments.Run(14, 13, 0),)
    assert segments.most_keys((3, 2, 4, 5, 6, 7), (-1, 0, 0, -1, -1, 4)) == 13
    assert segments.families((3, 2), (-1, -1)) == segments.families((3, 2))


@pytest.mark.parametrize("behind", [(0, -1, 0), (-1, 0, 1), (-1, -1, 0), (-1, 2, 0), (-1, 0)])
def test_pieces_that_are_behind_anything_else_are_refused(behind):
    with pytest.raises(ValueError, match="behind"):
        segments.families((2, 3, 4), behind)


def test_without_shared_prefixes_there_are_no_such_keywords():
    model = packed_model("llama")
    batch, _ = shared_prompts.arrange([example(0, 3, 4)], PACKED)
    assert "behind" not in lm_head.inputs(model, batch) and lm_head.inputs(model, batch)["segments"] == (3, 4)
    model.set_attn_implementation(varlen.NAME)
    assert set(varlen.boundaries((3, 4), CPU, (-1, 0))) == {"cu_seqlens", "longest"}, "one answer needs no other keys"


def test_the_kernels_keys():
    keywords = varlen.boundaries((3, 2, 4, 1), CPU, (-1, 0, 0, -1))
    assert keywords["cu_seqlens"].tolist() == [0, 5, 9, 10] and keywords["longest"] == 5
    assert keywords["cu_seqlens_k"].tolist() == [0, 5, 12, 13] and keywords["longest_k"] == 7
    assert keywords["key_places"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]
    assert {keywords[name].dtype for name in ("cu_seqlens", "cu_seqlens_k")} == {torch.int32}


def test_the_self_test_sees_a_kernel_that_aligns_the_first_query_with_the_first_key():
    def top_left(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa=False, **keywords):
        keywords["enable_gqa"] = enable_gqa
        if cu_q is cu_k:
            return standin.varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window_size, **keywords)
        kept = torch.cat([torch.arange(int(b), int(b) + int(n)) for b, n in zip(cu_k[:-1], cu_q.diff(), strict=True)])
        return standin.varlen_attn(q, k[kept], v[kept], cu_q, cu_q, max_q, max_q, window_size=window_size, **keywords)

    assert "behind a prefix" in varlen.self_test(varlen.with_gqa(top_left), CPU, torch.float32)


def test_compiled_layers_take_a_shared_prefix():
    torch._dynamo.reset()
    varlen.register(varlen.with_gqa(standin.traceable), (9, 0))
    model = tiny_model("llama", num_hidden_layers=1).train()
    model.set_attn_implementation(varlen.NAME)
    expected = [outputs_and_gradients(model, rows, True) for rows in (FEW, FEW[:3])]
    torch_compile.enable(model, backend="aot_eager")
    for rows, (out, truth) in zip((FEW, FEW[:3]), expected, strict=True):
        found, gradients = outputs_and_gradients(model, rows, True)
        assert relative_error(found, out) <= 1e-5
        assert all(relative_error(gradient, truth[name]) <= 1e-5 for name, gradient in gradients.items())
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
