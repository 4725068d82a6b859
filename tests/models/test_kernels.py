"""The C passes against their formulas in torch."""

from itertools import accumulate

import pytest
import torch

from tunesmith.models.fast import attention, fused_layers, kernels
from tunesmith.models.fast.segments import families
from tunesmith.models.heads import lm_head

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler on this machine, or the self-test failed")
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def grads(output, inputs, upstream):
    return torch.autograd.grad(output, inputs, upstream)


def close(ours, theirs, limit):
    for one, other in zip(ours, theirs, strict=True):
        assert float((one.float() - other.float()).norm()) <= limit * max(float(other.float().norm()), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 9), (7, 33), (64, 96)])
def test_rms_norm(dtype, shape):
    torch.manual_seed(0)
    x, w, g = torch.randn(shape), torch.randn(shape[1]), torch.randn(shape)
    ours = [t.to(dtype).requires_grad_() for t in (x, w)]
    theirs = [t.detach().float().requires_grad_() for t in ours]
    y = fused_layers.RMSNorm.apply(*ours, 1e-5)
    z = torch.nn.functional.rms_norm(theirs[0], (shape[1],), theirs[1], 1e-5)
    close([y, *grads(y, ours, g.to(dtype))], [z, *grads(z, theirs, g.to(dtype).float())], DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    torch.manual_seed(0)
    x, g = (torch.randn(13, 46) * 4).to(dtype).requires_grad_(), torch.randn(13, 23).to(dtype)
    other = x.detach().float().requires_grad_()
    y, z = fused_layers.SwiGLU.apply(x), torch.nn.functional.silu(other[:, :23]) * other[:, 23:]
    close([y, *grads(y, [x], g)], [z, *grads(z, [other], g.float())], DTYPES[dtype])


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 8), (torch.float32, 16), (torch.float32, 80), (torch.bfloat16, 16)])
@pytest.mark.parametrize(
    ("segments", "behind"),
    [((1,), None), ((5,), None), ((3, 1, 7), None), ((300,), None), ((257, 2, 520), None), ((5, 1), (-1, 0)),
     ((1, 2, 3), (-1, 0, 0)), ((4, 9, 2, 3, 6, 1, 8), (-1, -1, 1, 1, 1, -1, 5)), ((300, 40, 270), (-1, 0, 0))],
)  # fmt: skip
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_by_segments(dtype, dim, segments, behind, kv_heads):
    """Rows longer than one block and answers after a shared prefix are included."""
    torch.manual_seed(0)
    tokens = sum(segments)
    q, k, v = (torch.randn(heads, tokens, dim).to(dtype).requires_grad_() for heads in (4, kv_heads, kv_heads))
    assert attention.in_c(q) == (dim > 8 and dtype is torch.float32)
    g = torch.randn(tokens, 4, dim).to(dtype)
    y = attention.CausalSegments.apply(q, k, v, families(segments, behind), 0.3)
    plain = [t.detach().double().requires_grad_() for t in (q, k, v)]
    parts, spans = [], [slice(end - length, end) for end, length in zip(accumulate(segments), segments)]
    for here, before in zip(spans, behind or (-1,) * len(segments)):
        ahead = spans[before] if before >= 0 else slice(0, 0)
        keys, values = (torch.cat([t[:, ahead], t[:, here]], dim=1).repeat_interleave(4 // kv_heads, 0) for t in plain[1:])
        scores = plain[0][:, here] @ keys.transpose(1, 2) * 0.3
        scores = scores.masked_fill(
            torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + ahead.stop - ahead.start), float("-inf")
        )
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
    z = torch.cat(parts)
    close([y, *grads(y, [q, k, v], g)], [z, *grads(z, plain, g.double())], DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, lm_head.BLOCK, lm_head.BLOCK + 3])
def test_blocked_cross_entropy(dtype, rows):
    torch.manual_seed(0)
    h, w, b = torch.randn(rows, 16), torch.randn(50, 16), torch.randn(50)
    labels = torch.randint(0, 50, (rows,))
    ours = [t.to(dtype).requires_grad_() for t in (h, w, b)]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    y = lm_head.BlockedCrossEntropy.apply(*ours, labels)
    z = torch.nn.functional.cross_entropy(theirs[0] @ theirs[1].t() + theirs[2], labels, reduction="sum")
    factor = torch.tensor(1 / 37)
    close([y, *grads(y, ours, factor.double())], [z, *grads(z, theirs, factor.double())], DTYPES[dtype])


@pytest.mark.parametrize("bias", [None, torch.randn(20)])
def test_blocks_of_logits_share_their_memory(bias):
    hidden, weight = torch.randn(2 * lm_head.BLOCK + 3, 8), torch.randn(20, 8)
    found = [(here, logits.clone(), logits.data_ptr()) for here, logits in lm_head.logit_blocks(hidden, weight, bias)]
    assert torch.allclose(
        torch.cat([logits for _, logits, _ in found]), torch.nn.functional.linear(hidden, weight, bias), atol=1e-5
    )
    assert len(found) == 3 and len({place for *_, place in found}) == 1
    assert torch.equal(torch.cat([torch.arange(len(hidden))[here] for here, *_ in found]), torch.arange(len(hidden)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    logits, losses = torch.zeros(2, 40), torch.zeros(2)
    logits[1, 3] = value
    kernels.call("cross_entropy", torch.float32, logits, torch.tensor([1, 1]), losses, 2, 40)
    assert torch.isfinite(losses).tolist() == [True, False]


def test_stochastic_rounding_is_the_same_in_c_and_torch(monkeypatch):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(999), torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 3.3e38])])
    ours, plain = torch.empty(len(x), dtype=torch.bfloat16), torch.empty(len(x), dtype=torch.bfloat16)
    for seed in (0, 7, 2**32 - 1):
        kernels.stochastic_round(x, ours, seed)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "available", lambda tensor: False)
            kernels.stochastic_round(x, plain, seed)
        assert torch.equal(ours.view(torch.int16), plain.view(torch.int16))
        assert torch.isnan(ours[999]) and torch.isinf(ours[1000:1002]).all()


def test_stochastic_rounding_keeps_small_updates_in_the_mean():
    x = torch.full((20_000,), 1.0 + 2**-10)  # an eighth of the way to the next bf16
    out = torch.empty(len(x), dtype=torch.bfloat16)
    kernels.stochastic_round(x, out, 3)
    assert float(out.float().mean()) == pytest.approx(1.0 + 2**-10, abs=1e-4)
    exact = torch.randn(100).bfloat16()
    kept = torch.empty_like(exact)
    kernels.stochastic_round(exact.float(), kept, 5)
    assert torch.equal(kept, exact)


def test_the_number_of_threads_changes_nothing():
    torch.manual_seed(0)
    x, w, labels = torch.randn(37, 64), torch.randn(64), torch.randint(0, 64, (37,))
    q, grouped = torch.randn(4, 37, 16, requires_grad=True), families((20, 8, 9), (-1, 0, 0))
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        logits, losses = x.clone(), torch.empty(37)
        kernels.call("cross_entropy", torch.float32, logits, labels, losses, 37, 64)
        mixed = attention.CausalSegments.apply(q, q[:2], q[2:], grouped, 0.3)
        found.append((logits, losses, fused_layers.RMSNorm.apply(x, w, 1e-5), mixed, *grads(mixed, [q], mixed.detach())))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for case in found[1:] for one, other in zip(case, found[0]))


def test_a_c_pass_without_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(kernels, "_call", lambda *given: 1)
    with pytest.raises(MemoryError, match="prefill_attention_f32"):
        kernels.call_in_memory("prefill_attention", torch.float32)
