"""Prompts in, texts out: the functions that ``generate``, ``chat`` and training call, on top of the
engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict, Unpack

from tunesmith.data.encode import conversations
from tunesmith.data.rows import Chat, Message, Text
from tunesmith.errors import ModelError, UserError
from tunesmith.models.generate.decode_step import DecodeWeights
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.heads import head_types
from tunesmith.models.load.compute_dtype import cast_and_move
from tunesmith.models.load.load import load
from tunesmith.models.network import base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase]

Prompt: TypeAlias = str | Sequence[Message] | Chat | Text
"""A string is a user turn if there is a chat template, else text to continue. A Text is always continued."""


class SamplingFields(TypedDict, total=False):
    """The fields of ``SamplingParams``."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    bad_words: tuple[tuple[int, ...], ...]
    stop: frozenset[int] | None
    stop_strings: tuple[str, ...]
    choices: tuple[tuple[int, ...], ...]
    top_logprobs: int
    seed: int


def generate(
    model: str | Path | Loaded,
    prompts: Sequence[Prompt] | str,
    *,
    system: str | None = None,
    plain: bool = False,
    precision: str = "auto",
    decode_weights: DecodeWeights = "stored",
    max_running: int | None = None,
    on_answer: Callable[[int, str], None] | None = None,
    **settings: Unpack[SamplingFields],
) -> list[str]:
    """Return one answer for each prompt, in order.

    ``model``: a name or folder, or a pair (model, tokenizer). ``plain``: prompts are text to continue even if
    there is a chat template. ``precision``: auto, fp32, bf16 or fp16, in which a model that is loaded here
    computes; a model in memory keeps its dtype. ``decode_weights``: as in ``Engine``. ``max_running``:
    prompts answered at once; None = as many as memory allows, at most 64. ``on_answer(row, answer)`` is
    called for each answer when it ends. ``settings``: fields of ``SamplingParams``. Raises ModelError, and
    UserError for a prompt that is empty or fills the model's window.
    """
    params = SamplingParams(**settings)
    network, tokenizer = _load(model, precision)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    ids = [prompt_ids(prompt, tokenizer, system, plain) for prompt in prompts]
    engine = Engine(network, tokenizer, max_running, decode_weights=decode_weights)
    requests = [Request(tuple(row), params, number) for number, row in enumerate(ids)]
    engine.check(requests)  # report a prompt that is too long before any answer is generated
    answers = [""] * len(ids)
    for answer in engine.run(requests):
        answers[answer.prompt] = answer.text
        if on_answer:
            on_answer(answer.prompt, answer.text)
    return answers


def stream(
    model: str | Path | Loaded | Engine,
    prompt: Prompt,
    *,
    system: str | None = None,
    plain: bool = False,
    precision: str = "auto",
    **settings: Unpack[SamplingFields],
) -> Iterator[str]:
    """Yield the answer to one prompt in pieces, each character when all its tokens are there.

    With an ``Engine`` as ``model``, tokens that it already holds, such as earlier turns of a chat, are not
    computed again.
    """
    params = SamplingParams(**settings)
    engine = model if isinstance(model, Engine) else Engine(*_load(model, precision))
    yield from engine.stream(Request(tuple(prompt_ids(prompt, engine.tokenizer, system, plain)), params))


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
) -> list[list[int]]:
    """Return the new token ids of each prompt. An answer that stopped ends with its stop token.

    The training mode of ``model`` is restored.
    """
    engine = Engine(model, tokenizer)
    answers: list[list[int]] = [[] for _ in prompts]
    for answer in engine.run([Request(tuple(ids), params, row) for row, ids in enumerate(prompts)]):
        answers[answer.prompt] = answer.ids
    return answers


def prompt_ids(
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


def _load(model: str | Path | Loaded, precision: str) -> Loaded:
    network, tokenizer = model if isinstance(model, tuple) else load(model)
    check_writes(network)
    if not isinstance(model, tuple):
        cast_and_move(network, precision)
    return network, tokenizer
