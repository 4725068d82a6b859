"""Faster layers of encoders on CPUs (bert, roberta, electra, distilbert): what fused.py puts on the instances, kind by kind.

* attention: q, k and v as one product over stacked weights, and all segments of the row in one pass;
* mlp: the product as one function, for it may have a LoRA; GELU is torch's, which no pass of ours was faster than;
* output: the product, then residual and layer norm as one pass, with the module's own dropout between them;
* embeddings: the sum's last term and layer norm as one pass.

The last layer is a kind of its own: where a head reads few outputs (the first of each row), nothing behind its attention is
computed for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from tunesmith.models.fast import kernels, linear_products
from tunesmith.models.heads.bidirectional_attention import BothWays


class AddNorm(torch.autograd.Function):
    """Layer norm of x + more, both (tokens, width) (Ba et al. 2016). The sum is rounded to their dtype, as torch does it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        more: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        epsilon: float,
    ) -> torch.Tensor:
        rows, width = x.shape
        total, y = torch.empty_like(x), torch.empty_like(x)
        mean, inverse = (torch.empty(rows, dtype=torch.float32) for _ in range(2))
        kernels.call(
            "layer_norm", x.dtype, x, more, weight, bias, total, y, mean, inverse, epsilon, rows, width
        )
        ctx.save_for_backward(total, weight, mean, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        total, weight, mean, inverse = ctx.saved_tensors
        rows, width = total.shape
        grad, dx, dweight, dbias = grad.contiguous(), torch.empty_like(total), None, None
        kernels.call("layer_norm_backward", total.dtype, total, weight, grad, mean, inverse, dx, rows, width)
        if any(ctx.needs_input_grad[2:4]):
            sums = torch.empty(2, width, dtype=torch.float32)
            kernels.call(
                "layer_norm_weights", total.dtype, total, grad, mean, inverse, sums[0], sums[1], rows, width
            )
            dweight, dbias = sums.to(weight.dtype).unbind()
        return dx, dx, dweight, dbias, None


def add_norm(norm: nn.LayerNorm, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """``norm(x + more)``, (..., width)."""
    if not x.dtype == more.dtype == norm.weight.dtype:
        normed: torch.Tensor = norm(x + more)
        return normed
    flat = (one.reshape(-1, one.shape[-1]).contiguous() for one in (x, more))
    out: torch.Tensor = AddNorm.apply(*flat, norm.weight, norm.bias, norm.eps)
    return out.view(x.shape)


def _is_norm(norm: Any) -> bool:
    return (
        type(norm) is nn.LayerNorm
        and norm.weight is not None
        and norm.bias is not None
        and len(norm.normalized_shape) == 1
    )


def _attention(module: Any) -> Callable[..., Any] | None:
    names = ("query", "key", "value") if hasattr(module, "query") else ("q_lin", "k_lin", "v_lin")
    parts = [getattr(module, name, None) for name in names]
    heads = getattr(module, "num_attention_heads", getattr(module, "n_heads", None))
    dim = getattr(module, "attention_head_size", None)
    if any(part is None for part in parts) or not isinstance(heads, int) or not isinstance(dim, int):
        return None
    if getattr(module, "is_causal", True) or not all(
        hasattr(module, name) for name in ("scaling", "dropout")
    ):
        return None
    last = getattr(module, "out_lin", None)
    out = None if last is None else linear_products.output(last)
    qkv = None if last is not None and out is None else linear_products.linears(parts)
    if qkv is None or any(base.out_features != heads * dim for base in qkv.bases):
        return None
    scale = float(module.scaling)

    def forward(
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        segments: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        drops = module.training and module.dropout.p > 0
        cross = kwargs.get("encoder_hidden_states") is not None or kwargs.get("behind") is not None
        other = attention_mask is not None or past_key_values is not None or hidden_states.shape[0] != 1
        if segments is None or other or drops or cross:
            given = kwargs if past_key_values is None else {**kwargs, "past_key_values": past_key_values}
            return type(module).forward(
                module, hidden_states, attention_mask=attention_mask, segments=segments, **given
            )
        mixed: torch.Tensor = BothWays.apply(qkv(hidden_states[0]), heads, heads, segments, scale)
        return (mixed if out is None else out(mixed)).unsqueeze(0), None

    return forward


def _mlp(module: Any) -> Callable[..., Any] | None:
    activation = getattr(module, "intermediate_act_fn", None)
    up = linear_products.output(module.dense) if callable(activation) and hasattr(module, "dense") else None
    if up is None or activation is None:
        return None
    return lambda hidden_states: activation(up(hidden_states))


def _output(module: Any) -> Callable[..., Any] | None:
    if (
        not _is_norm(getattr(module, "LayerNorm", None))
        or not hasattr(module, "dense")
        or not hasattr(module, "dropout")
    ):
        return None
    dense = linear_products.output(module.dense)
    if dense is None:
        return None

    def forward(hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return add_norm(module.LayerNorm, module.dropout(dense(hidden_states)), input_tensor)

    return forward


def _embeddings(module: Any) -> Callable[..., Any] | None:
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings", "dropout")
    known = all(
        isinstance(getattr(module, name, None), nn.Module) for name in names
    )  # deberta-v2 has None for some
    if (
        not _is_norm(getattr(module, "LayerNorm", None))
        or not known
        or "mask" in signature(type(module).forward).parameters
    ):
        return None

    def forward(
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        embedded = module.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None or token_type_ids is None:
            given = {"token_type_ids": token_type_ids, "position_ids": position_ids, **kwargs}
            return type(module).forward(module, inputs_embeds=embedded, **given)
        embedded = embedded + module.token_type_embeddings(token_type_ids)
        places = module.position_embeddings(position_ids).expand_as(embedded)
        return module.dropout(add_norm(module.LayerNorm, embedded, places))

    return forward


KINDS: dict[str, Callable[[Any], Callable[..., Any] | None]] = {
    "encoder attention": _attention,
    "encoder mlp": _mlp,
    "encoder output": _output,
    "encoder embeddings": _embeddings,
}
"""What makes the forward of each kind, or None for a module of another."""


def sample(kind: str, module: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that a module of ``kind`` can be tried with."""
    generator = torch.Generator().manual_seed(0)
    if kind == "encoder embeddings":
        sizes = [
            getattr(module, name).num_embeddings
            for name in ("word_embeddings", "token_type_embeddings", "position_embeddings")
        ]
        drawn = [torch.randint(size, (1, 8), generator=generator) for size in sizes]
        return (), dict(zip(("input_ids", "token_type_ids", "position_ids"), drawn, strict=True))
    width = next(one for one in module.modules() if hasattr(one, "in_features")).in_features
    x = torch.randn(1, 8, width, generator=generator).to(dtype)
    if kind == "encoder output":
        return (x, torch.randn(1, 8, *module.LayerNorm.normalized_shape, generator=generator).to(dtype)), {}
    return (x,), ({"segments": (5, 3)} if kind == "encoder attention" else {})


# ---------------------------------------------------------------------------------------------------------- the last layer


@dataclass(eq=False)
class Last:
    """The forward of an encoder's last layer. With ``read`` (places,) it gives the outputs at these places of its flattened
    tokens alone, (1, places, width); its products behind attention are then done for them alone.
    """

    layer: Any

    def __call__(
        self, hidden_states: torch.Tensor, *args: Any, read: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        layer = self.layer
        run = type(layer).forward
        if read is None:
            return run(layer, hidden_states, *args, **kwargs)
        if (
            hidden_states.shape[0] != 1
            or kwargs.get("segments") is None
            or (layer.training and layer.gradient_checkpointing)
        ):
            return run(layer, hidden_states, *args, **kwargs).flatten(0, 1)[None].index_select(1, read)
        mixed = layer.attention.self(hidden_states, **kwargs)[0]
        middle = layer.attention.output(mixed.index_select(1, read), hidden_states.index_select(1, read))
        return layer.output(layer.intermediate(middle), middle)


def last_layer(model: nn.Module) -> Any | None:
    """The last layer of an encoder whose layers are those of bert, or None."""
    found = [getattr(module, "layer", None) for module in model.modules()]
    stacks = [layers for layers in found if isinstance(layers, nn.ModuleList) and len(layers)]
    if len(stacks) != 1:
        return None
    last: Any = stacks[0][-1]
    names = ("attention.self", "attention.output", "intermediate", "output")
    known = all(_has(last, name) for name in names) and not getattr(last, "is_decoder", True)
    return last if known and hasattr(last, "gradient_checkpointing") else None


def reads_early(model: nn.Module) -> bool:
    """Whether the body of ``model`` takes ``read``."""
    last = last_layer(model)
    return last is not None and isinstance(vars(last).get("forward"), Last)


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return isinstance(module, nn.Module)
