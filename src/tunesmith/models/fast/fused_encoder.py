"""Faster layers of encoders on CPUs (bert, roberta, electra, distilbert), which ``fused_layers`` installs:

* attention: q, k and v as one product over stacked weights, and all segments of the row in one pass;
* mlp: the product as one function, since it may have a LoRA; our pass for GELU was no faster than torch's;
* output: the product, then residual and layer norm as one pass, with the module's own dropout between them;
* embeddings: the sum's last term and layer norm as one pass.
"""

from __future__ import annotations

from inspect import signature
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from tunesmith.models.fast import kernels, linear_products, self_check
from tunesmith.models.fast.autograd_context import Context, Gradients
from tunesmith.models.fast.bidirectional_attention import BidirectionalAttention
from tunesmith.models.fast.self_check import Arguments, Forward
from tunesmith.models.network import attribute, has_attributes, submodule


class AddNorm(torch.autograd.Function):
    """Layer norm (Ba et al. 2016) of x + more, both (tokens, width), with the sum rounded to their dtype."""

    @staticmethod
    def forward(
        ctx: Context[None], x: Tensor, more: Tensor, weight: Tensor, bias: Tensor, epsilon: float
    ) -> Tensor:
        total, y = torch.empty_like(x), torch.empty_like(x)
        mean, inverse = (torch.empty(len(x), dtype=torch.float32) for _ in range(2))
        given = (x, more, weight, bias)
        kernels.call("layer_norm", x.dtype, *given, total, y, mean, inverse, epsilon, *x.shape)
        ctx.save_for_backward(total, weight, mean, inverse)
        return y

    @staticmethod
    def backward(ctx: Context[None], grad: Tensor) -> Gradients:
        total, weight, mean, inverse = ctx.saved_tensors
        dtype, shape = total.dtype, total.shape
        grad, dx, dweight, dbias = grad.contiguous(), torch.empty_like(total), None, None
        kernels.call("layer_norm_backward", dtype, total, weight, grad, mean, inverse, dx, *shape)
        if any(ctx.needs_input_grad[2:4]):
            sums = torch.empty(2, shape[1], dtype=torch.float32)
            kernels.call("layer_norm_weights", dtype, total, grad, mean, inverse, *sums, *shape)
            dweight, dbias = sums.to(weight.dtype).unbind()
        return dx, dx, dweight, dbias, None


def add_norm(norm: nn.LayerNorm, x: Tensor, more: Tensor) -> Tensor:
    """Return ``norm(x + more)``, (..., width)."""
    if not x.dtype == more.dtype == norm.weight.dtype:
        normed: Tensor = norm(x + more)
        return normed
    flat = (term.reshape(-1, term.shape[-1]).contiguous() for term in (x, more))
    out: Tensor = AddNorm.apply(*flat, norm.weight, norm.bias, norm.eps)
    return out.view(x.shape)


class NormedSum(Protocol):
    """A module that adds and normalises: bert's embeddings, and its output layers (with ``dense``)."""

    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout
    dense: nn.Module
    word_embeddings: nn.Embedding
    token_type_embeddings: nn.Embedding
    position_embeddings: nn.Embedding


EMBEDDINGS = ("word_embeddings", "token_type_embeddings", "position_embeddings")


def _normed_sum(module: nn.Module, *names: str) -> NormedSum | None:
    """Return ``module`` if it has a layer norm that our pass can compute, and modules called ``names``."""
    norm = submodule(module, "LayerNorm")
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        return None
    # deberta-v2 has None for some embeddings
    known = len(norm.normalized_shape) == 1 and all(submodule(module, name) is not None for name in names)
    return cast(NormedSum, module) if known else None


