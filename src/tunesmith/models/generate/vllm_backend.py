"""Answers by vLLM instead of tunesmith's engine: at the address of a server, or in this process.

Both take the requests of ``engine.Engine`` and give its answers. Prompts are sent as tokens, and text and reason are made
here from the tokens that come back, so they are those of the engine. vLLM draws other random numbers, and greedy answers
agree up to the rounding of its products. It reports log-probabilities under the model as it is, none under the sampling
rule. Its weights are those that it was started with: training, which changes them, samples with the engine.

Nothing is sent unless a user names an address. The key comes from an environment variable.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch

from tunesmith import http_json
from tunesmith.errors import MissingExtra, ServerError, SettingError, UserError
from tunesmith.http_json import NoReply
from tunesmith.json_types import JsonObject
from tunesmith.models.find import record
from tunesmith.models.find.locate import Folder, locate
from tunesmith.models.generate.engine import MAX_RUNNING
from tunesmith.models.generate.running_rows import Answer, Request, Row, token_limit
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.generate.slots import Timing
from tunesmith.models.generate.stop_tokens import stop_ids
from tunesmith.models.load import load
from tunesmith.models.network import context_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = "vllm"
"""The value of ``--engine`` that loads vLLM in this process."""
KEY_VARIABLE = "VLLM_API_KEY"
TIMEOUT = 600.0
"""Seconds that a server may take for one answer."""
DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MOST_BIAS = 100.0
"""vLLM cuts a larger logit bias down to this without a word."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Sampled:
    """The result of one request: tokens, log-probabilities, the likeliest tokens, and vLLM's reason for the end."""

    ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish: str | None


NOTHING = Sampled([], [], [], None)
"""The result for an answer that may have no token: vLLM is not asked."""


