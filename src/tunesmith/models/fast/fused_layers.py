"""Faster forwards for a model's layers, put on the loaded instances; one of each structure is checked first.

* every linear layer with a plain LoRA: one autograd function that saves only x and x A^T;
* a linear layer with a bottleneck adapter: one product for both (fused_bottleneck.py);
* on a CPU the layers of encoders (fused_encoder.py), and the last layer of encoders and decoders (last_layer.py);
* on a CPU a trained embedding, whose gradient has only the rows that were read (weight_gradients.py);
* on a CPU with kernels.py: RMSNorm, SwiGLU, and attention with rotary embedding, with q/k/v and gate/up each
  as one product over stacked weights. The parameters become views of the stack: same names, same values.

``install`` replaces ``forward`` on module instances, never on a class, and returns a ``Fused`` that can
switch back. A module of another structure, or whose output differs on a random input, keeps its own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tunesmith.models.adapters import adapter_types
from tunesmith.models.adapters.virtual_tokens import PrefixCache
from tunesmith.models.fast import (
    fused_bottleneck,
    fused_encoder,
    kernels,
    last_layer,
    linear_products,
    self_check,
    weight_gradients,
)
from tunesmith.models.fast.autograd_context import Context, Gradients
from tunesmith.models.fast.rotary import rotary_attention
from tunesmith.models.fast.segments import most_keys
from tunesmith.models.fast.self_check import Arguments, Forward
from tunesmith.models.network import attribute, has_attributes


@dataclass
class Fused:
    """The replaced forwards; ``kinds`` counts them. ``disable`` and ``enable`` switch between old and new.

    ``rejected``: class of a layer -> why it keeps its own forward although it has the names of a known layer.
    """

    replaced: list[tuple[nn.Module, Forward]] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    def add(self, module: nn.Module, kind: str, forward: Forward) -> None:
        self.replaced.append((module, forward))
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def enable(self) -> None:
        for module, forward in self.replaced:
            module.forward = forward

    def disable(self) -> None:
        for module, _ in self.replaced:
            module.__dict__.pop("forward", None)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the layers' own forwards inside the ``with`` block."""
        self.disable()
        try:
            yield
        finally:
            self.enable()


def install(model: nn.Module, stack: bool = True) -> Fused:
    """Replace the forwards of ``model`` that have a fused version. Return the record of them, enabled.

    ``stack``: the memory of trained weights may be rearranged; if not, such layers keep their forward.
    """
    fused = Fused()
    covered: set[nn.Module] = set()
    weight = next((p for p in model.parameters() if p.dim() == 2 and p.is_floating_point()), None)
    dtype = weight.dtype if weight is not None and kernels.available(weight) else None
    checks = None if dtype is None else self_check.Checks(dtype)
    for module in list(model.modules()):
        found = None
        inside = module in covered and type(module) is nn.Embedding  # the layer around it looks up the rows
        if checks is not None and not inside and type(module).__name__ not in fused.rejected:
            found = _fused_forward(module, checks, stack, fused.rejected)
        if found is not None:
            covered.update(module.modules())
        elif module not in covered:
            found = _linear_forward(module)
        if found is not None:
            fused.add(module, *found)
    last = None if dtype is None else last_layer.find(model)
    if last is not None and dtype is not None:
        _restrict(last, dtype, fused)
    fused.enable()
    return fused


def _restrict(last: nn.Module, dtype: torch.dtype, fused: Fused) -> None:
    """Let the last layer compute only what a head reads.

    A decoder layer keeps its own forward if it computes more than its modules show (granite scales what it adds).
    """
    attention = attribute(last, "self_attn")
    replaced = next((forward for module, forward in fused.replaced if module is attention), None)
    kind, forward = last_layer.restricted(last, replaced)
    every = partial(forward, read=torch.arange(self_check.TOKENS))
    if attention is None or self_check.why_not(last, every, _layer_input, dtype) is None:
        fused.add(last, kind, forward)


def _fused_forward(
    module: nn.Module, checks: self_check.Checks, stack: bool, rejected: dict[str, str]
) -> tuple[str, Forward] | None:
    """Return kind and fused forward of a module; None if it has none.

    A class whose fused forward differs or fails is added to ``rejected``.
    """
    for kind, (make, arguments) in KINDS.items():
        if kind != "norm" and not stack and _trains_base_weights(module):
            continue
        forward = make(module)
        if forward is None:
            continue
        found = checks.why_not(module, forward, arguments)
        if found is None:
            return kind, forward
        rejected[type(module).__name__] = found
    return None


