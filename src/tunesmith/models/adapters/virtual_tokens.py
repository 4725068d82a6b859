"""Virtual tokens before every row: trained embeddings (prompt tuning) or keys and values (prefix tuning).

peft stores them and their files, but its forward takes one row at a time and refuses packed rows and
checkpointing. Here every packed segment and every padded row has its own virtual tokens, and equals what peft
computes for it alone: text positions follow the virtual tokens, and the output has the shape of the text.

``install`` works on the loaded instance: a :class:`VirtualTokenForward` replaces the body's ``forward``, and
with a prefix each attention has a hook. Training, evaluation, generation and the probe all go through the
body, so no other code knows of virtual tokens, except where positions are counted (:func:`count`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from tunesmith.errors import ModelError, RecipeError
from tunesmith.models import network
from tunesmith.models.adapters.virtual_token_layout import Keywords, Layout, packed, padded
from tunesmith.models.fast.attention import check_shared_prefix
from tunesmith.models.fast.segments import shares_prefix

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel, PrefixEncoder
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput

PREFIX, PROMPT = "PREFIX_TUNING", "PROMPT_TUNING"
WORDS = "Below is a text. It is written with care, and each part of it follows from what stands before. "
"""The default start of virtual tokens: random numbers do harm that takes long to train away."""


def install(model: PeftModel, trainable: bool = True) -> None:
    """Give ``model`` our forward for its virtual tokens, in place; models with other adapters do not change.

    Raises ModelError for a network whose layers a prefix cannot reach, and for other types of virtual tokens.
    """
    config = model.active_peft_config
    if not config.is_prompt_learning:
        return
    kind, core = network.peft_type(config), model.get_base_model()
    if kind not in (PREFIX, PROMPT):
        raise ModelError(f"{kind.lower()} is not available: expected prefix_tuning or prompt_tuning")
    if trainable and config.inference_mode:  # it comes from a folder
        check_continued(config)
        config.inference_mode = False
    model.prompt_encoder.requires_grad_(trainable)
    if kind == PREFIX:
        for layer, module in enumerate(attentions(core)):
            module.register_forward_pre_hook(_PrefixHook(model, layer), with_kwargs=True)
    core.base_model.forward = VirtualTokenForward(model, core.base_model, kind)
    model.forward = core.__call__  # peft's own would insert them a second time
    if network.has_attributes(core, "generate"):
        model.generate = core.generate


def _forward_of(model: PreTrainedModel) -> VirtualTokenForward | None:
    forward = vars(network.base(model).base_model).get("forward")
    return forward if isinstance(forward, VirtualTokenForward) else None


def count(model: PreTrainedModel) -> int:
    """Return the positions that virtual tokens take before each row; 0 if there are none, or they are off."""
    forward = _forward_of(model)
    return forward.count if forward else 0


def count_embedded(model: PreTrainedModel) -> int:
    """Return the number of virtual tokens that go through the layers. A prefix exists in attention alone."""
    forward = _forward_of(model)
    return forward.count if forward and forward.kind == PROMPT else 0


def fill_cache(core: PreTrainedModel, cache: Cache, **keywords: Any) -> None:
    """Put the keys and values of the virtual tokens of ``core`` into ``cache``, as the tokens of one row.

    ``keywords``: those of the body's forward, such as the positions.
    """
    forward = _forward_of(core)
    assert forward is not None, "the model has virtual tokens"
    forward.fill_cache(cache, keywords)


def is_installed(model: PreTrainedModel) -> bool:
    """Return whether our forward serves the virtual tokens of ``model``."""
    return _forward_of(model) is not None


def _slides(core: PreTrainedModel, tokens: int) -> bool:
    window = network.sliding_window(core.config)
    return window is not None and window < tokens


def attentions(core: PreTrainedModel) -> list[nn.Module]:
    """Return the attention of each layer, in order. Raises ModelError when some are not found."""
    layers = core.config.get_text_config().num_hidden_layers
    if not network.is_causal(core.config):
        raise ModelError(
            f"prefix tuning is not available for {type(core).__name__}: it needs the cache of a decoder's attention.\n"
            "  Use adaptation=prompt or adaptation=lora."
        )
    known = ("is_causal", "layer_idx")
    modules = [module for module in core.modules() if network.has_attributes(module, *known)]
    if [module.layer_idx for module in modules] != list(range(layers)):
        raise ModelError(
            f"prefix tuning is not available for {type(core).__name__}: it has {layers} layers, and {len(modules)} "
            "causal attentions with the number of their layer.\n  Use adaptation=prompt or adaptation=lora."
        )
    return modules


def _layer_rows(model: PeftModel, layer: int) -> Tensor:
    """Return (virtual, 2 width): a layer's keys, then its values, of all key heads side by side.

    With a projection (Li and Liang 2021, section 4.3) only this layer's part of it is computed.
    """
    encoder, width = model.prompt_encoder[model.active_adapter], model.active_peft_config.token_dim
    part = slice(2 * layer * width, (2 * layer + 2) * width)
    weight: Tensor = encoder.embedding.weight
    if not network.has_attributes(encoder, "transform"):
        return weight[:, part]
    first, activation, last = encoder.transform
    return nn.functional.linear(activation(first(weight)), last.weight[part], last.bias[part])


@dataclass(eq=False)
class PrefixCache:
    """Acts as the cache of one attention: it joins the virtual keys and values to those of the text.

    ``rows`` (virtual, 2 width). ``layout``: that of a packed row, None for a batch.
    """

    rows: Tensor
    heads: int
    layout: Layout | None

    def update(self, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """(batch, heads, tokens, dim) -> the same with the virtual ones before every segment or row."""
        virtual_keys, virtual_values = _heads(self.rows.to(keys), self.heads)
        return self._join(keys, virtual_keys), self._join(values, virtual_values)

    def _join(self, text: Tensor, virtual: Tensor) -> Tensor:
        if self.layout is None:
            return torch.cat([virtual.expand(len(text), -1, -1, -1), text], dim=2)
        return self.layout.insert(text, virtual, dim=2)

    def extend(self, qkv: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Insert rows into (tokens, width of q, k and v) and its rotations: a zero query, and no rotation."""
        assert self.layout is not None
        rows = self.rows.to(qkv)
        rows = torch.cat([rows.new_zeros(len(rows), qkv.shape[1] - rows.shape[1]), rows], dim=1)
        ones = cosine.new_ones(len(rows), cosine.shape[1])
        pairs = ((qkv, rows), (cosine, ones), (sine, torch.zeros_like(ones)))
        qkv, cosine, sine = (self.layout.insert(text, virtual, dim=0) for text, virtual in pairs)
        return qkv, cosine, sine


