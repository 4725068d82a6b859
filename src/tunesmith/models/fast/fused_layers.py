"""Faster forms of a model's layers, put on the instance we loaded; each is tried before it is used (here, or by train.fast_path).

* every linear layer with a plain LoRA on it: one autograd function that keeps only x and x A^T (peft keeps more and casts);
* a linear layer with a bottleneck adapter on it: one product for both (fused_bottleneck.py);
* on a CPU the layers of encoders (fused_encoder.py);
* on a CPU with the fused passes of kernels.py: RMSNorm, SwiGLU, and attention with rotary embedding, with q/k/v and gate/up each
  as one matrix product over stacked weights (the parameters become views of the stack; their names and values stay).

``install`` replaces ``forward`` on module instances, never on a class, and returns a ``Fused`` that can switch back. A module
whose layout is not exactly understood, or whose output differs on a random input, keeps its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tunesmith.models.adapters import adapter_types
from tunesmith.models.adapters.virtual_tokens import Prefix
from tunesmith.models.fast import fused_bottleneck, fused_encoder, kernels, linear_products, self_check
from tunesmith.models.fast.rotary import rotary_attention
from tunesmith.models.fast.segments import longest


@dataclass
class Fused:
    """The replaced forwards: ``kinds`` counts them by name; ``disable`` and ``enable`` switch between old and new."""

    replaced: list[tuple[nn.Module, Callable[..., Any]]] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)

    def enable(self) -> None:
        for module, forward in self.replaced:
            module.forward = forward

    def disable(self) -> None:
        for module, _ in self.replaced:
            module.__dict__.pop("forward", None)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """For as long as the layers' own forwards are wanted."""
        self.disable()
        try:
            yield
        finally:
            self.enable()


def install(model: nn.Module, stack: bool = True) -> Fused:
    """Replace what can be replaced in ``model`` and return the record of it, enabled.

    ``stack``: whether the memory of trained weights is ours to arrange. If not, layers that would hold on to it are left.
    """
    fused = Fused()
    rejected: set[type] = set()
    weight = next((p for p in model.parameters() if p.dim() == 2 and p.is_floating_point()), None)
    passes = weight if weight is not None and kernels.available(weight) else None
    inside: set[nn.Module] = set()
    for module in list(model.modules()):
        forward: Callable[..., Any] | None = None
        if passes is not None and type(module) not in rejected:
            for kind, make in {
                "attention": _attention,
                "mlp": _mlp,
                "norm": _norm,
                **fused_encoder.KINDS,
            }.items():
                if kind != "norm" and not stack and _trains_its_own(module):
                    continue
                forward = make(module)
                if forward is not None:
                    given = (
                        fused_encoder.sample(kind, module, passes.dtype)
                        if kind in fused_encoder.KINDS
                        else None
                    )
                    if not self_check.equal(kind, module, forward, passes.dtype, given):
                        rejected.add(type(module))
                        forward = None
                        continue
                    inside.update(module.modules())
                    break
        if (
            forward is None
            and module not in inside
            and linear_products.is_lora(module)
            and (linear := linear_products.linears([module])) is not None
        ):
            kind, forward = "lora", linear_products.forward_of(linear)
        if forward is None and module not in inside and fused_bottleneck.is_bottleneck(module):
            kind, forward = "bottleneck", fused_bottleneck.projection(module)
        if forward is not None:
            fused.replaced.append((module, forward))
            fused.kinds[kind] = fused.kinds.get(kind, 0) + 1
    last = fused_encoder.last_layer(model)
    if passes is not None and last is not None:
        fused.replaced.append((last, fused_encoder.Last(last)))
        fused.kinds["encoder last layer"] = 1
    fused.enable()
    return fused


def _trains_its_own(module: nn.Module) -> bool:
    """Whether a weight inside is trained that is no adapter's."""
    named = module.named_parameters()
    return any(
        weight.requires_grad
        for name, weight in named
        if not any(part in name for part in adapter_types.PREFIXES)
    )