def _linear_forward(module: nn.Module) -> tuple[str, Forward] | None:
    """Return kind and forward of a linear layer with a LoRA or a bottleneck adapter."""
    is_lora = linear_products.is_lora(module)
    if not is_lora and not fused_bottleneck.is_bottleneck(module):
        return None
    forward = linear_products.output_forward(module)
    return None if forward is None else ("lora" if is_lora else "bottleneck", forward)


def _trains_base_weights(module: nn.Module) -> bool:
    """Return whether a weight inside is trained that belongs to no adapter."""
    trained = [name for name, weight in module.named_parameters() if weight.requires_grad]
    return any(not any(part in name for part in adapter_types.PREFIXES) for name in trained)


# ---------------------------------------------------------------------------------------------------- RMSNorm


class RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019). x (tokens, width), w (width,)."""

    @staticmethod
    def forward(ctx: Context[None], x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, inverse = rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Context[None], grad: Tensor) -> Gradients:
        x, weight, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        dx, dw = torch.empty_like(x), None
        kernels.call("rms_norm_backward", x.dtype, x, weight, grad, inverse, dx, x.shape[0], x.shape[1])
        if ctx.needs_input_grad[1]:
            dw = (grad.float() * x.float() * inverse[:, None]).sum(0).to(weight.dtype)
        return dx, dw, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return y (tokens, width) and 1 / rms (tokens,)."""
    y, inverse = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32)
    kernels.call("rms_norm", x.dtype, x, weight, y, inverse, epsilon, x.shape[0], x.shape[1])
    return y, inverse


