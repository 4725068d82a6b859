"""Packed or padded, fused or plain: what a run may use, shown on its own first rows.

Every fast path must be the same function as the plain one. Before the first step two rows go through transformers' own forward
and through the fast one; loss and gradients are compared, and what differs is switched off, out loud. What begins at zero (the B
of a LoRA) holds small random numbers meanwhile: beside zeros, half of the gradients are zeros on every path.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tunesmith.data.batch import preference_batch
from tunesmith.data.batch.pack import PADDED, Layout, to_device
from tunesmith.errors import ModelError
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.fast import attention, fused_layers, torch_compile, varlen
from tunesmith.models.heads import lm_head
from tunesmith.models.network import base
from tunesmith.objectives import Example, Objective
from tunesmith.train import machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 192  # of each row: enough to see every layer at work, few enough to cost a second
# largest accepted difference: of the loss, relative; of all gradients together, relative to their norm. In bf16 the plain
# path itself differs from fp32 by some 4% of the gradient (SmolLM2-135M), in either direction; in fp16 by 0.7%, and by 6e-5 of
# the loss (the fast path from the plain one by 0.7% and 1e-4).
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 0.15), torch.float16: (1e-3, 3e-2)}
JUDGED = 3.0
"""How much more a reward may differ in half precision. It is learnt from differences: what two answers have in common cancels in
the gradient, and its rounding does not. The plain path itself is 11% from fp32 (SmolLM2-135M in bf16), its loss up to 1.5%."""
NOT_ZERO = 0.02
"""Standard deviation of what stands for zeros in the trial: as transformers draws weights, and the loss stays what it is."""
SCALE = {torch.float16: 2.0**10}
"""Of the loss in the trial. Without it much of a gradient is below what fp16 holds: the same paths then differ by 1.6%."""

STILL = 1e-6
"""Largest difference, relative, between two looks at the same rows by the same layers."""


@dataclass
class Route:
    """How batches are laid out and which layers are replaced; ``notes`` are said once."""

    layout: Layout
    fused: fused_layers.Fused
    attention: str
    """The model's own attention, for whatever is not a packed batch."""
    notes: list[str] = field(default_factory=list)
    packed_attention: str = "segments"
    """How a packed batch is attended to: ``varlen`` or ``segments``."""
    recomputed: bool = False
    """Whether decoder layers are computed again in the backward pass."""
    compiled: bool = False
    """Whether decoder layers go through torch.compile."""

    @property
    def packed(self) -> bool:
        return self.layout.packed

    def leave(self, model: PreTrainedModel) -> None:
        """Give ``model`` its own layers, loss and attention back."""
        torch_compile.disable(model)
        self.fused.disable()
        lm_head.use_plain_head(model, False)
        base(model).set_attn_implementation(self.attention)

    def as_dict(self) -> dict[str, Any]:
        return {
            "batches": "packed" if self.packed else "padded",
            "attention": self.packed_attention if self.packed else self.attention,
            "fused": dict(self.fused.kinds),
            "recomputed": self.recomputed,
            "compiled": self.compiled,
            "shared": self.layout.shared,
            "notes": list(self.notes),
        }


@contextmanager
def plain_attention(model: PreTrainedModel, route: Route) -> Iterator[None]:
    """Generation keeps a cache and has no segments: it takes the model's own attention."""
    inner = base(model)
    ours = inner.config._attn_implementation
    inner.set_attn_implementation(route.attention)
    model.eval()
    try:
        with torch_compile.paused() if route.compiled else nullcontext():
            yield
    finally:
        inner.set_attn_implementation(ours)


def choose(
    model: PreTrainedModel,
    objective: Objective,
    examples: Sequence[Example],
    longest: int,
    packing: str,
    device: torch.device,
    stack: bool = True,
) -> Route:
    """Find the fastest route that is shown equal on ``examples`` (two rows are enough; the run gives the shortest of step 1).

    ``longest``: tokens of the longest row of the run, which a sliding window must cover. ``stack``: whether a layer may be
    replaced by one that holds on to the memory of trained weights (somebody else may want to move it). The model is left in eval
    mode, with no gradients, set up for the route.
    """
    model.eval()
    with _without_zeros(model):
        return _chosen(
            model, objective, examples, longest + virtual_tokens.count(model), packing, device, stack
        )


