"""Forwards of a network's last layer that compute only the hidden states which a head reads.

A reward or a class is read at one position of a row. Everything after the last attention, most of the layer, is then
computed for these positions alone. ``fused_layers`` installs the forwards, for layers like bert's and like llama's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

from torch import Tensor, nn

from tunesmith.models.fast.self_check import Forward
from tunesmith.models.network import attribute, has_attributes, submodule

if TYPE_CHECKING:
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

ENCODER_SHARE, DECODER_SHARE = 1 / 2, 1 / 8
"""Largest share of the positions that is read alone. The loss of a language model reads more: there the whole layer costs a
hundredth more, and its sums are bit for bit those of a layer that the backward pass computes again."""
DECODER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""Modules of a decoder layer that computes what llama's does. One with more or fewer computes something else."""


@dataclass(eq=False)
class EncoderForward:
    """The forward of a last layer like bert's, which can be restricted to the positions ``read`` (n,).

    It then returns (1, n, width), and computes everything after attention for these positions alone.
    """

    layer: BertLayer

    def __call__(
        self, hidden_states: Tensor, *args: object, read: Tensor | None = None, **kwargs: object
    ) -> Tensor:
        if read is None or not _is_packed(self.layer, hidden_states, kwargs):
            return _whole(self.layer, hidden_states, read, *args, **kwargs)
        layer = self.layer
        mixed = layer.attention.self(hidden_states, **kwargs)[0]
        middle = layer.attention.output(mixed.index_select(1, read), hidden_states.index_select(1, read))
        return layer.output(layer.intermediate(middle), middle)


@dataclass(eq=False)
class DecoderForward:
    """The same of a last layer like llama's. ``attention``: the fused forward of its attention, if it has one, whose
    output projection can be restricted as well."""

    layer: LlamaDecoderLayer
    attention: Forward | None

    def __call__(
        self, hidden_states: Tensor, *args: object, read: Tensor | None = None, **kwargs: object
    ) -> Tensor:
        if read is None or args or not _is_packed(self.layer, hidden_states, kwargs):
            return _whole(self.layer, hidden_states, read, *args, **kwargs)
        layer, normed = self.layer, self.layer.input_layernorm(hidden_states)
        if self.attention is None:
            mixed = layer.self_attn(hidden_states=normed, **kwargs)[0].index_select(1, read)
        else:
            mixed = self.attention(hidden_states=normed, only=read, **kwargs)[0]
        middle: Tensor = hidden_states.index_select(1, read) + mixed
        out: Tensor = middle + layer.mlp(layer.post_attention_layernorm(middle))
        return out


LastLayerForward: TypeAlias = EncoderForward | DecoderForward


def _is_packed(layer: nn.Module, hidden_states: Tensor, kwargs: dict[str, object]) -> bool:
    """Return whether this is a packed row whose layer is not computed again in the backward pass."""
    recomputes = layer.training and bool(attribute(layer, "gradient_checkpointing"))
    return hidden_states.shape[0] == 1 and kwargs.get("segments") is not None and not recomputes


def _whole(
    layer: nn.Module, hidden_states: Tensor, read: Tensor | None, *args: object, **kwargs: object
) -> Tensor:
    """Return the layer's own forward, at the positions ``read`` if they are given."""
    out: Tensor = type(layer).forward(layer, hidden_states, *args, **kwargs)
    return out if read is None else out.flatten(0, 1)[None].index_select(1, read)


def find(model: nn.Module) -> nn.Module | None:
    """Return the last layer of a network with one stack of layers like bert's or like llama's, or None."""
    for name, is_known in (("layer", _is_encoder), ("layers", _is_decoder)):
        stacks = [submodule(module, name) for module in model.modules()]
        stacks = [layers for layers in stacks if isinstance(layers, nn.ModuleList) and len(layers)]
        if len(stacks) == 1 and is_known(stacks[0][-1]):
            return cast(nn.Module, stacks[0][-1])
    return None


def restricted(last: nn.Module, attention: Forward | None) -> tuple[str, LastLayerForward]:
    """Return kind and forward of a layer that :func:`find` returned. ``attention``: the fused forward of its attention."""
    if _is_encoder(last):
        return "encoder last layer", EncoderForward(cast("BertLayer", last))
    return "last layer", DecoderForward(cast("LlamaDecoderLayer", last), attention)


def most_read(model: nn.Module) -> float:
    """Return the largest share of its positions that the body of ``model`` takes as ``read``; 0 if it takes none."""
    last = find(model)
    forward = None if last is None else vars(last).get("forward")
    if isinstance(forward, EncoderForward):
        return ENCODER_SHARE
    return DECODER_SHARE if isinstance(forward, DecoderForward) else 0.0


def _is_encoder(layer: nn.Module) -> bool:
    attention = submodule(layer, "attention")
    parts = [(attention, "self"), (attention, "output"), (layer, "intermediate"), (layer, "output")]
    if any(owner is None or submodule(owner, name) is None for owner, name in parts):
        return False
    return has_attributes(layer, "is_decoder", "gradient_checkpointing") and not layer.is_decoder


def _is_decoder(layer: nn.Module) -> bool:
    return {name for name, _ in layer.named_children()} == DECODER_PARTS