class Vllm:
    """The common part of both kinds. ``network`` has no weights: it is the model's configuration and stop tokens."""

    def __init__(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: JsonObject
    ) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.stop = stop_ids(network, tokenizer)
        self.window = context_window(network.config) or 10**9
        self.identity = identity
        """The settings that the answers depend on, as plain JSON."""
        self.timing = Timing()
        """Tokens, and seconds of everything in ``decode_seconds``: vLLM does not tell them apart."""

    def check(self, requests: Iterable[Request]) -> None:
        """Raise UserError for a prompt that is empty or fills the window, SettingError for a rule that vLLM lacks."""
        for request in requests:
            token_limit(request, self.window)
            settings(request, 1, self.stop)

    def run(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Yield the answers as they come. ``requests`` are taken one by one."""
        began = time.perf_counter()
        for row, sampled in self._sampled(map(self._row, requests)):
            answer = self._answer(row, sampled)
            self.timing.prefill_tokens += len(row.request.ids)
            self.timing.decode_tokens += len(answer.ids)
            self.timing.decode_seconds += (now := time.perf_counter()) - began
            began = now
            yield answer

    def _row(self, request: Request) -> Row:
        return Row.begin(request, token_limit(request, self.window), self.stop, self.tokenizer)

    def _sampled(self, rows: Iterator[Row]) -> Iterator[tuple[Row, Sampled]]:
        """Yield what vLLM samples for each row, in any order. Every subclass writes it. A row that has ended needs no token."""
        raise NotImplementedError

    def _answer(self, row: Row, sampled: Sampled) -> Answer:
        """Add the tokens to the row until it ends, as the engine does."""
        for place, token in enumerate(sampled.ids):
            if row.reason:
                break
            row.add(token)
            row.logprobs += sampled.logprobs[place : place + 1]
            row.top += sampled.top[place : place + 1]
        if row.reason is None and row.stream is not None:
            row.stream.finish()
            row.reason = "stop_string" if row.stream.stopped else None
        if row.reason is None:
            if sampled.finish != "length":
                raise ServerError(
                    f"vLLM ended the answer to prompt {row.request.prompt} after {len(row.ids)} tokens ({sampled.finish}), "
                    "without a stop token of this model.\n  Serve the model whose tokenizer is used here."
                )
            row.reason = "window"  # the server's is smaller than the model's
        return row.answer(self.tokenizer, hashlib.sha256(repr(self.identity).encode()).hexdigest()[:16])


class AtAddress(Vllm):
    """A server that speaks vLLM's completions protocol. ``address``: such as http://127.0.0.1:8000/v1.

    ``served``: the model's name there; None = the only one. ``most``: requests under way at once. Raises UserError
    for a model that is not served, ServerError if the server does not answer."""

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        address: str,
        served: str | None = None,
        most: int | None = None,
    ) -> None:
        path = "" if urlsplit(address).path.strip("/") else "/v1"
        self.address, self.most = address.rstrip("/") + path, most or MAX_RUNNING
        key = os.environ.get(KEY_VARIABLE, "")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        listed = self._ask("models", None).get("data") or []
        models = {str(one.get("id")): one for one in listed if isinstance(one, dict)}
        if served is None and len(models) == 1:
            served = next(iter(models))
        if served is None or served not in models:
            raise UserError(
                f"--served-model: {self.address} serves {', '.join(models) or 'no model'}"
                + (f", not {served!r}" if served else "; name one of them")
            )
        super().__init__(
            network, tokenizer, {"engine": "vllm", "address": self.address, "served_model": served}
        )
        self.served = served
        limit = models[served].get("max_model_len")
        self.window = min(self.window, limit) if isinstance(limit, int) else self.window

    def _sampled(self, rows: Iterator[Row]) -> Iterator[tuple[Row, Sampled]]:
        return in_threads(lambda row: (row, self._complete(row)), rows, self.most)

    def _complete(self, row: Row) -> Sampled:
        if row.reason:
            return NOTHING
        body = {
            "model": self.served, "prompt": list(row.request.ids), **settings(row.request, row.limit, self.stop),
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        reply = self._ask("completions", body)
        try:
            (choice,) = reply["choices"]
            return read_choice(choice, row.request.params.top_logprobs)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise ServerError(
                f"{self.address} gives no tokens: expected token_ids, or logprobs of token_id:NUMBER, in a choice, and got "
                f"{str(reply)[:200]}.\n  Serve the model with vLLM 0.6.3 or later."
            ) from None

    def _ask(self, what: str, body: JsonObject | None) -> JsonObject:
        try:
            send = http_json.sender() if body is None else http_json.sender(TIMEOUT)
            return http_json.ask(f"{self.address}/{what}", body, self.headers, send)
        except NoReply as error:
            advice = "Answers so far are kept; type the same command to continue."
            if error.status in (401, 403):
                advice = f"The key of the server is read from the variable {KEY_VARIABLE}. {advice}"
            raise ServerError(f"vLLM at {self.address}: {error}.\n  {advice}") from None


class InProcess(Vllm):
    """vLLM in this process, with the model of a folder. Raises MissingExtra."""

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        path: str,
        precision: str,
        most: int | None,
    ) -> None:
        try:
            version = importlib.metadata.version("vllm")
            vllm: Any = importlib.import_module("vllm")
        except ModuleNotFoundError:
            raise MissingExtra("vllm", "vllm", f"--engine {HERE}") from None
        identity = {"engine": "vllm", "version": version, "dtype": DTYPES[precision]}
        super().__init__(network, tokenizer, identity)
        self.params = vllm.SamplingParams
        limits = {"max_num_seqs": most} if most else {}
        self.llm = vllm.LLM(model=path, dtype=DTYPES[precision], **limits)

    def _sampled(self, rows: Iterator[Row]) -> Iterator[tuple[Row, Sampled]]:
        listed = list(rows)
        asked = [row for row in listed if not row.reason]
        prompts = [{"prompt_token_ids": list(row.request.ids)} for row in asked]
        rules = [self.params(**settings(row.request, row.limit, self.stop)) for row in asked]
        outputs = iter(self.llm.generate(prompts, rules, use_tqdm=False) if asked else ())
        for row in listed:
            yield row, NOTHING if row.reason else _read_output(next(outputs).outputs[0], row)


def open_vllm(
    engine: str, model: str, served: str | None = None, precision: str = "auto", most: int | None = None
) -> Vllm:
    """Return the vLLM that ``--engine`` names, for the tokenizer and configuration of ``model``, without its weights."""
    if engine != HERE and not engine.startswith(("http://", "https://")):
        raise UserError(
            f"--engine is {engine!r}; expected {HERE}, or an address such as http://127.0.0.1:8000/v1"
        )
    if engine == HERE and served is not None:
        raise UserError("--served-model names a model at an address; leave it out with --engine vllm")
    if engine != HERE and precision != "auto":
        raise UserError(
            f"--precision {precision}: the server at {engine} has a precision of its own. Leave it out."
        )
    folder = locate(model)
    if folder.base is not None and engine == HERE:
        raise UserError(
            f"{model} is an adapter, and --engine vllm takes a whole model.\n  Type: tunesmith merge {model} --out DIR"
        )
    tokenizer, network = load.load_tokenizer(folder), _without_weights(folder)
    if engine == HERE:
        found: Vllm = InProcess(network, tokenizer, str(folder.path), precision, most)
    else:
        found = AtAddress(network, tokenizer, engine, served, most)
    found.identity["weights"] = record.fingerprint(folder.path)
    return found


def _without_weights(folder: Folder) -> PreTrainedModel:
    """Return the network of a folder on the meta device, with the stop tokens of its generation config."""
    from transformers import GenerationConfig

    with torch.device("meta"):
        network = load.empty_model(folder, load.load_config(folder))
    if (folder.network / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(folder.network, local_files_only=True)
    return network


def settings(request: Request, limit: int, stop: frozenset[int]) -> JsonObject:
    """Return a sampling rule in vLLM's names. All are given: it takes others from the model's folder.

    Raises SettingError for what it does not do, or does otherwise."""
    params = request.params
    default = SamplingParams()
    for name in ("typical_p", "bad_words", "choices"):
        if vars(params)[name] != vars(default)[name]:
            raise SettingError(name, vars(params)[name], "no value with --engine: vLLM does not have it")
    if any(abs(bias) > MOST_BIAS for bias in params.logit_bias.values()):
        raise SettingError(
            "logit_bias", dict(params.logit_bias), f"numbers within {MOST_BIAS:g} with --engine"
        )
    number = hashlib.sha256(f"{params.seed} {request.prompt} {request.sample}".encode()).digest()
    return {
        "max_tokens": limit, "min_tokens": min(params.min_new_tokens, limit), "temperature": params.temperature,
        "top_k": params.top_k or -1, "top_p": params.top_p, "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty, "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty, "logit_bias": dict(params.logit_bias) or None,
        "stop": list(params.stop_strings), "stop_token_ids": sorted(stop if params.stop is None else params.stop),
        "ignore_eos": True, "seed": int.from_bytes(number[:8]) >> 1, "logprobs": params.top_logprobs,
    }  # fmt: skip


def read_choice(choice: JsonObject, top: int) -> Sampled:
    """Read a choice of a completion. Raises KeyError, TypeError or ValueError for one without tokens.

    Tokens of ``logprobs`` are called ``token_id:NUMBER``."""
    found = choice.get("logprobs") or {}
    ids = choice.get("token_ids")
    if ids is None:
        ids = [_token_id(name) for name in found["tokens"]]
    likeliest = [
        _likeliest({_token_id(name): value for name, value in place.items()}, top)
        for place in found.get("top_logprobs") or ()
    ]
    logprobs = [float(value) for value in found.get("token_logprobs") or ()]
    return Sampled(list(map(int, ids)), logprobs, likeliest if top else [], choice.get("finish_reason"))


def _read_output(output: Any, row: Row) -> Sampled:
    """Read vLLM's ``CompletionOutput``: ``logprobs`` has {token: Logprob} of each position."""
    ids, top = list(output.token_ids), row.request.params.top_logprobs
    places = [{token: float(one.logprob) for token, one in place.items()} for place in output.logprobs or ()]
    logprobs = [place[token] for token, place in zip(ids, places)]
    return Sampled(
        ids, logprobs, [_likeliest(place, top) for place in places] if top else [], output.finish_reason
    )


def _likeliest(place: dict[int, float], count: int) -> list[tuple[int, float]]:
    """vLLM adds the sampled token to the likeliest ones where it is none of them."""
    return sorted(place.items(), key=lambda item: -item[1])[:count]


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def in_threads(function: Callable[[Item], Result], items: Iterator[Item], most: int) -> Iterator[Result]:
    """Yield the results of ``function`` as they come, with ``most`` calls at once.

    After an error no further item is begun; the results of the calls under way are given before it is raised. The threads
    end with the program: Ctrl-C waits for none of them."""
    results: SimpleQueue[tuple[Sequence[Result], Exception | None]] = SimpleQueue()

    def call(item: Item) -> None:
        try:
            results.put(([function(item)], None))
        except Exception as error:  # noqa: BLE001 - raised again in the thread that reads the results
            results.put(([], error))

    running, failure = 0, None
    while True:
        while failure is None and running < most:
            try:
                item = next(items)
            except StopIteration:
                break
            threading.Thread(target=call, args=(item,), daemon=True).start()
            running += 1
        if not running:
            break
        values, error = results.get()
        running, failure = running - 1, failure or error
        yield from values
    if failure is not None:
        raise failure