# ------------------------------------------------------------------------------------------------------------ RMSNorm


class RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019). x (tokens, width), w (width,)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        y, inverse = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32)
        kernels.call("rms_norm", x.dtype, x, weight, y, inverse, epsilon, x.shape[0], x.shape[1])
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        dx = torch.empty_like(x)
        kernels.call("rms_norm_backward", x.dtype, x, weight, grad, inverse, dx, x.shape[0], x.shape[1])
        dw = (
            (grad.float() * x.float() * inverse[:, None]).sum(0).to(weight.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        return dx, dw, None


def _norm(module: nn.Module) -> Callable[..., Any] | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if (
        not type(module).__name__.endswith("RMSNorm")
        or not isinstance(epsilon, float)
        or not isinstance(weight, nn.Parameter)
    ):
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != weight.dtype:
            return type(module).forward(module, x)
        return RMSNorm.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight, epsilon).view(x.shape)

    return forward


# -------------------------------------------------------------------------------------------------------------- SwiGLU


class SwiGLU(torch.autograd.Function):
    """(tokens, 2 width) holding gate and up -> silu(gate) * up, (tokens, width) (Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        tokens, width = both.shape[0], both.shape[1] // 2
        y = both.new_empty(tokens, width)
        kernels.call("swiglu", both.dtype, both, both[:, width:], y, tokens, width, 2 * width)
        ctx.save_for_backward(both)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        tokens, width = both.shape[0], both.shape[1] // 2
        out = torch.empty_like(both)
        kernels.call(
            "swiglu_backward",
            both.dtype,
            both,
            both[:, width:],
            grad.contiguous(),
            out,
            out[:, width:],
            tokens,
            width,
            2 * width,
        )
        return out


def _mlp(module: nn.Module) -> Callable[..., Any] | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(part is None for part in parts) or type(getattr(module, "act_fn", None)).__name__ not in (
        "SiLUActivation",
        "SiLU",
    ):
        return None
    down = linear_products.output(parts[2])
    both = linear_products.linears(parts[:2]) if down is not None else None
    if both is None or down is None or both.bases[0].out_features != both.bases[1].out_features:
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        return down(SwiGLU.apply(both(x.reshape(-1, x.shape[-1]))).view(*x.shape[:-1], -1))

    return forward


# ----------------------------------------------------------------------------------------------------------- attention


def _attention(module: Any) -> Callable[..., Any] | None:
    parts = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    if any(part is None for part in parts) or hasattr(module, "q_norm") or not hasattr(module, "scaling"):
        return None
    out = linear_products.output(parts[3])
    qkv = linear_products.linears(parts[:3]) if out is not None else None
    if qkv is None or out is None:
        return None
    dim, scale, config = module.head_dim, float(module.scaling), getattr(module, "config", None)
    heads, kv_heads = qkv.bases[0].out_features // dim, qkv.bases[1].out_features // dim

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        segments: tuple[int, ...] | None = None,
        behind: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        window = getattr(
            module, "sliding_window", getattr(config, "sliding_window", None)
        )  # mistral's is the config's alone
        prefix = past_key_values if isinstance(past_key_values, Prefix) else None
        most = (
            0 if segments is None else longest(segments, behind) + (0 if prefix is None else len(prefix.rows))
        )
        other = attention_mask is not None or past_key_values is not prefix or hidden_states.shape[0] != 1
        other = other or (prefix is not None and behind is not None)
        if other or segments is None or position_embeddings is None or (window is not None and window < most):
            return type(module).forward(
                module,
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                segments=segments,
                behind=behind,
                **kwargs,
            )
        x = hidden_states[0]
        cosine, sine = (table[0].to(x.dtype).contiguous() for table in position_embeddings)
        mixed = rotary_attention(qkv(x), cosine, sine, heads, kv_heads, segments, scale, prefix, behind)
        return out(mixed).unsqueeze(0), None

    return forward