def _chosen(
    model: PreTrainedModel,
    objective: Objective,
    examples: Sequence[Example],
    longest: int,
    packing: str,
    device: torch.device,
    stack: bool,
) -> Route:
    inner = base(model)
    rows = [_shorten(example) for example in list(examples)[:2]]
    route = Route(PADDED, fused=fused_layers.Fused(), attention=inner.config._attn_implementation)
    lm_head.use_plain_head(model, True)
    expected = _loss_and_gradients(model, objective, rows, PADDED, device)

    if packing != "off":
        _pack(model, objective, rows, longest, device, route)
    lm_head.use_plain_head(model, False)
    route.fused = fused_layers.install(model, stack)

    def differs() -> str | None:
        got = _loss_and_gradients(model, objective, rows, route.layout, device)
        return _difference(expected, got, model.dtype, _more(objective))

    steps: list[tuple[str, Callable[[], None]]] = [
        *([("answers do not share their prompt", lambda: _part(route))] if route.layout.shared else []),
        ("the fused layers are off", lambda: _switch_off(route)),
        ("the loss is computed from all logits", lambda: lm_head.use_plain_head(model, True)),
        ("rows are padded, not packed", lambda: _unpack(route, inner)),
    ]
    if route.packed_attention == "varlen":
        steps.insert(
            2,
            (
                "attention is not varlen_attn",
                lambda: _by_segments(model, objective, rows, longest, device, route),
            ),
        )
    for said, retreat in steps:
        difference = differs()
        if difference is None:
            break
        retreat()
        route.notes.append(
            f"{said}: on the first rows the fast path differed from the plain one ({difference})"
        )
    return route


def _part(route: Route) -> None:
    route.layout = replace(route.layout, shared=False)


def check_still(
    model: PreTrainedModel,
    objective: Objective,
    examples: Sequence[Example],
    route: Route,
    device: torch.device,
) -> None:
    """Raise ModelError where the network says something else in training than in evaluation: where something in it is random.

    For an objective whose figures are facts of the weights. The two rows are those of :func:`choose`.
    """
    batch = to_device(
        objective.collate([_shorten(example) for example in list(examples)[:2]], route.layout), device
    )
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        moving = objective.summarise([objective.evaluate(model, batch)])
    model.eval()
    still = objective.summarise([objective.evaluate(model, batch)])
    apart = [
        name
        for name, value in still.items()
        if not np.isclose(value, moving[name], rtol=STILL, atol=STILL, equal_nan=True)
    ]
    if apart:
        raise ModelError(
            f"{base(model).config.model_type} answers otherwise in training than in evaluation ({apart[0]} of the first "
            f"rows: {moving[apart[0]]:.6g} and {still[apart[0]]:.6g}), so something in it is random beside dropout, "
            "which is off.\n  Set its rates in the model's config.json to 0, or take another model."
        )


