"""Virtual tokens in front of every row: trained embeddings (prompt tuning) or trained keys and values (prefix tuning).

peft keeps the numbers and the files; its forward takes one row at a time, and refuses a packed row or checkpointing. Here every
packed segment and every padded row gets its own virtual tokens, so that each row is what peft makes of it alone: text positions
begin behind them, attention sees them, and what comes out has the shape of the text.

``install`` works on the instance that was loaded: the body's ``forward`` becomes an ``Ahead``, and with a prefix each attention
gets a hook. Training, evaluation, generation and the probe all go through the body, so nothing else knows of virtual tokens but
those who count positions (:func:`count`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.adapters.virtual_token_layout import Layout, packed, padded
from tunesmith.models.fast.attention import refuse_shared
from tunesmith.models.fast.segments import shares
from tunesmith.models.network import base, is_causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX, PROMPT = "PREFIX_TUNING", "PROMPT_TUNING"
WORDS = "Below is a text. It is written with care, and each part of it follows from what stands before. "
"""What virtual tokens start as, unless told otherwise: numbers drawn at random do harm that takes long to mend."""


def install(model: PreTrainedModel, trainable: bool = True) -> None:
    """Give the peft model ``model`` our forward for its virtual tokens, in place. Other kinds of adapters are left as they are.

    ``trainable``: whether they are to be trained (on).

    Raises ModelError for a network whose layers a prefix cannot reach, and for kinds of virtual tokens that are not ours.
    """
    config = model.active_peft_config
    if not config.is_prompt_learning:
        return
    kind = getattr(config.peft_type, "value", config.peft_type)
    core = model.get_base_model()
    body = core.base_model
    if kind not in (PREFIX, PROMPT):
        raise ModelError(
            f"{kind.lower()} is not available: of virtual tokens, expected prefix_tuning or prompt_tuning"
        )
    if trainable and config.inference_mode:  # it comes from a folder
        check_continued(config)
        config.inference_mode = False
    model.prompt_encoder.requires_grad_(trainable)
    if kind == PREFIX:
        for layer, module in enumerate(attentions(core)):
            module.register_forward_pre_hook(_Hook(model, layer), with_kwargs=True)
    body.forward = Ahead(model, body, kind)
    model.forward = core.__call__  # peft's own would put them in front once more
    if hasattr(core, "generate"):
        model.generate = core.generate


def _ahead(model: PreTrainedModel) -> Ahead | None:
    """Our forward of the body of ``model``, where it has virtual tokens."""
    found = vars(base(model).base_model).get("forward")
    return found if isinstance(found, Ahead) else None


def count(model: PreTrainedModel) -> int:
    """How many positions virtual tokens take in front of each row of ``model``: 0 where there are none, or they are off."""
    ahead = _ahead(model)
    return ahead.count if ahead else 0


def embedded(model: PreTrainedModel) -> int:
    """How many of them go through the layers like words: those of prompt tuning do, a prefix is in attention alone."""
    ahead = _ahead(model)
    return ahead.count if ahead and ahead.kind == PROMPT else 0


def installed(model: PreTrainedModel) -> bool:
    """Whether the virtual tokens of the peft model ``model`` are served by ours."""
    return _ahead(model) is not None


def must_go_alone(core: Any, lengths: Sequence[int]) -> bool:
    """Whether rows that become so many tokens long cannot be generated as one padded batch.

    Padding stands between a prefix and the text. A sliding window would count it, so a row would see less of its prefix.
    """
    ahead = _ahead(core)
    return bool(
        ahead and ahead.kind == PREFIX and len(lengths) > 1 and _slides(core, ahead.count + max(lengths))
    )


def _slides(core: Any, tokens: int) -> bool:
    """Whether a sliding window of the network is shorter than so many tokens."""
    window = getattr(core.config.get_text_config(), "sliding_window", None)
    return window is not None and window < tokens


def attentions(core: Any) -> list[nn.Module]:
    """The attention of each layer, in order. Raises ModelError when they are not all found: a prefix would miss some."""
    config = core.config.get_text_config()
    if not is_causal(core.config):
        raise ModelError(
            f"prefix tuning is not available for {type(core).__name__}: an encoder's attention has no cache that a prefix could "
            "stand in.\n  Use adaptation=prompt or adaptation=lora."
        )
    found = [
        module for module in core.modules() if hasattr(module, "is_causal") and hasattr(module, "layer_idx")
    ]
    if [module.layer_idx for module in found] != list(range(config.num_hidden_layers)):
        raise ModelError(
            f"prefix tuning is not available for {type(core).__name__}: it has {config.num_hidden_layers} layers, and "
            f"{len(found)} causal attentions that say which layer they are of.\n  Use adaptation=prompt or adaptation=lora."
        )
    return found


def keys_and_values(encoder: Any, layer: int, width: int) -> torch.Tensor:
    """(virtual, 2 width): a layer's keys, then its values, of all key heads side by side.

    ``encoder``: peft's; with a projection (Li and Liang 2021, section 4.3) only this layer's part of it is computed.
    """
    part = slice(2 * layer * width, (2 * layer + 2) * width)
    weight: torch.Tensor = encoder.embedding.weight
    if not hasattr(encoder, "transform"):
        return weight[:, part]
    first, activation, last = encoder.transform
    return nn.functional.linear(activation(first(weight)), last.weight[part], last.bias[part])


@dataclass(eq=False)
class Prefix:
    """What one attention finds in the place of a cache: it joins the virtual keys and values to its own.

    ``rows`` (virtual, 2 width); ``layout`` says where segments begin in a packed row, None where each row of the batch is one.
    """

    rows: torch.Tensor
    heads: int
    layout: Layout | None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, heads, tokens, dim) -> the same with the virtual ones in front of every segment, or of every row."""
        pair = _heads(self.rows.to(keys), self.heads)
        joined = []
        for own, virtual in zip((keys, values), pair, strict=True):
            if self.layout is None:
                joined.append(torch.cat([virtual.expand(len(own), -1, -1, -1), own], dim=2))
            else:
                joined.append(self.layout.insert(own, virtual, dim=2))
        return joined[0], joined[1]

    def spread(
        self, qkv: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens, width of q, k and v) and its rotations, with rows for the virtual tokens: no query, and not rotated."""
        assert self.layout is not None
        rows = self.rows.to(qkv)
        rows = torch.cat([rows.new_zeros(len(rows), qkv.shape[1] - rows.shape[1]), rows], dim=1)
        still = cosine.new_ones(len(rows), cosine.shape[1])
        return (
            self.layout.insert(qkv, rows, dim=0),
            self.layout.insert(cosine, still, dim=0),
            self.layout.insert(sine, torch.zeros_like(still), dim=0),
        )


def _heads(rows: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(virtual, 2 width) -> keys and values, (1, heads, virtual, dim)."""
    keys, values = rows.view(len(rows), 2, heads, -1).permute(1, 2, 0, 3).unsqueeze(1)
    return keys, values


