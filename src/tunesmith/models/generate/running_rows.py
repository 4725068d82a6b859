"""The request for one answer, the running row that generates it, and the answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.models.generate import sampling
from tunesmith.models.generate.row_adapters import ACTIVE
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.generate.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reason: TypeAlias = Literal["stop", "stop_string", "length", "window", "callback"]
"""Why an answer ended: a stop token, a stop string, max_new_tokens, the model's window, a failed callback."""


@dataclass(frozen=True)
class Request:
    """The request for one answer.

    ``prompt`` and ``sample`` are its numbers, which seed its random numbers. ``adapter``: the name of a loaded
    adapter, None for the base model without adapters; by default the model as it is.
    """

    ids: tuple[int, ...]
    params: SamplingParams
    prompt: int = 0
    sample: int = 0
    adapter: str | None = ACTIVE


@dataclass(frozen=True)
class Answer:
    """One answer. ``ids`` include the stop token that ended it; ``text`` has neither that nor a stop string.

    ``logprobs``: log-probability of each token under the model as it is; ``rule_logprobs``: under the sampling
    rule, [] where vLLM sampled. ``top``: the likeliest tokens at each position with their log-probabilities, if asked for.
    ``fingerprint``: hash of the weights that generated it. ``error``: what the callback raised.
    """

    prompt: int
    sample: int
    ids: list[int]
    text: str
    reason: Reason
    logprobs: list[float]
    rule_logprobs: list[float]
    top: list[list[tuple[int, float]]]
    fingerprint: str
    error: Exception | None = None


def token_limit(request: Request, window: int, ahead: int = 0) -> int:
    """Return how many tokens the answer may have before the model's window is full.

    ``ahead``: virtual tokens, which take a part of the window. Raises UserError for a prompt that is empty or
    fills it."""
    length, room = len(request.ids), window - ahead
    if not length:
        raise UserError(f"prompt {request.prompt} is empty: there is no token to continue")
    if length >= room:
        size = f"{room} ({ahead} more are taken by virtual tokens)" if ahead else room
        raise UserError(
            f"prompt {request.prompt} has {length} tokens; the model's window is {size}. Shorten it."
        )
    return min(request.params.max_new_tokens, room - length)


@dataclass(eq=False)
class Row:
    """An answer in progress. Its slot holds the tokens of prompt and answer but the last."""

    request: Request
    limit: int
    full: Reason
    """Why the answer ends at ``limit``."""
    stop: frozenset[int]
    stream: TextStream | None
    uniform: Tensor | None
    adapter: str | None
    slot: int = -1
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rule_logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    piece: str = ""
    """The text that the last token made final."""
    reason: Reason | None = None
    error: Exception | None = None

    @classmethod
    def begin(
        cls,
        request: Request,
        limit: int,
        stop: frozenset[int],
        tokenizer: PreTrainedTokenizerBase,
        streamed: bool = False,
        uniform: Tensor | None = None,
        adapter: str | None = None,
    ) -> Row:
        """Return the row of a request. A row that may have no token is already ended.

        ``stop``: the tokens that end an answer where the request names none."""
        params = request.params
        full: Reason = "window" if limit < params.max_new_tokens else "length"
        text = TextStream(tokenizer, params.stop_strings) if streamed or params.stop_strings else None
        ends = stop if params.stop is None else params.stop
        return cls(request, limit, full, ends, text, uniform, adapter, reason=None if limit else full)

    def answer(self, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> Answer:
        """Return the answer of a row that has ended."""
        assert self.reason is not None
        text = self.stream.text if self.stream else tokenizer.decode(self.ids, skip_special_tokens=True)
        return Answer(
            self.request.prompt, self.request.sample, self.ids, str(text), self.reason, self.logprobs,
            self.rule_logprobs, self.top, fingerprint, self.error,
        )  # fmt: skip

    @property
    def tokens(self) -> list[int]:
        return [*self.request.ids, *self.ids]

    @property
    def needed(self) -> int:
        """Tokens that its slot must have room for."""
        return len(self.request.ids) + self.limit

    def add(self, token: int) -> None:
        """Add a drawn token to the answer and its text, and end the row if the answer is complete."""
        self.ids.append(token)
        self.piece = self.stream.add(token) if self.stream else ""
        choices = self.request.params.choices
        if token in self.stop or (choices and not sampling.next_tokens(choices, self.ids, frozenset())):
            self.reason = "stop"
        elif self.stream and self.stream.stopped:
            self.reason = "stop_string"
        elif len(self.ids) >= self.limit:
            self.reason = self.full
        if self.reason and self.stream:
            self.piece += self.stream.finish()
            self.reason = "stop_string" if self.stream.stopped else self.reason
