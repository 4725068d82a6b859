"""Generation: prompts in, tokens out, the same whatever the batch.

A batch is padded on the left, with position ids that start at each row's first token. The key-value cache is
allocated once, and a row that has stopped leaves the batch. Sampling draws one uniform number for each token
from a generator seeded by (seed, row) and looks it up in the cumulative distribution, so neither the other
rows of a batch nor their order matter.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor

from tunesmith.data.encode import conversations
from tunesmith.data.rows import Chat, Message, Text
from tunesmith.errors import ModelError, UserError
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.generate.kv_cache import preallocated_cache
from tunesmith.models.heads import head_types
from tunesmith.models.load.load import load
from tunesmith.models.network import base, context_window, is_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase]

Prompt: TypeAlias = str | Sequence[Message] | Chat | Text
"""A string is a user turn when the tokenizer has a chat template, else text to continue, as a Text always is."""
Step: TypeAlias = list[tuple[int, int]]
"""(prompt index, new token) of each prompt that has not stopped."""


class SettingsFields(TypedDict, total=False):
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: frozenset[int] | None


@dataclass(frozen=True, slots=True)
class Settings:
    """Rule by which tokens are chosen. ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 filter nothing.

    ``stop``: token ids that end an answer; None = those of the tokenizer, the generation config and the chat
    template.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: frozenset[int] | None = None

    def __post_init__(self) -> None:
        checks = [
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
        ]
        for name, value, valid, expected in checks:
            if not valid:
                raise UserError(f"{name} is {value}; expected {expected}")


