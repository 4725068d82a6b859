"""Answers to a long queue of prompts: read row by row, generated in blocks, given back as they end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch

from tunesmith.data.encode.conversations import find_omitted_text
from tunesmith.data.encode.templates import RENDER_ERRORS, Renderer
from tunesmith.data.read.prompts import AskedPrompt
from tunesmith.data.rows import Chat
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject
from tunesmith.models.adapters.adapter_set import BASE
from tunesmith.models.generate import decode
from tunesmith.models.generate.decode_step import DecodeWeights
from tunesmith.models.generate.engine import MAX_RUNNING, Engine, fingerprint
from tunesmith.models.generate.row_adapters import ACTIVE
from tunesmith.models.generate.running_rows import Answer, Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.generate.slots import Timing
from tunesmith.models.generate.stop_tokens import stop_ids
from tunesmith.models.network import base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.models.generate.decode import Loaded
    from tunesmith.models.generate.vllm_backend import Vllm

BLOCK_ROUNDS = 4
"""Answers of a block, in multiples of the rows that run at once: slots are free only at the end of a block."""
LOGPROB_DIGITS = 5
"""Digits after the point of a log-probability; more are not exact in fp32."""


@dataclass
class Queue:
    """``samples`` answers to each of ``count`` prompts, which can be iterated several times.

    The queue is generated in blocks of ``block_prompts`` prompts, each with an engine of its own. The rows
    that run together in a block are therefore the same whether or not other blocks were generated in the same
    process. ``tokenizers``: those of the adapters that prompts may name; the model has these adapters, and ``BASE``
    names the model without any. ``note``: gets a sentence if the model runs row by row. ``adapter``: of prompts that
    name none, as in ``Request``. ``vllm``: answers instead of the network, which then needs no weights.
    ``decode_weights``: as in ``Engine``.
    """

    loaded: Loaded
    prompts: Iterable[AskedPrompt]
    count: int
    params: SamplingParams
    samples: int = 1
    system: str | None = None
    plain: bool = False
    max_running: int | None = None
    logprobs: bool = False
    tokenizers: Mapping[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    note: Callable[[str], None] = lambda sentence: None
    adapter: str | None = ACTIVE
    vllm: Vllm | None = None
    decode_weights: DecodeWeights = "stored"
    _past: Timing = field(default_factory=Timing)
    _engine: Engine | None = None

    @property
    def most(self) -> int:
        """Answers that run at once, if memory allows."""
        return self.max_running or MAX_RUNNING

    @property
    def block_prompts(self) -> int:
        return max(1, -(-BLOCK_ROUNDS * self.most // self.samples))

    @property
    def timing(self) -> Timing:
        """Seconds and tokens of all blocks so far."""
        if self.vllm is not None:
            return self.vllm.timing
        if self._engine is None:
            return self._past
        return Timing(
            *(a + b for a, b in zip(astuple(self._past), astuple(self._engine.timing), strict=True))
        )

    @property
    def is_exact(self) -> bool:
        """True if each line of the output depends on its request alone, whatever runs at the same time.

        In 16 bits, and in the last digits of a log-probability, a batch shows in the rounding of its products. With
        int8 weights, a token of an answer differs from the same token in a prompt, and a slot may hold either. Answers
        of vLLM count as exact: nothing that runs again would repeat them."""
        exact = self.loaded[0].dtype is torch.float32 and self.decode_weights == "stored"
        return self.vllm is not None or (exact and not self.logprobs)

    def describe(self) -> JsonObject:
        """Return what the answers depend on in addition to data and sampling rule, as plain JSON."""
        network, tokenizer = self.loaded
        text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
        facts: JsonObject = {
            "prompts": self.count,
            "samples": self.samples,
            "system": self.system,
            "plain": self.plain,
        }
        if self.adapter != ACTIVE:
            facts["adapter"] = self.adapter
        facts["tokenizer"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        if self.vllm is not None:
            return facts | self.vllm.identity
        if not self.is_exact:
            facts["max_running"] = self.most
        return facts | {
            "precision": str(network.dtype).removeprefix("torch."),
            "weights": fingerprint(Engine(network, tokenizer).core, self.decode_weights),
        }

    def check(self) -> list[str]:
        """Return warnings about the prompts, after all were read and tokenised.

        Raises UserError for a prompt that the template refuses, that is empty, or that fills the window."""
        engine = self.vllm or Engine(*self.loaded, self.most, decode_weights=self.decode_weights)
        omitted = OmittedText(self.loaded[1])
        for asked in self.prompts:
            omitted.add(asked)
            engine.check([self._request(asked.row, asked, 0)])  # its error names the row
        return omitted.warnings

    def run(self, is_done: Callable[[int], bool] = lambda index: False) -> Iterator[tuple[int, JsonObject]]:
        """Yield each answer as it ends: its index, prompt times ``samples`` plus sample, and its line.

        ``is_done(index)``: the answer is known already and is left out."""
        prompts = enumerate(self.prompts)
        note = self.note
        for first in range(0, self.count, self.block_prompts):
            block = islice(prompts, self.block_prompts)
            size = self.samples * min(self.block_prompts, self.count - first)
            engine = self.vllm or self._next_engine(min(self.most, size), note)
            note = lambda sentence: None  # noqa: E731 - the same sentence for each block
            waiting: dict[int, tuple[AskedPrompt, int]] = {}
            for answer in engine.run(self._requests(block, waiting, is_done)):
                asked, left = waiting.pop(answer.prompt)
                if left > 1:
                    waiting[answer.prompt] = asked, left - 1
                yield answer.prompt * self.samples + answer.sample, self._line(asked, answer)

    def _next_engine(self, most: int, note: Callable[[str], None]) -> Engine:
        self._past, self._engine = self.timing, None  # the memory of one engine is free before the next
        self._engine = Engine(*self.loaded, most, note, self.decode_weights)
        return self._engine

    def _requests(
        self,
        block: Iterable[tuple[int, AskedPrompt]],
        waiting: dict[int, tuple[AskedPrompt, int]],
        is_done: Callable[[int], bool],
    ) -> Iterator[Request]:
        """Yield the requests of a block, and keep in ``waiting`` each prompt that has answers to come."""
        for number, asked in block:
            samples = [n for n in range(self.samples) if not is_done(number * self.samples + n)]
            if samples:
                waiting[number] = asked, len(samples)
                first = self._request(number, asked, samples[0])
                yield from (replace(first, sample=sample) for sample in samples)

    def _request(self, number: int, asked: AskedPrompt, sample: int) -> Request:
        name = asked.adapter
        tokenizer = self.loaded[1] if name is None else self.tokenizers[name]
        try:
            ids = decode.prompt_ids(asked.prompt, tokenizer, self.system, self.plain)
        except DataError as error:
            raise DataError(f"row {asked.row}: {error}") from None
        if name is None:
            return Request(tuple(ids), self.params, number, sample, self.adapter)
        params = replace(self.params, stop=stop_ids(base(self.loaded[0]), tokenizer))
        return Request(tuple(ids), params, number, sample, None if name == BASE else name)

    def _line(self, asked: AskedPrompt, answer: Answer) -> JsonObject:
        """Return row, sample (from 1), prompt, answer, its tokens, why it ended, and the data's answer."""
        known = asked.as_dict()
        row, reference = known.pop("row"), known.pop("reference", None)
        line: JsonObject = {"row": row, "sample": answer.sample + 1, **known, "answer": answer.text}
        line |= {"tokens": len(answer.ids), "reason": answer.reason}
        if self.logprobs:
            line["logprobs"] = token_logprobs(answer, self.loaded[1])
        return line if reference is None else {**line, "reference": reference}


