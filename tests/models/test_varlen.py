"""Packed attention by one kernel call: when it is chosen, its arguments, and that packed rows equal rows alone.

No test here has a GPU: the kernel is a stand-in whose signature is that of torch's.
"""

import inspect

import numpy as np
import pytest
import torch

from tests.models import standin
from tests.numeric.test_parity import examples, take_gradients
from tests.tiny import TINY, tiny_model, tiny_tokenizer
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.data.batch.shared_prompts import with_targets
from tunesmith.models.fast import attention, kernels, varlen
from tunesmith.models.heads import lm_head
from tunesmith.objectives import sft
from tunesmith.train import fast_path

SFT = sft.Objective(sft.Config())
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KERNEL = varlen.with_gqa(standin.varlen_attn)


@pytest.fixture
def kernel_serves(monkeypatch):
    """A machine on which the kernel serves fp32 on the CPU, as an H100 would."""
    monkeypatch.setattr(varlen, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(varlen, "torch_kernel", lambda: KERNEL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "available", lambda tensor: False)  # they are for CPUs


def test_the_stand_in_has_torchs_signature():
    from torch.nn.attention.varlen import varlen_attn

    def shape(function):
        return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]

    assert shape(standin.varlen_attn) == shape(varlen_attn)


def test_torchs_function_is_taken_with_its_gqa_switch():
    called = varlen.torch_kernel().func
    assert called.__module__ == "torch.nn.attention.varlen"