@dataclass(eq=False)
class _Hook:
    """Before a layer's attention: where no cache brings the prefix (packed rows, layers computed again), it is joined here."""

    model: PreTrainedModel
    layer: int

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if self.model._adapters_disabled or kwargs.get("past_key_values") is not None:
            return None
        config = self.model.active_peft_config
        rows = _rows(self.model, self.layer)
        tokens = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[1]
        prefix = Prefix(
            rows, config.num_attention_heads, Layout.of(kwargs, config.num_virtual_tokens, tokens)
        )
        return args, {**kwargs, "past_key_values": prefix}


def _rows(model: PreTrainedModel, layer: int) -> torch.Tensor:
    return keys_and_values(
        model.prompt_encoder[model.active_adapter], layer, model.active_peft_config.token_dim
    )


@dataclass(eq=False)
class Ahead:
    """The ``forward`` of a body with virtual tokens in front of each row. ``count`` of them; 0 while peft's adapter is off.

    Keywords are those of the body's own forward. A cache holds the virtual tokens like any others, once it holds anything.
    Positions, the attention mask and ``segments`` are given for the text alone.
    """

    model: PreTrainedModel
    body: Any
    kind: str

    @property
    def count(self) -> int:
        return 0 if self.model._adapters_disabled else int(self.model.active_peft_config.num_virtual_tokens)

    def __call__(self, input_ids: torch.Tensor | None = None, **keywords: Any) -> Any:
        mask = keywords.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ModelError(
                "virtual tokens need an attention mask of (batch, tokens): one per pair of tokens cannot be extended"
            )
        run = type(self.body).forward
        if not self.count:
            return run(self.body, input_ids, **keywords)
        if shares(keywords):
            refuse_shared(True, self.count)
        if keywords.get("position_ids") is not None:
            keywords["position_ids"] = keywords["position_ids"] + self.count
        if self.kind == PREFIX:
            return self._prefixed(run, input_ids, keywords)
        cache = keywords.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            if mask is not None:
                keywords["attention_mask"] = padded(mask, self.count).insert(
                    mask, mask.new_ones(1, self.count)
                )
            return run(self.body, input_ids, **keywords)
        return self._prompted(run, input_ids, keywords)

    def _prefixed(self, run: Any, input_ids: torch.Tensor | None, keywords: dict[str, Any]) -> Any:
        """With a cache that holds the prefix, which is how transformers learns how long its mask is to be."""
        if packed(keywords):
            return run(self.body, input_ids, **keywords)
        given = keywords["inputs_embeds"] if input_ids is None else input_ids
        mask = keywords.get("attention_mask")
        if mask is not None:
            if _slides(self.body, mask.shape[1] + self.count) and not mask[:, 0].all():
                raise ModelError(
                    "a prefix, rows padded on the left, and a sliding window shorter than they are: padding would push the "
                    "prefix out of the window.\n  Give one row at a time, or use tunesmith.generate, which does."
                )
            keywords["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.count), mask], dim=1)
        if keywords.get("past_key_values") is None:
            config = self.body.config
            wanted = keywords.get("use_cache")
            kept = config.use_cache if wanted is None else wanted
            keywords["past_key_values"] = DynamicCache(config=config) if kept else DynamicCache()
        cache = keywords["past_key_values"]
        if not cache.get_seq_length():
            for layer in range(self.model.active_peft_config.num_layers):
                rows = _rows(self.model, layer).to(self.body.dtype)
                keys, values = _heads(rows, self.model.active_peft_config.num_attention_heads)
                cache.update(
                    keys.expand(len(given), -1, -1, -1), values.expand(len(given), -1, -1, -1), layer
                )
        return run(self.body, input_ids, **keywords)

    def _prompted(self, run: Any, input_ids: torch.Tensor | None, keywords: dict[str, Any]) -> Any:
        """With the virtual embeddings put in front of each row, and what comes out of them left out again."""
        embedded = keywords.pop("inputs_embeds", None)
        if embedded is None:
            embedded = self.body.get_input_embeddings()(
                input_ids
            )  # the module scales, where a model scales (gemma)
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
        out = run(self.body, **keywords)
        out.last_hidden_state = layout.text(out.last_hidden_state)
        if getattr(out, "hidden_states", None) is not None:
            out.hidden_states = tuple(layout.text(states) for states in out.hidden_states)
        return out


def check_continued(config: Any) -> None:
    """Raise RecipeError for virtual tokens that cannot be trained on. ``config``: peft's, of the saved adapter."""
    if config.is_prompt_learning and getattr(config, "prefix_projection", False):
        raise RecipeError(
            "adapter: continue: this prefix was trained with prefix_projection, and its files hold the prefix without\n"
            "  the network that made it. Train a new one with adapter: new; or without prefix_projection, which can be continued."
        )


def check_stored(stored: Mapping[str, Sequence[int]], config: Any, core: Any, where: Any) -> None:
    """Raise ModelError unless ``stored`` (name -> shape) is what the files of such virtual tokens on ``core`` hold."""
    if not config.is_prompt_learning:
        return
    wanted = _shape(config, core)
    heads = tuple(f".{name}." for name in config.modules_to_save or ())
    extra = sorted(
        name
        for name in stored
        if name != "prompt_embeddings" and not any(head in f".{name}" for head in heads)
    )
    if "prompt_embeddings" not in stored or extra:
        what = f"unexpected: {', '.join(extra)}" if extra else "missing: prompt_embeddings"
        raise ModelError(
            f"{where}: the weights are not those of {config.num_virtual_tokens} virtual tokens.\n  {what}"
        )
    if list(stored["prompt_embeddings"]) != wanted:
        raise ModelError(
            f"{where}: prompt_embeddings has the shape {tuple(stored['prompt_embeddings'])}; "
            f"{config.num_virtual_tokens} virtual tokens of {type(core).__name__} have {tuple(wanted)}"
        )


def _shape(config: Any, core: Any) -> list[int]:
    """(virtual, numbers of each) on the network ``core``, whatever the adapter's own config says of layers and widths."""
    text = core.config.get_text_config()
    kind = getattr(config.peft_type, "value", config.peft_type)
    width = int(core.get_input_embeddings().weight.shape[1])
    if kind == PREFIX:
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        each = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = 2 * text.num_hidden_layers * heads * each
    return [config.num_virtual_tokens, width]


def check_room(model: PreTrainedModel, tokens: int) -> None:
    """Raise RecipeError when so many virtual tokens leave no room for text in the network's window."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and tokens >= window:
        raise RecipeError(
            f"adaptation.num_virtual_tokens is {tokens}, and the model's window is {window} tokens. Take fewer."
        )


@torch.no_grad()
def words_as_prefix(core: Any, ids: Sequence[int]) -> torch.Tensor:
    """(virtual, 2 layers width): the keys and values that the network makes of ``ids``, laid out as peft does."""
    training = core.training
    cache = core.eval().base_model(
        input_ids=torch.tensor([ids], device=core.device), past_key_values=DynamicCache(), use_cache=True
    )
    core.train(training)
    layers = [(layer.keys, layer.values) for layer in cache.past_key_values.layers]
    return torch.cat([x[0].transpose(0, 1).flatten(1).float() for pair in layers for x in pair], dim=1)


@torch.no_grad()
def start_from(encoder: Any, start: torch.Tensor) -> None:
    """Give peft's ``encoder`` the values for which it makes ``start`` (virtual, 2 layers width).

    Of a projection the last layer is solved for: exactly, while virtual tokens are no more than its inputs.
    """
    weight = encoder.embedding.weight
    if not hasattr(encoder, "transform"):
        weight.copy_(start)
        return
    first, activation, last = encoder.transform
    inner = activation(first(weight)).double()
    last.weight.copy_((torch.linalg.pinv(inner) @ start.to(inner)).t())
    last.bias.zero_()