def generate(
    model: str | Path | Loaded,
    prompts: Sequence[Prompt] | str,
    *,
    system: str | None = None,
    plain: bool = False,
    batch_size: int = 8,
    on_answer: Callable[[int, str], None] | None = None,
    **settings: Unpack[SettingsFields],
) -> list[str]:
    """Return one answer for each prompt, in order.

    ``model``: a name or folder, or a pair (model, tokenizer). ``plain``: prompts are text to continue even if
    there is a chat template. ``on_answer(row, answer)`` is called for each answer. ``settings``: fields of
    ``Settings``. Raises ModelError, and UserError for a prompt that is empty or fills the model's window.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; expected at least 1")
    chosen = Settings(**settings)
    network, tokenizer = _load(model)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    ids = [_prompt_ids(prompt, tokenizer, system, plain) for prompt in prompts]
    _limits(_core(network), ids, chosen.max_new_tokens)  # a prompt that is too long costs no answer
    answers = [""] * len(ids)
    by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # similar lengths need little padding
    for start in range(0, len(ids), batch_size):
        rows = by_length[start : start + batch_size]
        generated = generate_ids(network, tokenizer, [ids[row] for row in rows], chosen, rows=rows)
        for row, answer in zip(rows, generated, strict=True):
            answers[row] = tokenizer.decode(answer, skip_special_tokens=True)
            if on_answer:
                on_answer(row, answers[row])
    return answers


def stream(
    model: str | Path | Loaded,
    prompt: Prompt,
    *,
    system: str | None = None,
    plain: bool = False,
    **settings: Unpack[SettingsFields],
) -> Iterator[str]:
    """Yield the answer to one prompt in pieces, each character when all its tokens are there."""
    chosen = Settings(**settings)
    network, tokenizer = _load(model)
    ids = _prompt_ids(prompt, tokenizer, system, plain)
    steps = _steps(network, tokenizer, [ids], chosen, [0])
    yield from pieces(tokenizer, (token for step in steps for _, token in step))


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the new token ids of each prompt, as one batch. An answer that stopped ends with its stop token.

    The training mode of ``model`` is restored. ``rows``: the numbers that seed each prompt's sampling
    (default: its index).
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for step in _steps(model, tokenizer, prompts, settings, rows or range(len(prompts))) if prompts else ():
        for row, token in step:
            answers[row].append(token)
    return answers


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: those of tokenizer, generation config and chat template."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset([*conversations.stop_ids(tokenizer), *([eos] if isinstance(eos, int) else eos or [])])


def save_stop_ids(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the generation config of a saved model with every id of ``stop_ids``.

    Without the token that closes a turn, ``generate`` of transformers writes on after the answer.
    """
    core = base(model)
    if not core.can_generate():
        return
    settings = copy.deepcopy(core.generation_config)
    eos = settings.eos_token_id
    known = [eos] if isinstance(eos, int) else list(eos or [])
    ids = [*known, *sorted(stop_ids(core, tokenizer) - set(known))]
    settings.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    settings.to_json_file(folder / "generation_config.json")


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of a token stream in pieces; joined, they are the text of all tokens.

    Tokens are decoded after the few before them, so that spaces and multi-byte characters come out right.
    """
    ids: list[int] = []
    start = shown = 0  # ids[start:shown] has been yielded and is the context of the next piece

    def new_text() -> str:
        before, now = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (ids[start:shown], ids[start:])
        )
        return now[len(before) :]

    for token in tokens:
        ids.append(token)
        text = new_text()
        if text and not text.endswith("\ufffd"):
            yield text
            start, shown = shown, len(ids)
    if text := new_text():
        yield text


def _steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    rows: Sequence[int],
) -> Iterator[Step]:
    """Yield the steps of all prompts: in one batch, or one by one where a batch would change answers."""
    core = _core(model)
    stop = stop_ids(core, tokenizer) if settings.stop is None else settings.stop
    limits = _limits(core, prompts, settings.max_new_tokens)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
            if not virtual_tokens.needs_single_rows(core, lengths):
                yield from _decode(core, prompts, limits, settings, stop, rows)
                return
            for index, (prompt, limit, row) in enumerate(zip(prompts, limits, rows, strict=True)):
                for step in _decode(core, [prompt], [limit], settings, stop, [row]):
                    yield [(index, token) for _, token in step]
    finally:
        model.train(training)


def _decode(
    core: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limits: list[int],
    settings: Settings,
    stop: frozenset[int],
    rows: Sequence[int],
) -> Iterator[Step]:
    """Yield the steps of one batch, of at most ``limits`` tokens for each prompt."""
    device, longest = core.device, max(map(len, prompts))
    accepted = inspect.signature(core.forward).parameters
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)  # the mask hides the padding
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
    positions = torch.arange(longest, device=device) - (longest - lengths)[:, None]
    mask = (positions >= 0).long() if int(lengths.min()) < longest else None
    positions = positions.clamp(min=0)
    cache = preallocated_cache(core.config, virtual_tokens.count(core) + longest + max(limits))
    uniform = _uniform(settings, rows, max(limits))
    running = list(range(len(prompts)))
    for step in range(max(limits)):
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in accepted:
            inputs["position_ids"] = positions
        if "logits_to_keep" in accepted:
            # an index, not a count: for a slice torch copies the vocabulary weights once for each row
            inputs["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=device)
        logits = core(**inputs).logits[:, -1].float()  # (running, vocab)
        draws = None if uniform is None else uniform[running, step].to(device)
        chosen = choose(logits, settings, draws)
        tokens = chosen.tolist()
        yield list(zip(running, tokens))
        pairs = enumerate(zip(running, tokens))
        left = [index for index, (row, token) in pairs if token not in stop and step + 1 < limits[row]]
        if not left:
            return
        if len(left) < len(running):
            keep = torch.tensor(left, device=device)
            cache.batch_select_indices(keep)
            chosen, positions, mask = chosen[keep], positions[keep], mask[keep] if mask is not None else None
            running = [running[index] for index in left]
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)


def choose(logits: Tensor, settings: Settings, uniform: Tensor | None) -> Tensor:
    """Choose a token for each row of ``logits`` (rows, vocab). ``uniform`` (rows,) in [0, 1); None = greedy.

    Filters in transformers' order: temperature, top_k, top_p (Holtzman et al., arXiv:1904.09751).
    """
    if uniform is None:
        return logits.argmax(dim=-1)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[:, -1:], float("-inf"))
    probabilities = logits.softmax(dim=-1).double()
    if settings.top_p < 1:
        ordered, order = probabilities.sort(descending=True, dim=-1)
        beyond = ordered.cumsum(dim=-1) - ordered >= settings.top_p  # the likelier tokens already reach top_p
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    cumulative = probabilities.cumsum(dim=-1)
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1)


def _uniform(settings: Settings, rows: Sequence[int], count: int) -> Tensor | None:
    """(rows, count) numbers in [0, 1) in fp64, each row a function of (seed, row); None when greedy."""
    if settings.temperature == 0:
        return None
    drawn = []
    for row in rows:
        seed = int.from_bytes(hashlib.sha256(f"{settings.seed} {row}".encode()).digest()[:7], "little")
        drawn.append(torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(drawn)


def _core(model: PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model that computes logits; a LoRA is inside it."""
    virtual = is_peft(model) and model.active_peft_config.is_prompt_learning
    if virtual and not virtual_tokens.is_installed(model):
        raise ModelError("this adapter adds virtual tokens. Load it with tunesmith.load, or from a folder.")
    return base(model)


def _limits(core: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Return how many tokens each prompt may get before the model's window is full."""
    ahead = virtual_tokens.count(core)
    window = (context_window(core.config) or 10**9) - ahead
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty: there is no token to continue")
        if len(prompt) >= window:
            size = f"{window} ({ahead} more are taken by virtual tokens)" if ahead else window
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens; the model's window is {size}. Shorten it."
            )
    return [min(max_new_tokens, window - len(prompt)) for prompt in prompts]


def _prompt_ids(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, system: str | None, plain: bool
) -> list[int]:
    if isinstance(prompt, Chat) and len(prompt.messages) == 1 and not prompt.tools:
        prompt = str(prompt.messages[0]["content"])  # text to continue, where there is no template
    if not plain or isinstance(prompt, Text):
        return conversations.prompt_ids(prompt, tokenizer, system=system)
    if not isinstance(prompt, str):
        raise UserError("a plain prompt is a string, without turns; leave out `plain` for a list of messages")
    return conversations.prompt_ids(Text(prompt), tokenizer, system=system)


def check_writes(model: PreTrainedModel) -> None:
    """Raise ModelError for a model with another head than that of a language model."""
    name = type(base(model)).__name__
    if head_types.kind_of(name) != "lm":
        raise ModelError(f"this model is a {name}, which generates no text. Use tunesmith predict or score.")


def _load(model: str | Path | Loaded) -> Loaded:
    network, tokenizer = model if isinstance(model, tuple) else load(model)
    check_writes(network)
    return network, tokenizer