_origins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Output of an RMSNorm -> its :class:`linear_products.Origin`, for the linear layers that read it."""


def norm_parts(module: nn.Module) -> tuple[nn.Parameter, float] | None:
    """Return weight and epsilon of a module that has the names of an RMSNorm."""
    epsilon, weight = attribute(module, "variance_epsilon", "eps"), attribute(module, "weight")
    named = type(module).__name__.endswith("RMSNorm")
    return (
        (weight, epsilon)
        if named and isinstance(epsilon, float) and isinstance(weight, nn.Parameter)
        else None
    )


def _norm(module: nn.Module) -> Forward | None:
    found = norm_parts(module)
    if found is None:
        return None
    weight, epsilon = found

    def forward(x: Tensor) -> Tensor:
        if x.dtype != weight.dtype:
            return type(module).forward(module, x)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y: Tensor = RMSNorm.apply(rows, weight, epsilon).view(x.shape)
        if torch.is_grad_enabled():
            remake = partial(rms_norm, weight=weight.detach(), epsilon=epsilon)
            _origins[y] = linear_products.Origin(rows.detach(), lambda x: remake(x)[0])
        return y

    return forward


# ----------------------------------------------------------------------------------------------------- SwiGLU


class SwiGLU(torch.autograd.Function):
    """(tokens, 2 width) holding gate and up -> silu(gate) * up, (tokens, width) (Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Context[None], both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return swiglu(both)

    @staticmethod
    def backward(ctx: Context[None], grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        tokens, width = both.shape[0], both.shape[1] // 2
        out = torch.empty_like(both)
        tensors = (both, both[:, width:], grad.contiguous(), out, out[:, width:])
        kernels.call("swiglu_backward", both.dtype, *tensors, tokens, width, 2 * width)
        return out


def swiglu(both: Tensor) -> Tensor:
    tokens, width = both.shape[0], both.shape[1] // 2
    y = both.new_empty(tokens, width)
    kernels.call("swiglu", both.dtype, both, both[:, width:], y, tokens, width, 2 * width)
    return y


def swiglu_parts(module: nn.Module) -> list[nn.Module] | None:
    """Return the layers gate, up and down of a module that has the names of a SwiGLU."""
    parts = [attribute(module, name) for name in ("gate_proj", "up_proj", "down_proj")]
    known = type(attribute(module, "act_fn")).__name__ in ("SiLUActivation", "SiLU")
    return parts if known and None not in parts else None


def _mlp(module: nn.Module) -> Forward | None:
    parts = swiglu_parts(module)
    if parts is None:
        return None
    down = linear_products.output_forward(parts[2])
    both = None if down is None else linear_products.stack_linears(parts[:2])
    if down is None or both is None or both.bases[0].out_features != both.bases[1].out_features:
        return None

    def forward(x: Tensor) -> Tensor:
        gate_up = both(x.reshape(-1, x.shape[-1]), _origins.get(x))
        # gate_up is kept for the gradient of SwiGLU, whose output would take half as much memory again
        origin = linear_products.Origin(gate_up.detach(), swiglu)
        return down(SwiGLU.apply(gate_up).view(*x.shape[:-1], -1), origin=origin)

    return forward


# -------------------------------------------------------------------------------------------------- attention


def _attention(module: nn.Module) -> Forward | None:
    parts = [attribute(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    unknown = has_attributes(module, "q_norm") or not has_attributes(module, "scaling", "head_dim")
    if unknown or any(part is None for part in parts):
        return None
    out = linear_products.output_forward(parts[3])
    qkv = None if out is None else linear_products.stack_linears(parts[:3])
    if out is None or qkv is None:
        return None
    dim, scale = int(attribute(module, "head_dim")), float(attribute(module, "scaling"))
    heads, kv_heads = qkv.bases[0].out_features // dim, qkv.bases[1].out_features // dim
    # mistral's config alone has its window
    windowed = module if has_attributes(module, "sliding_window") else attribute(module, "config")

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        segments: tuple[int, ...] | None = None,
        behind: tuple[int, ...] | None = None,
        only: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        prefix = past_key_values if isinstance(past_key_values, PrefixCache) else None
        other = attention_mask is not None or past_key_values is not prefix or hidden_states.shape[0] != 1
        other = other or position_embeddings is None or position_embeddings[0].shape[-1] != dim
        other = other or (prefix is not None and behind is not None)
        window, virtual = attribute(windowed, "sliding_window"), 0 if prefix is None else len(prefix.rows)
        if segments is not None and window is not None:
            other = other or window < most_keys(segments, behind) + virtual
        if other or segments is None or position_embeddings is None:
            kwargs |= {"attention_mask": attention_mask, "past_key_values": past_key_values}
            kwargs |= {"position_embeddings": position_embeddings, "segments": segments, "behind": behind}
            given = type(module).forward(module, hidden_states, **kwargs)
            return given if only is None else (given[0].index_select(1, only), None)
        x = hidden_states[0]
        cosine, sine = (table[0].to(x.dtype).contiguous() for table in position_embeddings)
        projected = qkv(x, _origins.get(hidden_states))
        mixed = rotary_attention(projected, cosine, sine, heads, kv_heads, segments, scale, prefix, behind)
        return out(mixed if only is None else mixed[only]).unsqueeze(0), None

    return forward


def _layer_input(layer: nn.Module, dtype: torch.dtype) -> Arguments:
    return _attention_input(attribute(layer, "self_attn"), dtype)


def _attention_input(module: nn.Module, dtype: torch.dtype) -> Arguments:
    generator = self_check.seeded()
    x, _ = self_check.random_input(module, dtype, generator)
    angle = torch.randn(1, 8, int(attribute(module, "head_dim")) // 2, generator=generator)
    table = torch.cat([angle, angle], dim=-1)
    rotations = table.cos().to(dtype), table.sin().to(dtype)
    return x, {"position_embeddings": rotations, "attention_mask": None, "segments": (5, 3)}


def _embedding(module: nn.Module) -> Forward | None:
    """A trained table of tokens, each row of which has its own gradient."""
    if type(module) is not nn.Embedding or not module.weight.requires_grad:
        return None
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None

    def forward(ids: Tensor) -> Tensor:
        rows: Tensor = weight_gradients.ReadRows.apply(ids, module.weight, module.padding_idx)
        return rows

    return forward


def _some_ids(module: nn.Module, dtype: torch.dtype) -> Arguments:
    return (torch.arange(self_check.TOKENS)[None] % attribute(module, "num_embeddings"),), {}


KINDS: dict[str, self_check.LayerKind] = {
    "embedding": (_embedding, _some_ids),
    "attention": (_attention, _attention_input),
    "mlp": (_mlp, self_check.random_input),
    "norm": (_norm, self_check.random_input),
    **fused_encoder.KINDS,
}