def test_torch_2_11_has_no_gqa_switch():
    """The signature of 2.11 has window_size but no enable_gqa; that kernel accepts fewer key heads without a switch."""

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        return query

    assert varlen.with_gqa(older) is older


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "hip", "expected"),
    [
        ("cuda", torch.bfloat16, (9, 0), None, "varlen"),
        ("cuda", torch.float16, (8, 0), None, "varlen"),
        ("cuda", torch.bfloat16, (12, 0), None, "varlen"),
        ("cuda", torch.float16, (7, 5), None, "segments"),
        ("cuda", torch.float32, (9, 0), None, "segments"),
        ("cuda", torch.bfloat16, (9, 4), "6.4", "segments"),
        ("cpu", torch.bfloat16, None, None, "segments"),
        ("mps", torch.float16, None, None, "segments"),
    ],
)
def test_device_dtype_and_capability_choose(device, dtype, capability, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert fast_path.packed_attention(torch.device(device), dtype) == expected


def test_a_torch_without_flash_attention_goes_by_segments(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert varlen.why_not(GPU, torch.bfloat16) == "this torch was built without FlashAttention"


@pytest.mark.parametrize(
    ("dim", "value_dim", "capability", "fits"),
    [(64, 64, (8, 0), True), (80, 80, (8, 6), True), (60, 60, (9, 0), False), (512, 512, (9, 0), False), (192, 128, (9, 0), False),
     (256, 256, (9, 0), True), (256, 256, (8, 0), True), (256, 256, (8, 9), False), (256, 256, (12, 0), False)],
)  # fmt: skip
def test_heads_that_the_kernel_takes(dim, value_dim, capability, fits):
    assert varlen.heads_fit(dim, value_dim, capability) is fits


def test_boundaries_are_int32_on_the_device():
    made = varlen.boundaries((3, 1, 5), CPU)
    assert made["cu_seqlens"].tolist() == [0, 3, 4, 9] and made["cu_seqlens"].dtype is torch.int32
    assert made["longest"] == 5 and isinstance(made["longest"], int)


def test_the_self_test_passes_the_stand_in():
    assert varlen.self_test(KERNEL, CPU, torch.float32) is None
    assert varlen.self_test(KERNEL, CPU, torch.bfloat16) is None


@pytest.mark.parametrize("window", [None, 16])
def test_the_self_test_sees_a_window_that_is_off_by_one(window):
    def off(*args, window_size, **kwargs):
        left = window_size[0] + (1 if (window_size[0] >= 0) is (window is not None) else 0)
        return KERNEL(*args, window_size=(left, 0), **kwargs)

    assert "sliding window" in varlen.self_test(off, CPU, torch.float32)


def test_the_self_test_sees_wrong_gradients():
    def wrong(q, k, v, *args, **kwargs):
        return KERNEL(q, k, v.detach() + 0 * v, *args, **kwargs)

    assert "without a sliding window" in varlen.self_test(wrong, CPU, torch.float32)


def test_the_self_test_sees_a_kernel_that_is_always_causal():
    def causal(*args, window_size, **kwargs):
        return KERNEL(*args, window_size=(window_size[0], 0), **kwargs)

    assert "bidirectional" in varlen.self_test(causal, CPU, torch.float32)


@pytest.mark.parametrize("name", TINY)
def test_packed_logits_are_those_of_rows_alone(name):
    """Also for mistral and gemma3, whose window of 16 is shorter than these rows."""
    varlen.register(KERNEL, (9, 0))
    model, rows = tiny_model(name), examples(SFT, tiny_tokenizer())
    assert max(len(row["input_ids"]) for row in rows) > 16
    with torch.no_grad():
        alone = torch.cat([model(**lm_head.inputs(model, with_targets([row], PADDED))).logits[0] for row in rows])
        model.set_attn_implementation(varlen.NAME)
        packed = model(**lm_head.inputs(model, with_targets(rows, PACKED))).logits[0]
    assert (packed - alone).abs().max() < 1e-4


@pytest.mark.parametrize("name", TINY)
def test_the_trial_takes_it_with_the_gradients_of_the_plain_path(name, kernel_serves):
    model, rows = tiny_model(name), examples(SFT, tiny_tokenizer())
    SFT.loss(model, SFT.collate(rows, PADDED))[0].backward()
    expected = take_gradients(model)
    chosen = fast_path.choose(model, SFT, rows, max(len(row["input_ids"]) for row in rows), "auto", CPU)
    assert chosen.as_dict()["attention"] == "varlen" and chosen.notes == []
    SFT.loss(model, SFT.collate(rows, PACKED))[0].backward()
    for key, gradient in take_gradients(model).items():
        assert (gradient - expected[key]).abs().max() <= 1e-4 * expected[key].abs().max(), key


def test_boundaries_are_made_once_a_batch_and_segments_stay_on_the_host(kernel_serves, monkeypatch):
    model, rows = tiny_model("llama"), examples(SFT, tiny_tokenizer())
    fast_path.choose(model, SFT, rows, 64, "auto", CPU)
    made, seen = [], []
    real = varlen.boundaries
    monkeypatch.setattr(varlen, "boundaries", lambda *given: made.append(given) or real(*given))
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args, keywords: seen.append(keywords), with_kwargs=True)
    SFT.loss(model, SFT.collate(rows, PACKED))
    assert len(made) == 1 and len(seen) == 2
    assert seen[0]["cu_seqlens"] is seen[1]["cu_seqlens"] and "segments" not in seen[0]


def test_nothing_is_read_back_from_the_device(monkeypatch):
    """Reading a number out of a tensor would make the host wait. Operations inside the kernel's stand-in do not count."""
    varlen.register(lambda q, *others, **keywords: q, (9, 0))
    model, batch = tiny_model("gemma3"), with_targets(examples(SFT, tiny_tokenizer()), PACKED)
    model.set_attn_implementation(varlen.NAME)

    def fail(*given):
        raise AssertionError("the host waits here")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    lm_head.hidden_states(model, batch)


def test_heads_of_another_size_go_segment_by_segment_and_it_is_reported(kernel_serves):
    model = tiny_model("llama", head_dim=6)
    chosen = fast_path.choose(model, SFT, examples(SFT, tiny_tokenizer()), 64, "auto", CPU)
    assert chosen.packed and chosen.as_dict()["attention"] == "segments"
    assert chosen.notes == [
        "attention is not varlen_attn for this model: its heads have 6 numbers, which varlen_attn has no kernel for on this GPU"
    ]


def test_a_kernel_that_fails_its_self_test_is_not_taken(kernel_serves, monkeypatch):
    monkeypatch.setattr(varlen, "torch_kernel", lambda: lambda *args, **kwargs: KERNEL(*args, **kwargs) * 1.1)
    chosen = fast_path.choose(tiny_model("llama"), SFT, examples(SFT, tiny_tokenizer()), 64, "auto", CPU)
    assert chosen.packed and chosen.as_dict()["attention"] == "segments"
    assert "on random numbers it differed" in chosen.notes[0]


@pytest.mark.parametrize(("name", "attention_of"), [("llama", "segments"), ("mistral", "sdpa")])
def test_a_kernel_that_differs_on_the_first_rows_is_given_up(kernel_serves, monkeypatch, name, attention_of):
    """A window shorter than the rows cannot go segment by segment: those rows are padded."""
    monkeypatch.setattr(varlen, "torch_kernel", lambda: lambda *args, **kwargs: KERNEL(*args, **kwargs) * 1.1)
    monkeypatch.setattr(varlen, "self_test", lambda *given: None)
    model = tiny_model(name)
    chosen = fast_path.choose(model, SFT, examples(SFT, tiny_tokenizer()), 64, "auto", CPU)
    assert chosen.as_dict()["attention"] == attention_of and chosen.packed is (attention_of == "segments")
    assert any("attention is not varlen_attn: on the first rows" in note for note in chosen.notes)
    assert model.config._attn_implementation == (attention.NAME if chosen.packed else "sdpa")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"softcap": 30.0}, "its attention uses softcap"),
        ({"dropout": 0.1}, "drops probabilities"),
        ({"is_causal": False, "sliding_window": 3}, "slides to both sides"),
        ({"cu_seqlens": None}, "does not pass the segments on"),
    ],
)
def test_what_the_kernel_would_ignore_is_refused(given, said):
    attend = varlen.attend_with(KERNEL, (9, 0))
    x = torch.zeros(1, 2, 4, 8)
    keywords = {**varlen.boundaries((4,), CPU), **given}
    with pytest.raises(attention.CannotPack, match=said):
        attend(torch.nn.Identity(), x, x, x, None, **keywords)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_kernel_on_this_gpu(dtype):
    if (why := varlen.why_not(GPU, dtype)) is not None:
        pytest.skip(why)
    assert varlen.self_test(varlen.torch_kernel(), GPU, dtype) is None


def test_one_token_rows_are_a_packing_too():
    varlen.register(KERNEL, (9, 0))
    model = tiny_model("qwen3")
    row = {"input_ids": np.array([5], np.int32), "supervised": np.array([False])}
    with torch.no_grad():
        alone = model(**lm_head.inputs(model, with_targets([row], PADDED))).logits[0]
        model.set_attn_implementation(varlen.NAME)
        packed = model(**lm_head.inputs(model, with_targets([row, row], PACKED))).logits[0]
    assert (packed - torch.cat([alone, alone])).abs().max() < 1e-5
