"""One decoding step of a llama, or a pass over pieces of prompts, as one call of C, for any number of rows.

Eager torch runs about forty operations a layer in a step. With few rows, starting them takes longer than the
arithmetic. With many, torch copies and converts between the products as long as it multiplies.
The step supports networks of llama's structure (llama, mistral, qwen2, qwen3 and similar) without an adapter
or with LoRAs, on a CPU. The first result of each kind of step is compared with that
of the model's own forward pass (``choose_pass``, ``SlotPass``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith import machine
from tunesmith.models.fast import attention, kernels
from tunesmith.models.generate.row_adapters import LoraStack
from tunesmith.models.generate.slot_cache import SlotCache
from tunesmith.models.load import huge_pages
from tunesmith.models.network import attribute, has_attributes, sliding_window, submodule, without_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KERNEL_ROWS = (4, 15)
"""With more rows than each, the C step multiplies in another way (FEW and ALONG in kernels_products.c)."""
PROMPT_TOKENS = 128
"""With more tokens, the model's own forward is faster where C does not compute attention in blocks."""
COPIED_SLOTS = 32
"""With more slots, decoding reads fp32 weights as they are: products take the time, and copies would take memory next to
the keys and values of many rows. 64 rows took 124 ms with copies and 131 without (AVX2), 16 rows 35 and 43."""
PANEL = 32
"""Copies have room for a multiple of so many outputs: the larger PANEL of kernels_products.c."""
SCALE_BYTES = 4
"""Each output of an int8 copy has its scale, fp32, after the weights."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


DecodeWeights: TypeAlias = Literal["stored", "int8"]
"""The weights that decoding reads: as they are stored, or rounded to int8 with a scale for each output."""


@dataclass(frozen=True)
class DecodeStep:
    """The parts of a network of llama's structure. ``layers``: the tensors of each, None for one it lacks.

    ``products``: the linear layers of each layer, in the order of kernels_decode.c; they may have LoRAs.
    """

    core: PreTrainedModel
    layers: tuple[tuple[Tensor | None, ...], ...]
    products: tuple[tuple[nn.Module, ...], ...]
    norm: Tensor
    head: Tensor
    heads: int
    kv_heads: int
    dim: int
    scale: float
    epsilon: float
    window: int

    panels: Mapping[int, Tensor] = field(default_factory=dict)
    """Copies of the matrices, by id, laid out as kernels_products.c says; empty if these are read as they are."""
    weights: DecodeWeights = "stored"
    """The numbers in the copies: those of the matrices in bf16, or these rounded to int8."""

    @property
    def matrices(self) -> list[Tensor]:
        """The weights of all products."""
        return [x for layer in self.layers for x in layer if x is not None and x.dim() == 2] + [self.head]

    @property
    def linears(self) -> list[nn.Module]:
        """The layers of these weights, without their LoRAs."""
        head = self.core.get_output_embeddings()
        assert head is not None
        return [_base(one) for products in self.products for one in products] + [head]

    def takes(self, tokens: int, capacity: int) -> bool:
        """Return whether this step is the faster way to run so many tokens of prompts, in slots of that ``capacity``."""
        in_blocks = (
            attention.in_c(torch.empty(self.dim, dtype=self.norm.dtype)) and kernels.vector_floats() == 8
        )
        return tokens <= PROMPT_TOKENS or (in_blocks and not 0 < self.window < capacity)

    def packed(self) -> DecodeStep:
        """Return a step that reads bf16 copies of its fp32 matrices: half the bytes, and the same numbers.

        Weights that were saved in bf16 and compute in fp32 lose nothing. This step is returned if a number is no
        bf16 number, or if the copies would take too much of the free memory.
        """
        if self.head.dtype is not torch.float32:
            return self
        parts = _room([2 * _padded(matrix) * matrix.shape[1] for matrix in self.matrices])
        panels, exact = {}, torch.empty(1, dtype=torch.int64)
        for matrix, part in zip(self.matrices, parts, strict=False):
            kernels.call("pack_panels", None, matrix, part, *matrix.shape, exact)
            if not exact:
                return self
            panels[id(matrix)] = part
        return replace(self, panels=panels)

    def in_int8(self) -> DecodeStep:
        """Return a step that reads int8 copies of its matrices; this step, if they would take too much memory."""
        parts = _room([_padded(matrix) * (matrix.shape[1] + SCALE_BYTES) for matrix in self.matrices])
        panels = {}
        for matrix, part in zip(self.matrices, parts, strict=False):
            kernels.call("pack_int8", matrix.dtype, matrix, part, *matrix.shape)
            panels[id(matrix)] = part
        return replace(self, panels=panels, weights="int8") if panels else self

    def __call__(
        self,
        ids: Tensor,
        cache: SlotCache,
        loras: LoraStack | None = None,
        keep: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """Run the tokens ``ids`` (tokens,) of a pass that ``cache`` has begun; return logits, fp32 (read, vocabulary).

        ``last``: the tokens whose logits are read, (read,) in ascending order; None = all. ``keep``: the ranks of
        ``loras`` that each token keeps, fp32 (tokens, ranks); None = all.
        """
        body = self.core.base_model
        x: Tensor = body.embed_tokens(ids)
        cosine, sine = body.rotary_emb(x[None].float(), position_ids=cache.place_of_token[None])
        x = x.float().contiguous()
        pointers = self._pointers(cache, loras)
        gate = self.layers[0][-3]
        assert gate is not None
        read = len(ids) if last is None else len(last)
        sizes = np.array((
            len(ids), len(self.layers), x.shape[1], self.heads, self.kv_heads, self.dim, gate.shape[0],
            self.head.shape[0], cache.capacity, self.window, 0 if loras is None else sum(loras.ranks), read,
        ))  # fmt: skip
        logits = torch.empty(read, self.head.shape[0])
        tables = [table[0].float().contiguous() for table in (cosine, sine)]
        arrays = pointers.ctypes.data, sizes.ctypes.data
        places = cache.slot_of_token, cache.place_of_token
        name, dtype = ("decode_step_mixed", None) if self.panels else ("decode_step", self.norm.dtype)
        if self.weights == "int8":
            name, dtype = "decode_step_int8", self.norm.dtype
        head = self.panels.get(id(self.head), self.head)
        kernels.call_in_memory(
            name, dtype, x, *arrays, self.norm, head, *tables, *places,
            0 if last is None else last, 0 if keep is None else keep, logits, self.epsilon, self.scale,
        )  # fmt: skip
        return logits

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, list[Tensor]]:
        """The pointers of all layers, int64 (layers, fields), without those that may change; their places, and tensors.

        Copies stay where they are as long as this step. Any other tensor may move, because training may replace it.
        """
        table = np.zeros((len(self.layers), len(self.layers[0]) + 2 + 2 * len(self.products[0])), np.int64)
        places, tensors = [], []
        for number, layer in enumerate(self.layers):
            for place, tensor in enumerate(layer):
                if tensor is not None and id(tensor) in self.panels:
                    table[number, place] = self.panels[id(tensor)].data_ptr()
                elif tensor is not None:
                    places.append(number * table.shape[1] + place)
                    tensors.append(tensor)
        return table, np.array(places), tensors

    def _pointers(self, cache: SlotCache, loras: LoraStack | None) -> np.ndarray:
        """Return the pointers of each layer in the order of kernels_decode.c."""
        table, places, tensors = self._table
        pointers, keys = table.copy(), len(self.layers[0])
        pointers.reshape(-1)[places] = [tensor.data_ptr() for tensor in tensors]
        pointers[:, keys] = [tensor.data_ptr() for tensor in cache.keys]
        pointers[:, keys + 1] = [tensor.data_ptr() for tensor in cache.values]
        if loras is not None:
            factors = loras.factors_in(self.norm.dtype)
            pointers[:, keys + 2 :] = [
                [0 if x is None else x.data_ptr() for one in products for x in factors.get(one, (None, None))]
                for products in self.products
            ]
        return pointers


def _padded(matrix: Tensor) -> int:
    """Return the outputs of a copy of ``matrix``, padding included."""
    return -(-matrix.shape[0] // PANEL) * PANEL


def _room(sizes: Sequence[int]) -> Sequence[Tensor]:
    """Return memory for copies of so many bytes, on huge pages; none if it is too much of the free memory."""
    total = sum(sizes)
    if total > huge_pages.MEMORY_SHARE * machine.free_bytes(torch.device("cpu")):
        return []
    block = huge_pages.allocate(total)
    return (torch.empty(total, dtype=torch.uint8) if block is None else block).split(list(sizes))


def _base(linear: nn.Module) -> nn.Module:
    """Return the layer without its LoRA."""
    base: nn.Module = without_adapter(linear) if has_attributes(linear, "lora_A") else linear
    return base


def decode_step(core: PreTrainedModel) -> DecodeStep | None:
    """Return the step of ``core``; None if its structure is another or the C passes are not available."""
    body, head = core.base_model, core.get_output_embeddings()
    blocks = attribute(body, "layers")
    norm, rotary = submodule(body, "norm"), submodule(body, "rotary_emb")
    if not isinstance(blocks, nn.ModuleList) or norm is None or rotary is None or type(head) is not nn.Linear:
        return None
    if (
        head.bias is not None
        or not kernels.available(head.weight)
        or type(submodule(body, "embed_tokens")) is not nn.Embedding
    ):
        return None
    layers = [_layer(block) for block in blocks]
    attention = submodule(blocks[0], "self_attn")
    epsilon, dim, scale = (
        attribute(norm, "variance_epsilon"),
        attribute(attention, "head_dim"),
        attribute(attention, "scaling"),
    )
    if (
        any(layer is None for layer in layers)
        or not isinstance(epsilon, float)
        or not isinstance(scale, float)
    ):
        return None
    complete = tuple(layer[0] for layer in layers if layer is not None)
    products = tuple(layer[1] for layer in layers if layer is not None)
    if any(
        tensor is not None and tensor.dim() == 2 and tensor.shape[1] % 2
        for tensor in (*complete[0], head.weight)
    ):
        return None  # side by side, inputs are multiplied in pairs
    weights = [tensor for layer in complete for tensor in layer if tensor is not None] + [
        head.weight,
        norm.weight,
    ]
    if any(not weight.is_contiguous() or weight.dtype != head.weight.dtype for weight in weights):
        return None
    heads, kv_heads = (
        int(attention.get_submodule(name).out_features) // dim for name in ("q_proj", "k_proj")
    )
    window = sliding_window(core.config) or 0
    return DecodeStep(
        core, complete, products, norm.weight, head.weight, heads, kv_heads, dim, scale, epsilon, window
    )


def _layer(block: nn.Module) -> tuple[tuple[Tensor | None, ...], tuple[nn.Module, ...]] | None:
    """Return tensors and products of a layer in the order of kernels_decode.c, or None for another structure."""
    attention, mlp = submodule(block, "self_attn"), submodule(block, "mlp")
    norms = [submodule(block, name) for name in ("input_layernorm", "post_attention_layernorm")]
    if attention is None or mlp is None or len(list(block.children())) != 4 or None in norms:
        return None
    products = [submodule(attention, name) for name in ATTENTION] + [submodule(mlp, name) for name in MLP]
    bases = [_base(one) for one in products]
    if any(type(linear) is not nn.Linear for linear in bases):
        return None
    linears = bases[: len(ATTENTION)], bases[len(ATTENTION) :]
    if type(attribute(mlp, "act_fn")).__name__ not in ("SiLUActivation", "SiLU") or any(
        linear.bias is not None for linear in linears[1]
    ):
        return None
    q, k, v, o = linears[0]
    inner = [submodule(attention, name) for name in ("q_norm", "k_norm")]
    scales = [None if norm is None else norm.weight for norm in inner]
    gate, up, down = (linear.weight for linear in linears[1])
    tensors = (
        norms[0].weight, q.weight, k.weight, v.weight, q.bias, k.bias, v.bias, *scales, o.weight, o.bias,
        norms[1].weight, gate, up, down,
    )  # fmt: skip
    return tensors, tuple(products)
