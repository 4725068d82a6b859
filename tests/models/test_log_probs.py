"""Log-probabilities by target: values and gradients are those of plain torch, whatever is trained, and no logits are kept."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.test_kernels import close
from tests.numeric.test_parity import examples, take_gradients
from tests.tiny import tiny_model, tiny_tokenizer
from tunesmith.data.batch.pack import PACKED
from tunesmith.data.batch.shared_prompts import with_targets
from tunesmith.models.fast import attention, kernels
from tunesmith.models.heads import lm_head
from tunesmith.models.heads.log_probs import BlockedLogProbs, log_probs
from tunesmith.models.network import base
from tunesmith.objectives import sft

LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ROWS = torch.tensor([3, 17])


def operands(dtype, targets, bias, new, vocabulary=50, width=16):
    """hidden, weight, bias, labels, rows, new."""
    generator = torch.Generator().manual_seed(targets)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    labels = torch.randint(0, vocabulary, (targets,), generator=generator)
    labels[::3] = 17  # one of the new rows
    return [drawn(targets, width), drawn(vocabulary, width), drawn(vocabulary) if bias else None, labels,
            ROWS if new else None, drawn(len(ROWS), width) if new else None]  # fmt: skip


def log_softmax_of_labels(hidden, weight, bias, labels, rows=None, new=None):
    used = weight if rows is None else weight.index_copy(0, rows, new)
    return nn.functional.linear(hidden, used, bias).log_softmax(-1).gather(1, labels[:, None])[:, 0]


@pytest.fixture(params=[True, False], ids=["C", "torch"])
def passes(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(kernels, "available", lambda tensor: False)


@pytest.mark.parametrize("trained", ["hidden", "all", "weight", "bias", "new"])
@pytest.mark.parametrize("targets", [0, 1, lm_head.BLOCK, lm_head.BLOCK + 3])
@pytest.mark.parametrize("dtype", LIMITS)
def test_each_target_has_a_coefficient_of_its_own(dtype, targets, trained, passes):
    given = operands(dtype, targets, bias=trained in ("all", "bias"), new=trained in ("all", "new"))
    wanted = {"hidden": [0], "all": [0, 1, 2, 5], "weight": [0, 1], "bias": [2], "new": [0, 5]}[trained]
    for place, one in enumerate(given):
        if one is not None and one.is_floating_point():
            one.requires_grad_(place in wanted)
    exact = [one if one is None or not one.is_floating_point() else one.detach().double() for one in given]
    for place in wanted:
        exact[place].requires_grad_()
    coefficients = torch.randn(targets, generator=torch.Generator().manual_seed(1))
    ours, theirs = BlockedLogProbs.apply(*given), log_softmax_of_labels(*exact)
    assert ours.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    gradients = [
        torch.autograd.grad((y * coefficients).sum(), [some[place] for place in wanted])
        for y, some in ((ours, given), (theirs, exact))
    ]
    assert all(gradient.dtype is dtype for gradient in gradients[0])
    close([ours.detach(), *gradients[0]], [theirs.detach(), *gradients[1]], LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_pass_without_gradients_gives_the_same_to_the_last_bit(dtype, passes, monkeypatch):
    """And the entropies, also where a token is excluded, without a gradient by the logits."""
    given = operands(dtype, lm_head.BLOCK + 3, bias=True, new=True)
    given[2].data[7], given[3][given[3] == 7] = -torch.inf, 8
    logps = BlockedLogProbs.apply(*[one if one is None else one.detach() if place else one for place, one in enumerate(given)])
    expected = log_softmax_of_labels(*[one.detach() if torch.is_tensor(one) else one for one in given])
    hidden, weight, bias, _, rows, new = (one.detach() for one in given)
    logits = nn.functional.linear(hidden, weight.index_copy(0, rows, new), bias)
    entropies = torch.distributions.Categorical(logits=logits[:, [*range(7), *range(8, 50)]].double()).entropy()
    monkeypatch.setattr(lm_head, "loss_and_gradient", lambda *_: pytest.fail("a gradient was computed"))
    losses, found = lm_head.target_losses(tuple(given), entropies=True)
    assert torch.equal(-losses, logps)
    close([found, losses], [entropies, -expected.double()], LIMITS[dtype])
    assert lm_head.target_losses(tuple(given))[1] is None and not losses.requires_grad
    given[1].data[5, 0] = torch.nan
    assert all(not one.isfinite().any() for one in lm_head.target_losses(tuple(given), entropies=True))


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("head_trained", [False, True])
def test_gradcheck(head_trained, new, monkeypatch):
    monkeypatch.setattr(lm_head, "BLOCK", 4)  # so that ten targets are three blocks
    given = operands(torch.float64, 10, bias=True, new=new, vocabulary=20, width=3)
    for place in (1, 2, 5):
        if given[place] is not None:
            given[place].requires_grad_(head_trained)
    assert torch.autograd.gradcheck(BlockedLogProbs.apply, tuple(given))


def test_a_scaled_loss_passes_through_fp16():
    """2^17 is more than fp16 holds, and so is the sum over targets before it is divided."""
    hidden, weight = torch.full((2000, 4), 60.0, dtype=torch.float16), torch.zeros(8, 4, dtype=torch.float16).requires_grad_()
    (BlockedLogProbs.apply(hidden, weight, None, torch.zeros(2000, dtype=torch.long)).sum() * (2.0**17 / 2000 / 2**14)).backward()
    assert weight.grad[0].tolist() == pytest.approx([8 * 60 * 7 / 8] * 4, rel=1e-3)


def tiny(kind):
    """A model with something of its head trained, attention for packed rows."""
    attention.register()
    changes = {} if kind in ("tied", "rows") else {"tie_word_embeddings": False}
    model = tiny_model("llama", **changes)
    if kind in ("rows", "untied rows"):
        layers = {"embed_tokens": [5, 9], **({"lm_head": [5, 9]} if changes else {})}
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=layers))
        assert any("trainable_tokens_delta" in name and one.requires_grad for name, one in model.named_parameters())
    if kind == "head frozen":
        model.lm_head.weight.requires_grad_(False)
    if kind == "bias":
        model.lm_head = nn.Linear(32, 512)
    if kind == "not one product":
        model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 512))
    base(model).set_attn_implementation(attention.NAME)
    lm_head.use_plain_head(model, kind == "plain")
    return model


@pytest.mark.parametrize("kind", ["tied", "untied", "rows", "untied rows", "head frozen", "bias", "not one product", "plain"])
def test_of_a_model_they_are_those_of_its_logits(kind):
    model, batch = tiny(kind), with_targets(examples(sft.Objective(sft.Config()), tiny_tokenizer()), PACKED)
    coefficients = torch.randn(len(batch["labels"]), generator=torch.Generator().manual_seed(0))
    logits = model(**lm_head.inputs(model, batch)).logits[0, batch["positions"]]
    theirs = logits.log_softmax(-1).gather(1, batch["labels"][:, None])[:, 0]
    (theirs * coefficients).sum().backward()
    expected = take_gradients(model)
    ours = log_probs(model, batch)
    (ours * coefficients).sum().backward()
    found = take_gradients(model)
    assert found.keys() == expected.keys()
    close([ours.detach(), *found.values()], [theirs.detach(), *expected.values()], 1e-5)
    assert float(lm_head.lm_loss(model, batch).detach() + ours.detach().double().sum()) == pytest.approx(0, abs=1e-3)


class Largest(TorchDispatchMode):
    """A dispatch mode that records the size of the largest tensor."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.numel())
        return out


@pytest.mark.parametrize("head_trained", [False, True])
def test_no_logits_are_kept_and_never_more_than_a_block_of_them_made(head_trained):
    targets, vocabulary, width = 4 * lm_head.BLOCK, 5000, 8
    hidden = torch.randn(targets, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=head_trained)
    kept = []
    with (
        Largest() as sizes,
        torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one),
    ):
        out = BlockedLogProbs.apply(hidden, weight, None, torch.arange(targets))
        out.sum().backward()
    assert max(kept) == (vocabulary * width if head_trained else targets * width)
    assert sizes.most == lm_head.BLOCK * vocabulary  # 4 times as many are those of all targets
    assert not any(isinstance(one, torch.Tensor) for one in vars(out.grad_fn).values())


def test_without_gradients_nothing_is_made_for_them():
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(50, 8)
    with torch.no_grad():
        assert not BlockedLogProbs.apply(hidden, weight, None, torch.arange(7)).requires_grad