def _heads(rows: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(virtual, 2 width) -> keys and values, (1, heads, virtual, dim)."""
    keys, values = rows.view(len(rows), 2, heads, -1).permute(1, 2, 0, 3).unsqueeze(1)
    return keys, values


@dataclass(eq=False)
class _PrefixHook:
    """Joins the prefix in a layer's attention where no cache holds it (packed rows, recomputed layers)."""

    model: PeftModel
    layer: int

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Keywords
    ) -> tuple[tuple[Tensor, ...], Keywords] | None:
        if self.model._adapters_disabled or kwargs.get("past_key_values") is not None:
            return None
        config = self.model.active_peft_config
        rows = _layer_rows(self.model, self.layer)
        tokens = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[1]
        layout = Layout.of(kwargs, config.num_virtual_tokens, tokens)
        return args, {**kwargs, "past_key_values": PrefixCache(rows, config.num_attention_heads, layout)}


@dataclass(eq=False)
class VirtualTokenForward:
    """The ``forward`` of a body with ``count`` virtual tokens before each row; 0 while peft's adapter is off.

    Positions, attention mask and ``segments`` are those of the text alone. A cache that is not empty already
    holds the virtual tokens. So does a cache of ``slots``, whose positions count them.
    """

    model: PeftModel
    body: PreTrainedModel
    kind: str

    @property
    def count(self) -> int:
        return 0 if self.model._adapters_disabled else int(self.model.active_peft_config.num_virtual_tokens)

    def __call__(self, input_ids: Tensor | None = None, **keywords: Any) -> BaseModelOutput:
        mask = keywords.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ModelError(
                f"virtual tokens need an attention mask of (batch, tokens), got {mask.dim()} dimensions"
            )
        if not self.count or keywords.get("slots") is not None:
            return self._run(input_ids, **keywords)
        if shares_prefix(keywords):
            check_shared_prefix(True, self.count)
        if keywords.get("position_ids") is not None:
            keywords["position_ids"] = keywords["position_ids"] + self.count
        if self.kind == PREFIX:
            return self._with_prefix(input_ids, keywords)
        cache = keywords.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            if mask is not None:
                layout = padded(mask, self.count)
                keywords["attention_mask"] = layout.insert(mask, mask.new_ones(1, self.count))
            return self._run(input_ids, **keywords)
        return self._with_embeddings(input_ids, keywords)

    def fill_cache(self, cache: Cache, keywords: Keywords) -> None:
        """Put the keys and values of the virtual tokens into ``cache``, as the tokens of one row."""
        if self.kind == PROMPT:
            weight = self.model.prompt_encoder[self.model.active_adapter].embedding.weight
            embedded = weight.to(self.body.dtype)[None]
            self._run(inputs_embeds=embedded, past_key_values=cache, use_cache=True, **keywords)
            return
        config = self.model.active_peft_config
        for layer in range(config.num_layers):
            rows = _layer_rows(self.model, layer).to(self.body.dtype)
            cache.update(*_heads(rows, config.num_attention_heads), layer)

    def _run(self, *args: Tensor | None, **keywords: Any) -> BaseModelOutput:
        return type(self.body).forward(self.body, *args, **keywords)

    def _with_prefix(self, input_ids: Tensor | None, keywords: Keywords) -> BaseModelOutput:
        """Run with a cache that holds the prefix, from which transformers takes the length of its mask."""
        if packed(keywords):
            return self._run(input_ids, **keywords)
        text = keywords["inputs_embeds"] if input_ids is None else input_ids
        mask = keywords.get("attention_mask")
        if mask is not None:
            if _slides(self.body, mask.shape[1] + self.count) and not mask[:, 0].all():
                raise ModelError(
                    "rows padded on the left cannot have a prefix where they are longer than the model's sliding "
                    "window: padding would push the prefix out of it.\n"
                    "  Pass one row at a time, or use tunesmith.generate."
                )
            keywords["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.count), mask], dim=1)
        config = self.model.active_peft_config
        if keywords.get("past_key_values") is None:
            kept = keywords.get("use_cache")
            kept = self.body.config.use_cache if kept is None else kept
            keywords["past_key_values"] = DynamicCache(config=self.body.config) if kept else DynamicCache()
        cache = keywords["past_key_values"]
        if not cache.get_seq_length():
            for layer in range(config.num_layers):
                rows = _layer_rows(self.model, layer).to(self.body.dtype)
                pair = _heads(rows, config.num_attention_heads)
                cache.update(*(x.expand(len(text), -1, -1, -1) for x in pair), layer)
        return self._run(input_ids, **keywords)

    def _with_embeddings(self, input_ids: Tensor | None, keywords: Keywords) -> BaseModelOutput:
        """Run with the virtual embeddings before each row, and drop their hidden states from the output."""
        embedded = keywords.pop("inputs_embeds", None)
        if embedded is None:  # by the module itself, which scales in some models (gemma)
            embedded = self.body.get_input_embeddings()(input_ids)
        mask, positions = keywords.get("attention_mask"), keywords.get("position_ids")
        layout = Layout.of(keywords, self.count, embedded.shape[1])
        if layout is not None:
            keywords |= layout.keywords
        else:
            layout = padded(embedded.new_ones(embedded.shape[:2]) if mask is None else mask, self.count)
        virtual = self.model.prompt_encoder[self.model.active_adapter].embedding.weight.to(embedded)
        keywords["inputs_embeds"] = layout.insert(embedded, virtual[None])
        if mask is not None:
            keywords["attention_mask"] = layout.insert(mask, mask.new_ones(1, self.count))
        if (types := keywords.get("token_type_ids")) is not None:
            keywords["token_type_ids"] = layout.insert(types, types.new_zeros(1, self.count))
        if positions is not None:
            begin = positions.flatten()[0] - self.count  # roberta's first position is not 0
            first = torch.arange(self.count, device=positions.device)[None] + begin
            keywords["position_ids"] = layout.insert(positions.expand(embedded.shape[:2]), first)
        out = self._run(**keywords)
        out.last_hidden_state = layout.text(out.last_hidden_state)
        if network.attribute(out, "hidden_states") is not None:
            out.hidden_states = tuple(layout.text(states) for states in out.hidden_states)
        return out


def check_continued(config: PeftConfig) -> None:
    """Raise RecipeError for saved virtual tokens that cannot be trained further."""
    if config.is_prompt_learning and network.attribute(config, "prefix_projection"):
        raise RecipeError(
            "adapter: continue: this prefix was trained with prefix_projection, and its files lack the projection.\n"
            "  Use adapter: new. A prefix trained without prefix_projection can be continued."
        )


def check_stored(
    stored: Mapping[str, Sequence[int]], config: PeftConfig, core: PreTrainedModel, path: Path
) -> None:
    """Raise ModelError unless ``stored`` (name -> shape) are the tensors of virtual tokens for ``core``."""
    if not config.is_prompt_learning:
        return
    tokens, expected = config.num_virtual_tokens, _shape(config, core)
    heads = tuple(f".{name}." for name in config.modules_to_save or ())
    others = [name for name in stored if name != "prompt_embeddings"]
    extra = [name for name in others if not any(head in f".{name}" for head in heads)]
    if "prompt_embeddings" not in stored or extra:
        found = f"unexpected: {', '.join(sorted(extra))}" if extra else "missing: prompt_embeddings"
        raise ModelError(f"{path}: the weights are not those of {tokens} virtual tokens.\n  {found}")
    if list(stored["prompt_embeddings"]) != expected:
        raise ModelError(
            f"{path}: prompt_embeddings has the shape {tuple(stored['prompt_embeddings'])}; "
            f"{tokens} virtual tokens of {type(core).__name__} have {tuple(expected)}"
        )


def _shape(config: PeftConfig, core: PreTrainedModel) -> list[int]:
    """[virtual, numbers of each], by the network ``core`` and not by the widths in the adapter's config."""
    text = core.config.get_text_config()
    width = int(core.get_input_embeddings().weight.shape[1])
    if network.peft_type(config) == PREFIX:
        heads = network.attribute(text, "num_key_value_heads") or text.num_attention_heads
        dim = network.attribute(text, "head_dim") or text.hidden_size // text.num_attention_heads
        width = 2 * text.num_hidden_layers * heads * dim
    return [config.num_virtual_tokens, width]


def check_room(model: PreTrainedModel, tokens: int) -> None:
    """Raise RecipeError when ``tokens`` virtual tokens leave no room for text in the network's window."""
    window = network.context_window(model.config)
    if window is not None and tokens >= window:
        raise RecipeError(
            f"adaptation.num_virtual_tokens is {tokens}, and the model's window is {window} tokens. Take fewer."
        )


@torch.no_grad()
def words_as_prefix(core: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return the keys and values that the network computes for ``ids``, (virtual, 2 layers width)."""
    training = core.training
    cache = core.eval().base_model(
        input_ids=torch.tensor([ids], device=core.device), past_key_values=DynamicCache(), use_cache=True
    )
    core.train(training)
    layers = [(layer.keys, layer.values) for layer in cache.past_key_values.layers]
    return torch.cat([x[0].transpose(0, 1).flatten(1).float() for pair in layers for x in pair], dim=1)


@torch.no_grad()
def start_from(encoder: PrefixEncoder, start: Tensor) -> None:
    """Set the values of peft's ``encoder`` so that it computes ``start`` (virtual, 2 layers width).

    With a projection its last layer is solved for: exactly, if it has no fewer inputs than there are tokens.
    """
    weight = encoder.embedding.weight
    if not network.has_attributes(encoder, "transform"):
        weight.copy_(start)
        return
    first, activation, last = encoder.transform
    inner = activation(first(weight)).double()
    last.weight.copy_((torch.linalg.pinv(inner) @ start.to(inner)).t())
    last.bias.zero_()
