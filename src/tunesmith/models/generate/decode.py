"""Generation: prompts in, tokens out, the same whatever the batch.

A batch is left-padded with position ids that start at each row's first token; the key-value cache is allocated once; a row
that has stopped leaves the batch. Sampling draws one uniform number for each token from a generator seeded by (seed, row) and
looks it up in the cumulative distribution, so neighbours in the batch and the order of rows do not matter.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError, UserError
from tunesmith.models.heads import head_types
from tunesmith.models.network import base

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Settings:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 filter nothing.

    ``stop``: token ids that end an answer; None = those of the tokenizer, the generation config and the chat template.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: frozenset[int] | None = None

    def __post_init__(self) -> None:
        wrong = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
        ]
        for name, fine, expected in wrong:
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}; expected {expected}")


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Any] | str,
    *,
    system: str | None = None,
    plain: bool = False,
    batch_size: int = 8,
    on_answer: Callable[[int, str], None] | None = None,
    **settings: Any,
) -> list[str]:
    """Answers, one for each prompt, in order.

    ``model``: a name or folder, or a pair (model, tokenizer). ``prompts``: strings or message lists; a string is a user turn
    when the tokenizer has a chat template, else (and with ``plain``) text to be continued. ``on_answer(row, answer)`` is called
    as answers come. ``settings``: the fields of ``Settings``.
    Raises ModelError, and UserError for a prompt that is empty or fills the model's window.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; expected at least 1")
    chosen = Settings(**settings)
    loaded, tokenizer = _pair(model)
    ids = [
        _prompt_ids(prompt, tokenizer, system, plain)
        for prompt in ([prompts] if isinstance(prompts, str) else prompts)
    ]
    answers = [""] * len(ids)
    by_length = sorted(
        range(len(ids)), key=lambda row: len(ids[row])
    )  # like lengths together: little padding
    for start in range(0, len(ids), batch_size):
        rows = by_length[start : start + batch_size]
        for row, answer in zip(
            rows, generate_ids(loaded, tokenizer, [ids[row] for row in rows], chosen, rows=rows)
        ):
            answers[row] = tokenizer.decode(answer, skip_special_tokens=True)
            if on_answer:
                on_answer(row, answers[row])
    return answers


def stream(
    model: PreTrainedModel, prompt: Any, *, system: str | None = None, plain: bool = False, **settings: Any
) -> Iterator[str]:
    """The answer to one prompt in pieces, as they come. A character of several tokens is yielded when it is whole."""
    chosen = Settings(**settings)
    loaded, tokenizer = _pair(model)
    steps = _steps(
        loaded, [_prompt_ids(prompt, tokenizer, system, plain)], chosen, _stop(chosen, loaded, tokenizer), [0]
    )
    yield from pieces(tokenizer, (token for step in steps for _, token in step))


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    on_token: Callable[[int, int], None] | None = None,
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new token ids of each prompt, as one batch. An answer that stopped ends with its stop token.

    ``model``: a transformers causal model or a peft model on one; its training mode is put back afterwards. ``on_token(row,
    id)`` is called as tokens come. ``rows``: the numbers that seed each prompt's sampling (default: its place in ``prompts``).
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return answers
    for step in _steps(
        model, prompts, settings, _stop(settings, model, tokenizer), rows or range(len(prompts))
    ):
        for row, token in step:
            answers[row].append(token)
            if on_token:
                on_token(row, token)
    return answers


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an answer: eos of tokenizer and generation config, and the token that closes the template's turn."""
    from tunesmith.data.encode import conversations

    eos = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset([*conversations.stop_ids(tokenizer), *([eos] if isinstance(eos, int) else eos or [])])


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Text of a token stream, piece by piece; joined, the pieces are the text of all tokens.

    Tokens are decoded together with the few before them, so that spaces and multi-byte characters come out right.
    """
    ids: list[int] = []
    start = shown = 0  # ids[start:shown] has been yielded and gives the next piece its context
    for token in tokens:
        ids.append(token)
        before, now = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (ids[start:shown], ids[start:])
        )
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            start, shown = shown, len(ids)
    before, now = (
        tokenizer.decode(part, skip_special_tokens=True) for part in (ids[start:shown], ids[start:])
    )
    if len(now) > len(before):
        yield now[len(before) :]


def _steps(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    stop: frozenset[int],
    rows: Sequence[int],
) -> Iterator[list[tuple[int, int]]]:
    """Each step's (prompt index, new token) of the prompts that still run."""
    import torch

    from tunesmith.models.adapters import virtual_tokens

    core = _core(model)
    limits = _limits(core, prompts, settings.max_new_tokens)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if virtual_tokens.must_go_alone(
                core, [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
            ):
                for place, one in enumerate(prompts):
                    for step in _decode(core, [one], [limits[place]], settings, stop, [rows[place]]):
                        yield [(place, token) for _, token in step]
            else:
                yield from _decode(core, prompts, limits, settings, stop, rows)
    finally:
        model.train(training)


def _decode(
    core: Any,
    prompts: Sequence[Sequence[int]],
    limits: list[int],
    settings: Settings,
    stop: frozenset[int],
    rows: Sequence[int],
) -> Iterator[list[tuple[int, int]]]:
    import torch

    from tunesmith.models.adapters import virtual_tokens
    from tunesmith.models.generate.kv_cache import preallocated_cache

    device, longest = core.device, max(map(len, prompts))
    accepted = inspect.signature(core.forward).parameters
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(
        len(prompts), longest, dtype=torch.long, device=device
    )  # (batch, longest); the padding id is never seen
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
    columns = torch.arange(longest, device=device)
    mask = (columns >= (longest - lengths)[:, None]).long() if int(lengths.min()) < longest else None
    positions = (columns - (longest - lengths)[:, None]).clamp(min=0)
    cache = preallocated_cache(core.config, virtual_tokens.count(core) + longest + max(limits))
    uniform = _uniform(settings, rows, max(limits))
    running = list(range(len(prompts)))
    for step in range(max(limits)):
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in accepted:
            inputs["position_ids"] = positions
        if "logits_to_keep" in accepted:
            # an index, not a count: a slice is not contiguous, and torch then copies the vocabulary weights once for each row
            inputs["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=device)
        logits = core(**inputs).logits[:, -1].float()  # (running, vocab)
        draws = None if uniform is None else uniform[running, step].to(device)
        chosen = choose(logits, settings, draws)
        tokens = chosen.tolist()
        yield list(zip(running, tokens))
        left = [
            place for place, row in enumerate(running) if tokens[place] not in stop and step + 1 < limits[row]
        ]
        if not left:
            return
        if len(left) < len(running):
            keep = torch.tensor(left, device=device)
            cache.batch_select_indices(keep)
            chosen, positions, mask = chosen[keep], positions[keep], mask[keep] if mask is not None else None
            running = [running[place] for place in left]
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)


def choose(logits: torch.Tensor, settings: Settings, uniform: torch.Tensor | None) -> torch.Tensor:
    """One token for each row. ``logits`` (rows, vocab) fp32; ``uniform`` (rows,) in [0, 1), or None for the most likely token.

    Filters come in the order of transformers: temperature, top_k, top_p (Holtzman et al., arXiv:1904.09751).
    """
    import torch

    if uniform is None:
        return logits.argmax(dim=-1)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[:, -1:], float("-inf"))
    chances = logits.softmax(dim=-1).double()
    if settings.top_p < 1:
        ordered, order = chances.sort(descending=True, dim=-1)
        beyond = (
            ordered.cumsum(dim=-1) - ordered >= settings.top_p
        )  # the likeliest tokens before this one already reach top_p
        chances = chances.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    cumulative = chances.cumsum(dim=-1)
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1)