@dataclass
class OmittedText:
    """Counts the prompts whose text or tools the chat template leaves out."""

    tokenizer: PreTrainedTokenizerBase
    rows: int = 0
    first: str = ""

    def __post_init__(self) -> None:
        self._renderer = Renderer(self.tokenizer) if self.tokenizer.chat_template else None

    def add(self, asked: AskedPrompt) -> None:
        if self._renderer is None or not isinstance(asked.prompt, Chat):
            return
        try:
            omitted = find_omitted_text(asked.prompt, self._renderer)
        except RENDER_ERRORS:  # the template refuses the conversation; generation reports that
            return
        if omitted:
            self.rows += 1
            self.first = self.first or f"of row {asked.row}: {'; '.join(omitted)}"

    @property
    def warnings(self) -> list[str]:
        return (
            [f"the chat template leaves out text of {self.rows:,} prompts; {self.first}"] if self.rows else []
        )


def token_logprobs(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> list[JsonObject]:
    """Return text, id and log-probability of each token of an answer.

    ``logprob``: under the model as it is. ``rule_logprob``: under the sampling rule, if known. ``top_logprobs``: of the
    likeliest tokens, if asked for."""

    def named(token: int, logprob: float) -> JsonObject:
        return {"token": tokenizer.decode([token]), "id": token, "logprob": round(logprob, LOGPROB_DIGITS)}

    found = []
    for place, token in enumerate(answer.ids):
        entry = named(token, answer.logprobs[place])
        if answer.rule_logprobs:
            entry["rule_logprob"] = round(answer.rule_logprobs[place], LOGPROB_DIGITS)
        if answer.top:
            entry["top_logprobs"] = [named(*one) for one in answer.top[place]]
        found.append(entry)
    return found


def speed(timing: Timing) -> JsonObject:
    """Return tokens, seconds and tokens per second of prefill and decoding."""

    def rate(count: int, seconds: float) -> float | None:
        return round(count / seconds, 1) if seconds else None

    return {
        "prefill_tokens": timing.prefill_tokens,
        "shared_tokens": timing.shared_tokens,
        "prefill_seconds": round(timing.prefill_seconds, 3),
        "prefill_tokens_per_second": rate(timing.prefill_tokens, timing.prefill_seconds),
        "decode_seconds": round(timing.decode_seconds, 3),
        "decode_tokens_per_second": rate(timing.decode_tokens, timing.decode_seconds),
    }