def _attention(module: nn.Module) -> Forward | None:
    names = ("query", "key", "value") if has_attributes(module, "query") else ("q_lin", "k_lin", "v_lin")
    parts = [submodule(module, name) for name in names]
    heads, dim = attribute(module, "num_attention_heads", "n_heads"), attribute(module, "attention_head_size")
    if not isinstance(heads, int) or not isinstance(dim, int) or None in parts:
        return None
    if not has_attributes(module, "scaling", "dropout", "is_causal") or attribute(module, "is_causal"):
        return None
    last = attribute(module, "out_lin")
    out = None if last is None else linear_products.output_forward(last)
    qkv = None if last is not None and out is None else linear_products.stack_linears(parts)
    if qkv is None or any(base.out_features != heads * dim for base in qkv.bases):
        return None
    scale, dropout = float(attribute(module, "scaling")), attribute(module, "dropout")

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        segments: tuple[int, ...] | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        drops = module.training and dropout.p > 0
        cross = kwargs.get("encoder_hidden_states") is not None or kwargs.get("behind") is not None
        other = attention_mask is not None or past_key_values is not None or hidden_states.shape[0] != 1
        if segments is None or other or drops or cross:
            given = kwargs if past_key_values is None else {**kwargs, "past_key_values": past_key_values}
            return type(module).forward(
                module, hidden_states, attention_mask=attention_mask, segments=segments, **given
            )
        mixed: Tensor = BidirectionalAttention.apply(qkv(hidden_states[0]), (heads, heads, segments, scale))
        return (mixed if out is None else out(mixed)).unsqueeze(0), None

    return forward


def _mlp(module: nn.Module) -> Forward | None:
    activation, dense = attribute(module, "intermediate_act_fn"), attribute(module, "dense")
    up = linear_products.output_forward(dense) if callable(activation) and dense is not None else None
    return None if up is None else lambda hidden_states: activation(up(hidden_states))


def _output(module: nn.Module) -> Forward | None:
    layer = _normed_sum(module, "dense", "dropout")
    dense = None if layer is None else linear_products.output_forward(layer.dense)
    if layer is None or dense is None:
        return None

    def forward(hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return add_norm(layer.LayerNorm, layer.dropout(dense(hidden_states)), input_tensor)

    return forward


def _embeddings(module: nn.Module) -> Forward | None:
    layer = _normed_sum(module, *EMBEDDINGS, "dropout")
    if layer is None or "mask" in signature(type(module).forward).parameters:
        return None

    def forward(
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        embedded = layer.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None or token_type_ids is None:
            given = {"token_type_ids": token_type_ids, "position_ids": position_ids, **kwargs}
            return type(module).forward(module, inputs_embeds=embedded, **given)
        embedded = embedded + layer.token_type_embeddings(token_type_ids)
        places = layer.position_embeddings(position_ids).expand_as(embedded)
        return layer.dropout(add_norm(layer.LayerNorm, embedded, places))

    return forward


def _attention_input(module: nn.Module, dtype: torch.dtype) -> Arguments:
    return self_check.random_input(module, dtype)[0], {"segments": (5, 3)}


def _output_input(module: nn.Module, dtype: torch.dtype) -> Arguments:
    generator = self_check.seeded()
    shape = attribute(module, "LayerNorm").normalized_shape
    x, _ = self_check.random_input(module, dtype, generator)
    return (*x, torch.randn(1, 8, *shape, generator=generator).to(dtype)), {}


def _embeddings_input(module: nn.Module, dtype: torch.dtype) -> Arguments:
    generator = self_check.seeded()
    tables = [attribute(module, name) for name in EMBEDDINGS]
    drawn = [torch.randint(table.num_embeddings, (1, 8), generator=generator) for table in tables]
    return (), dict(zip(("input_ids", "token_type_ids", "position_ids"), drawn, strict=True))


KINDS: dict[str, self_check.LayerKind] = {
    "encoder attention": (_attention, _attention_input),
    "encoder mlp": (_mlp, self_check.random_input),
    "encoder output": (_output, _output_input),
    "encoder embeddings": (_embeddings, _embeddings_input),
}