def _uniform(settings: Settings, rows: Sequence[int], count: int) -> torch.Tensor | None:
    """(rows, count) numbers in [0, 1) in fp64, each row a function of (seed, row); None when greedy."""
    import torch

    if settings.temperature == 0:
        return None
    drawn = []
    for row in rows:
        seed = int.from_bytes(hashlib.sha256(f"{settings.seed} {row}".encode()).digest()[:7], "little")
        drawn.append(torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(drawn)


def _core(model: PreTrainedModel) -> Any:
    """The transformers model that computes logits; an attached LoRA lives inside it."""
    from tunesmith.models.adapters import virtual_tokens

    if not hasattr(model, "peft_config"):
        return model
    if model.active_peft_config.is_prompt_learning and not virtual_tokens.installed(model):
        raise ModelError(
            "this adapter adds virtual tokens (prefix or prompt tuning). Load it with tunesmith.load, or from a folder."
        )
    return model.get_base_model()


def _limits(core: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """How many tokens each prompt may get before the model's window is full."""
    from tunesmith.models.adapters import virtual_tokens

    window = getattr(core.config.get_text_config(), "max_position_embeddings", None) or 10**9
    ahead = virtual_tokens.count(core)
    window, besides = window - ahead, f" ({ahead} more are taken by virtual tokens)" if ahead else ""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty: there is no token to continue")
        if len(prompt) >= window:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and the model's window is {window}{besides}. Shorten it."
            )
    return [min(max_new_tokens, window - len(prompt)) for prompt in prompts]


def _stop(settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return stop_ids(_core(model), tokenizer) if settings.stop is None else settings.stop


def _prompt_ids(
    prompt: Any, tokenizer: PreTrainedTokenizerBase, system: str | None, plain: bool
) -> list[int]:
    from tunesmith.data.encode.conversations import prompt_ids
    from tunesmith.data.rows import Text

    if plain and not isinstance(prompt, str):
        raise UserError("a plain prompt is a string, without turns; leave out `plain` for a list of messages")
    return prompt_ids(Text(prompt) if plain else prompt, tokenizer, system=system)


def check_writes(model: PreTrainedModel) -> None:
    """Raise ModelError for a model with another head than that of a language model."""
    kind = type(base(model)).__name__
    if head_types.kind_of(kind) != "lm":
        raise ModelError(
            f"this model is a {kind}: it judges texts and writes none.\n  Use tunesmith predict (score for a reward model)."
        )


def _pair(model: PreTrainedModel) -> tuple[Any, Any]:
    from tunesmith.models.load.load import load

    pair: tuple[Any, Any] = model if isinstance(model, tuple) else load(model)
    check_writes(pair[0])
    return pair