def recompute(
    model: PreTrainedModel,
    objective: Objective,
    examples: Sequence[Example],
    route: Route,
    device: torch.device,
) -> None:
    """From now on keep of each decoder layer what goes into it, and compute the rest again in backward (Chen et al. 2016).

    It is transformers' own checkpointing, the kind that is not reentrant: gradients reach adapters in a frozen base, and keywords
    such as the segments reach the second forward. Only training mode does it. It is tried on the rows of :func:`choose`, in
    training mode, drawing the same random numbers; where the gradients differ it is switched off again and a note says so.
    """
    inner = base(model)
    rows = [_shorten(example) for example in list(examples)[:2]]

    model.train()
    expected = _repeatable(model, objective, rows, route, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its name is going; transformers 5.17 knows no other
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inner.disable_input_require_grads()  # only the reentrant kind needs a gradient for the frozen embeddings; it costs time
    difference = _difference(
        expected, _repeatable(model, objective, rows, route, device), model.dtype, _more(objective)
    )
    if difference is None:
        route.recomputed = True
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            inner.gradient_checkpointing_disable()
        route.notes.append(
            f"gradient checkpointing is off: on the first rows the gradients differed with it ({difference})"
        )
    model.eval()


def compile_layers(
    model: PreTrainedModel,
    objective: Objective,
    examples: Sequence[Example],
    route: Route,
    device: torch.device,
) -> None:
    """From now on each decoder layer is compiled by torch.compile, where loss and gradients stay what they are.

    They are compared with those of the same route uncompiled, in training mode, for two rows together and for the first alone:
    two packings that one piece of code has to serve. What cannot be compiled, or differs, is switched off and a note says so.
    """
    if route.packed and route.packed_attention == "segments":
        route.notes.append(
            "torch.compile is off: attention goes row by row here, and would be compiled anew for each packing"
        )
        return
    rows = [_shorten(example) for example in list(examples)[:2]]
    model.train()
    expected = [_repeatable(model, objective, some, route, device) for some in (rows, rows[:1])]
    torch_compile.enable(model)
    try:
        found = [_repeatable(model, objective, some, route, device) for some in (rows, rows[:1])]
        differences = [
            _difference(*pair, model.dtype, _more(objective)) for pair in zip(expected, found, strict=True)
        ]
        difference = next((one for one in differences if one is not None), None)
    except (
        RuntimeError
    ) as error:  # no compiler, no Triton, or code that it cannot trace: torch has no one class for these
        if machine.is_out_of_memory(error):
            raise
        difference = f"{type(error).__name__}: {' '.join(str(error).split(chr(10))[:2])}"
        for parameter in model.parameters():
            parameter.grad = None
    if difference is None:
        route.compiled = True
    else:
        torch_compile.disable(model)
        route.notes.append(f"torch.compile is off: on the first rows it failed or differed ({difference})")
    model.eval()


def _repeatable(
    model: PreTrainedModel, objective: Objective, rows: Sequence[Example], route: Route, device: torch.device
) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients by the route so far, drawing the same random numbers at each call."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _without_zeros(model):
        torch.manual_seed(0)  # some models drop by torch's own stream
        return _loss_and_gradients(model, objective, rows, route.layout, device)


@contextmanager
def _without_zeros(model: PreTrainedModel) -> Iterator[None]:
    """Trained tensors that are all zero hold small numbers for as long, always the same ones; no random state moves."""
    generator = torch.Generator().manual_seed(0)
    zeros = [
        (one, one.detach().clone())
        for one in model.parameters()
        if one.requires_grad and not one.detach().any()
    ]
    with torch.no_grad():
        for parameter, zero in zeros:
            parameter.copy_(torch.randn(zero.shape, generator=generator) * NOT_ZERO)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, zero in zeros:
                parameter.copy_(zero)


def _switch_off(route: Route) -> None:
    route.fused.disable()
    route.fused = fused_layers.Fused()


def _unpack(route: Route, inner: Any) -> None:
    route.layout = PADDED
    inner.set_attn_implementation(route.attention)


def packed_attention(device: torch.device, dtype: torch.dtype) -> str:
    """``varlen`` on a GPU since Ampere in fp16 or bf16; else ``segments``. Known before a model is; its heads may not fit."""
    return "varlen" if varlen.why_not(device, dtype) is None else "segments"


def _pack(
    model: PreTrainedModel,
    objective: Objective,
    rows: Sequence[Example],
    longest: int,
    device: torch.device,
    route: Route,
) -> None:
    """Pack, by the best attention that takes this model, or say why not."""
    reasons = []
    if packed_attention(device, model.dtype) == "varlen":
        kernel = varlen.torch_kernel()
        differs = varlen.self_test(kernel, device, model.dtype)
        if differs is None:
            varlen.register(kernel, torch.cuda.get_device_capability(device))
            why = _why_not_packed(model, objective, rows, longest, device, varlen.NAME, route)
            if why is None:
                route.packed_attention = "varlen"
                return
            reasons.append(why)
        else:
            route.notes.append(
                f"attention is not varlen_attn: on random numbers it differed from plain attention ({differs})"
            )
    _by_segments(model, objective, rows, longest, device, route, reasons)


def _by_segments(
    model: PreTrainedModel,
    objective: Objective,
    rows: Sequence[Example],
    longest: int,
    device: torch.device,
    route: Route,
    reasons: Sequence[str] = (),
) -> None:
    """Pack with attention row by row; where that is not exact, pad. ``reasons``: why a faster attention was not taken."""
    attention.register()
    route.packed_attention = "segments"
    why = _why_not_packed(model, objective, rows, longest, device, attention.NAME, route)
    if why is not None:
        route.notes.append(f"rows are padded, not packed, for this model: {why}")
        _unpack(route, base(model))
    elif reasons:
        route.notes.append(f"attention is not varlen_attn for this model: {', '.join(reasons)}")


def _why_not_packed(
    model: PreTrainedModel,
    objective: Objective,
    rows: Sequence[Example],
    longest: int,
    device: torch.device,
    name: str,
    route: Route,
) -> str | None:
    """:func:`_cannot_pack`; where answers cannot share their prompt, of answers that stand apart."""
    best, apart = Layout(packed=True, shared=objective.traits.shares_prompts), Layout(packed=True)
    why = _cannot_pack(model, objective, rows, longest, device, name, best)
    if why is None:
        route.layout = best
        return None
    if not best.shared:
        return why
    still = _cannot_pack(model, objective, rows, longest, device, name, apart)
    if still is None:
        route.layout = apart
        route.notes.append(f"answers do not share their prompt: {why}")
    return still


def _cannot_pack(
    model: PreTrainedModel,
    objective: Objective,
    rows: Sequence[Example],
    longest: int,
    device: torch.device,
    name: str,
    layout: Layout,
) -> str | None:
    """Why packed rows would not be exact for this model, or None. Sets the model's attention to ``name``."""
    inner = base(model)
    try:
        inner.set_attn_implementation(name)
        with torch.no_grad(), attention.watch() as seen:
            objective.loss(model, to_device(objective.collate(rows, layout), device))
    except (attention.CannotPack, ValueError, TypeError) as reason:
        return str(reason)
    if len(seen) != inner.config.num_hidden_layers:
        return f"it called attention {len(seen)} times in {inner.config.num_hidden_layers} layers"
    windows = [window for window in seen if window is not None and window < longest]
    if windows and name != varlen.NAME:
        return f"its attention slides over {min(windows)} tokens and the longest row has {longest}"
    return None


def _loss_and_gradients(
    model: PreTrainedModel,
    objective: Objective,
    rows: Sequence[Example],
    layout: Layout,
    device: torch.device,
) -> tuple[float, list[torch.Tensor]]:
    """Mean loss over the rows' units and its gradients; the plain path takes rows one at a time, so that nothing is padded."""
    groups = [rows] if layout.packed else [[row] for row in rows]
    batches = [objective.collate(group, layout) for group in groups]
    total = sum(objective.count(batch) for batch in batches)
    value = 0.0
    for batch in batches:
        with (
            torch.enable_grad()
        ):  # also for a caller without gradients: layers may go another way there for as few tokens
            loss, _ = objective.loss(model, to_device(batch, device))
        if loss.requires_grad:  # an evaluation trains nothing: only its loss is compared
            (loss / total * SCALE.get(model.dtype, 1.0)).backward()
        value += loss.item() / total
    gradients = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
    return value, gradients


def _difference(
    expected: tuple[float, list[torch.Tensor]],
    got: tuple[float, list[torch.Tensor]],
    dtype: torch.dtype,
    more: float = 1.0,
) -> str | None:
    """What is further apart than the network's ``dtype`` explains, or None. Not finite on both sides is the run's affair.

    ``more``: times the limits of half precision."""
    loss_limit, gradient_limit = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if dtype in (torch.bfloat16, torch.float16):
        loss_limit, gradient_limit = loss_limit * more, gradient_limit * more
    if not np.isfinite(expected[0]):
        return None
    loss = abs(expected[0] - got[0]) / max(abs(expected[0]), 1e-6)
    apart = (
        sum(float((a.float() - b.float()).square().sum()) for a, b in zip(expected[1], got[1], strict=True))
        ** 0.5
    )
    norm = sum(float(a.float().square().sum()) for a in expected[1]) ** 0.5
    gradient = apart / norm if norm else apart
    if loss <= loss_limit and gradient <= gradient_limit:
        return None
    return f"loss by {loss:.1e}, gradients by {gradient:.1e} of their size"


def _more(objective: Objective) -> float:
    return JUDGED if objective.traits.deterministic and objective.traits.head == "score" else 1.0


def _shorten(example: Example) -> Example:
    """The row's first tokens; all of them learnt when the cut left none to learn. What a head reads as a whole stays whole, but
    answers to a prompt."""
    if "answers" in example:
        return preference_batch.shorten(example, PROBE_TOKENS // 2, PROBE_TOKENS // 4)
    if "supervised" not in example:
        return example
    short = {name: np.array(values[:PROBE_TOKENS]) for name, values in example.items()}
    if not short["supervised"][1:].any():
        short["supervised"][:] = True
    return short
