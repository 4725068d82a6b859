"""The engine of all sampling: a queue of prompts, and as many running rows as memory allows.

A row that ends frees its slot, and prompts of the queue take free slots while the other rows run (continuous
batching; Yu et al., OSDI 2022). Prompts run together without padding, so they wait until an eighth of the slots is
free. Tokens of a prompt that a slot already holds are reused or copied, so several samples of one prompt, and the
turns of a chat, share their prefix. A row's answer depends only on its prompt, sampling rule, seed and number, not on
the other rows.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from tunesmith import machine
from tunesmith.errors import ModelError, UserError
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.generate import sampling
from tunesmith.models.generate.decode_step import DecodeWeights, decode_step
from tunesmith.models.generate.row_adapters import CannotStack, RowAdapters
from tunesmith.models.generate.running_rows import Answer, Request, Row, token_limit
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.generate.slots import Slots, Timing
from tunesmith.models.generate.stop_tokens import stop_ids
from tunesmith.models.network import adapter_state, base, context_window, is_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_RUNNING = 64
"""Rows that run at once, if memory allows: more gain little on a CPU."""
SAMPLED = 64
"""Numbers of each parameter that are part of the fingerprint."""

OnToken: TypeAlias = Callable[[Request, int, str], None]
"""Callback for each token: its request, its id and the text that has become final."""


class Engine:
    """Continues prompts with one model. Between calls of ``run``, slots keep their tokens for reuse as
    prefixes.

    A run that samples from the model it trains keeps one engine (``objectives.Session.sample``). Each call of
    ``run`` computes with the weights as they are at that moment, also of an adapter, and every answer carries
    their ``fingerprint``. The forward pass is chosen and checked in the first call only; it is chosen again if
    the network gets other layers. ``release`` frees the memory of the slots between two calls. An answer
    depends on its tokens, ``SamplingParams`` (with the seed), ``prompt`` and ``sample`` alone. It has the
    log-probability of each token under the model as it is (``logprobs``) and under the sampling rule
    (``rule_logprobs``), and the ``reason`` why it ended.

    ``max_running``: rows at once; None = as memory allows, at most ``MAX_RUNNING``. ``note``: called once with a
    sentence if the model runs row by row. ``decode_weights``: ``"int8"`` rounds the weights that decoding reads; never
    for log-probabilities that training learns from. Raises ModelError for a model whose decoding cannot read them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_running: int | None = None,
        note: Callable[[str], None] = lambda sentence: None,
        decode_weights: DecodeWeights = "stored",
    ) -> None:
        if max_running is not None and max_running < 1:
            raise UserError(f"max_running is {max_running}; expected at least 1")
        self.model, self.tokenizer = model, tokenizer
        self.core, self.decode_weights = _core(model), decode_weights
        check_decode_weights(self.core, decode_weights)
        self.slots = Slots(self.core, max_running or MAX_RUNNING, note, decode_weights)
        self.stop = stop_ids(self.core, tokenizer)
        self._fingerprint, self._layers = "", ""

    @property
    def timing(self) -> Timing:
        """Seconds and tokens of all runs so far."""
        return self.slots.timing

    def run(self, requests: Iterable[Request], on_token: OnToken | None = None) -> Iterator[Answer]:
        """Yield the answers as they end. ``requests`` are taken one by one, as slots become free.

        The model is in evaluation mode until the last answer. An exception in ``on_token`` ends that answer
        alone. Raises UserError for a prompt that is empty or fills the window.
        """
        for rows in self._steps(requests, on_token is not None):
            for row in rows:
                if on_token is not None and row.ids:
                    try:
                        on_token(row.request, row.ids[-1], row.piece)
                    except Exception as error:  # noqa: BLE001 - whatever one reader raises must not cost the others
                        row.reason, row.error = "callback", error
                if row.reason:
                    yield row.answer(self.tokenizer, self._fingerprint)

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the answers in the order of ``requests``, whose pairs (prompt, sample) must differ."""
        found = {(answer.prompt, answer.sample): answer for answer in self.run(requests)}
        return [found[request.prompt, request.sample] for request in requests]

    def release(self) -> None:
        """Free the memory of the slots, for example before a training step. No row may run."""
        self.slots.drop()

    def stream(self, request: Request) -> Iterator[str]:
        """Yield the text of one answer in pieces, each character when all its tokens are there."""
        for rows in self._steps([request], streamed=True):
            yield from (row.piece for row in rows if row.piece)

    def check(self, requests: Iterable[Request]) -> None:
        """Raise UserError for the first prompt that is empty or fills the window, or an unknown adapter."""
        self._check_weights()
        for request in requests:
            self._limit(request)
            self.slots.adapters.resolve(request.adapter)

    def _steps(self, requests: Iterable[Request], streamed: bool) -> Iterator[list[Row]]:
        """Yield the rows that got a token, or ended without one, after each step."""
        self.slots.wanted = len(requests) if isinstance(requests, Sequence) else self.slots.most
        waiting, source = deque[Row](), iter(requests)
        running: list[Row] = []
        training = self.model.training
        self.model.eval()
        self._check_weights()
        try:
            while True:
                new = self._admit(waiting, source, streamed) if self.slots.ready else []
                if not new and not running:
                    return
                running += new
                rows = new or running
                live = [row for row in rows if not row.reason]
                if live and not self._advance(live):
                    waiting.extendleft(reversed([row for row in running if not row.reason]))
                    self.slots.halve(running)
                    running = rows = [row for row in running if row.reason]
                yield rows
                for row in rows:
                    if row.reason:
                        self.slots.release(row)
                running = [row for row in running if not row.reason]
        finally:
            for row in running:
                self.slots.release(row)
            self.model.train(training)

    def _admit(self, waiting: deque[Row], source: Iterator[Request], streamed: bool) -> list[Row]:
        """Return the next rows of the queue, each with a slot; a row that has ended needs none."""
        new: list[Row] = []
        while True:
            if not waiting:
                request = next(source, None)
                if request is None:
                    return new
                waiting.append(self._row(request, streamed))
            if not waiting[0].reason and not self.slots.take(waiting[0]):
                return new
            new.append(waiting.popleft())

    def _advance(self, rows: list[Row]) -> bool:
        """Add a token to each row. Return False, and add none, if memory runs out with several rows."""
        try:
            logits = self.slots.forward(rows)
            began = perf_counter()
            self._take(rows, logits)
        except (RuntimeError, MemoryError) as error:
            if not machine.is_out_of_memory(error) or self.slots.taken < 2:
                raise
            return False
        self.timing.decode_seconds += perf_counter() - began
        return True

    def _check_weights(self) -> None:
        """Empty the slots if the weights are not those that filled them; choose the pass of other layers."""
        now, layers = fingerprint(self.model, self.decode_weights), _layers(self.core)
        if layers != self._layers:
            self.slots.choose_again()
        elif now != self._fingerprint:
            self.slots.forget()
        self._fingerprint, self._layers = now, layers

    # ------------------------------------------------------------------------------------------------ rows

    def _row(self, request: Request, streamed: bool) -> Row:
        limit, params = self._limit(request), request.params
        uniform = None
        if params.temperature > 0:
            uniform = sampling.uniform_numbers(params.seed, request.prompt, request.sample, limit)
        adapter = self.slots.adapters.resolve(request.adapter)
        return Row.begin(request, limit, self.stop, self.tokenizer, streamed, uniform, adapter)

    def _limit(self, request: Request) -> int:
        """Return how many tokens the answer may have before the model's window is full."""
        window = context_window(self.core.config) or 10**9
        return token_limit(request, window, virtual_tokens.count(self.core))

    def _take(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Draw a token for each row from ``logits`` (rows, vocabulary) and end the rows that are complete.

        All are drawn before the first is added: if memory runs out, no row has a token.
        """
        taken: list[tuple[Row, list[tuple[int, float]], int, float, float]] = []
        for params, members in _by_rule(rows).items():
            mine = [rows[index] for index in members]
            scores = logits if len(members) == len(rows) else logits[members]
            drawn = self._draw(mine, scores, params)
            likeliest = _likeliest(scores, params.top_logprobs) if params.top_logprobs else [[]] * len(mine)
            columns = (column.tolist() for column in (drawn.tokens, drawn.logprobs, drawn.rule_logprobs))
            taken += zip(mine, likeliest, *columns, strict=True)
        for row, top, token, logprob, rule_logprob in taken:
            row.logprobs.append(logprob)
            row.rule_logprobs.append(rule_logprob)
            if row.request.params.top_logprobs:
                row.top.append(top)
            row.add(token)

    @torch.inference_mode()
    def _draw(self, rows: Sequence[Row], scores: Tensor, params: SamplingParams) -> sampling.Drawn:
        numbers = [float(row.uniform[len(row.ids)]) for row in rows if row.uniform is not None]
        uniform = torch.tensor(numbers, dtype=torch.float64, device=scores.device) if numbers else None
        before = [row.request.ids for row in rows], [row.ids for row in rows]
        return sampling.draw(scores, params, uniform, *before, stop=rows[0].stop)


def _by_rule(rows: Sequence[Row]) -> dict[SamplingParams, list[int]]:
    """Group the rows that have the same sampling rule and stop tokens."""
    groups: dict[int, tuple[SamplingParams, list[int]]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(id(row.request.params), (row.request.params, []))[1].append(index)
    merged: dict[SamplingParams, list[int]] = {}
    for params, members in groups.values():
        merged.setdefault(params.rule, []).extend(members)
    return merged


def _likeliest(logits: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Return the ``count`` likeliest tokens of each row with their log-probabilities."""
    values, ids = logits.log_softmax(dim=-1).topk(count, dim=-1)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def fingerprint(model: PreTrainedModel, decode_weights: DecodeWeights = "stored") -> str:
    """Return a hash of some numbers of every parameter: training, merging or another adapter changes it.

    With int8 weights it ends with their name: the model is not the policy that training knows.
    """
    digest = hashlib.sha256(adapter_state(model).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]
        digest.update(name.encode() + some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] + ("" if decode_weights == "stored" else f"-{decode_weights}")


def check_decode_weights(core: PreTrainedModel, decode_weights: DecodeWeights) -> None:
    """Raise ModelError if decoding of ``core`` with its adapters cannot read such weights."""
    if decode_weights == "stored":
        return
    advice = "Leave it out to decode with the weights as they are stored."
    if decode_step(core) is None:
        where = f"in {str(core.dtype).removeprefix('torch.')} on {core.device.type}"
        raise ModelError(
            f"decode_weights {decode_weights} is not supported for {type(core).__name__} {where}: it needs a network of "
            f"llama's structure in fp32 or bf16 on a CPU, and a C compiler.\n  {advice}"
        )
    adapters = RowAdapters(core)
    try:
        if adapters.layers:
            adapters.stack(adapters.names)
    except CannotStack as reason:
        raise ModelError(
            f"decode_weights {decode_weights} is not supported with this adapter: {reason}.\n  {advice}"
        ) from None


def _layers(core: PreTrainedModel) -> str:
    """Return the layers that have parameters, and the adapters that take part, as one text."""
    names = " ".join(name for name, _ in core.named_parameters())
    return f"{virtual_tokens.count(core)} {adapter_state(core)} {names}"


def _core(model: PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model that computes logits; a LoRA is inside it."""
    virtual = is_peft(model) and model.active_peft_config.is_prompt_learning
    if virtual and not virtual_tokens.is_installed(model):
        raise ModelError("this adapter adds virtual tokens. Load it with tunesmith.load, or from a folder.")
    return base(model)
