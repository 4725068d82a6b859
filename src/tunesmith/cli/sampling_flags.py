"""The flags of the sampling rule: one table gives ``generate`` and ``chat`` their options, help and values."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.errors import SettingError, UserError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.models.generate.decode import Loaded
    from tunesmith.models.generate.sampling import SamplingParams


@dataclass(frozen=True)
class Flag:
    """A flag. ``field``: the field of ``SamplingParams`` that it sets; None = it only changes the output."""

    field: str | None
    type: object
    default: object
    help: str
    metavar: str | None = None

    @property
    def is_number(self) -> bool:
        return self.type in (int, float)


_TEXTS = list[str] | None
FLAGS = {
    "max_new_tokens": Flag("max_new_tokens", int, 256, "Longest answer, in tokens."),
    "min_new_tokens": Flag("min_new_tokens", int, 0, "Tokens before the answer may end by itself."),
    "temperature": Flag("temperature", float, 0.0, "0 = always the likeliest token; 1 = as the model is."),
    "top_k": Flag("top_k", int, 0, "Draw from the K likeliest tokens; 0 = all."),
    "top_p": Flag("top_p", float, 1.0, "Draw from the likeliest tokens with this total probability; 1 = all."),
    "min_p": Flag("min_p", float, 0.0, "Least probability of a token, relative to the likeliest; 0 = any."),
    "typical_p": Flag("typical_p", float, 1.0, "Draw from the tokens of most typical information; 1 = all."),
    "repetition_penalty": Flag(
        "repetition_penalty", float, 1.0, "Divides the logit of tokens in prompt and answer; 1 = off."
    ),
    "presence_penalty": Flag(
        "presence_penalty", float, 0.0, "Subtracted from the logit of tokens in the answer, once."
    ),
    "frequency_penalty": Flag(
        "frequency_penalty", float, 0.0, "Subtracted from the logit of tokens in the answer, each time."
    ),
    "bad_word": Flag("bad_words", _TEXTS, None, "Text that no answer holds; may be repeated.", "TEXT"),
    "logit_bias": Flag(
        "logit_bias", _TEXTS, None,
        "Number added to the logit of a token (its id, or a text of one token), or a JSON file of "
        "{token: number}; may be repeated.", "TOKEN=NUMBER|FILE",
    ),
    "stop": Flag("stop_strings", _TEXTS, None, "Text that ends the answer, which lacks it; may be repeated.", "TEXT"),
    "choice": Flag("choices", _TEXTS, None, "The answer is one of these texts; may be repeated.", "TEXT"),
    "seed": Flag("seed", int, 0, "Same seed and prompts, same answers."),
    "logprobs": Flag(None, bool, False, "Give the log-probability of each token in the JSON output."),
    "top_logprobs": Flag("top_logprobs", int, 0, "Give the N likeliest tokens at each position, too.", "N"),
}  # fmt: skip
"""Name -> flag. ``max_new_tokens`` is ``--max-new-tokens``."""


def flag_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def with_flags(**defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb the flags of the table; it gets their values as the argument ``sampling``.

    ``defaults``: the verb's defaults that differ from the table's.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def command(**given: Any) -> None:
            sampling = SamplingFlags({name: given.pop(name) for name in FLAGS})
            sampling.check()
            verb(**given, sampling=sampling)

        signature = inspect.signature(verb, eval_str=True)
        own = [one for name, one in signature.parameters.items() if name != "sampling"]
        options = [_parameter(name, flag, defaults.get(name, flag.default)) for name, flag in FLAGS.items()]
        first, last = (
            [one for one in own if one.name != "as_json"],
            [one for one in own if one.name == "as_json"],
        )
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*first, *options, *last)]
        described: Any = command  # typer reads both attributes
        described.__signature__ = signature.replace(parameters=parameters)
        described.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def _parameter(name: str, flag: Flag, default: object) -> inspect.Parameter:
    option = typer.Option(flag_name(name), help=flag.help, metavar=flag.metavar, rich_help_panel="Sampling")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[flag.type, option]
    )


@dataclass(frozen=True)
class SamplingFlags:
    """The values of the flags of one command line, by name."""

    values: JsonObject

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.values["logprobs"] or self.values["top_logprobs"])

    def check(self) -> None:
        """Raise UserError, which names the flag and its range, before a model is loaded."""
        for name, flag in FLAGS.items():
            if flag.type == _TEXTS and not all(self.values[name] or ["-"]):
                raise UserError(f"{flag_name(name)} is ''; expected a text that is not empty")
        _biases(self.values["logit_bias"])
        self._params(None)

    def params(self, loaded: Loaded) -> SamplingParams:
        """Return the sampling rule, with the texts of the flags as tokens of the model."""
        return self._params(loaded)

    def _params(self, loaded: Loaded | None) -> SamplingParams:
        """Return the rule; without the model, without the settings that are made of tokens."""
        from tunesmith.models.generate.sampling import SamplingParams

        numbers = {
            flag.field: self.values[name] for name, flag in FLAGS.items() if flag.is_number and flag.field
        }
        tokens: JsonObject = {} if loaded is None else self._tokens(loaded)
        try:
            params = SamplingParams(**numbers, stop_strings=tuple(self.values["stop"] or ()), **tokens)
        except SettingError as error:
            name = next(name for name, flag in FLAGS.items() if flag.field == error.name)
            raise UserError(f"{flag_name(name)} is {error.value}; expected {error.expected}") from None
        if params.min_new_tokens > params.max_new_tokens:
            raise UserError(
                f"--min-new-tokens is {params.min_new_tokens}; expected at most --max-new-tokens, {params.max_new_tokens}"
            )
        longest = max(map(len, params.choices), default=0)
        if longest > params.max_new_tokens:
            raise UserError(
                f"--max-new-tokens is {params.max_new_tokens}; expected at least {longest}, the tokens of the longest --choice"
            )
        return params

    def _tokens(self, loaded: Loaded) -> JsonObject:
        """Return the settings that are made of tokens. Raises UserError for what the vocabulary lacks."""
        from tunesmith.models.network import base

        network, tokenizer = loaded
        size = int(base(network).config.get_text_config().vocab_size)
        if self.values["top_logprobs"] > size:
            raise UserError(
                f"--top-logprobs is {self.values['top_logprobs']}; expected at most {size}, the vocabulary"
            )
        return {
            "bad_words": tuple(
                dict.fromkeys(
                    tuple(_ids(tokenizer, variant))
                    for word in self.values["bad_word"] or ()
                    for variant in (word, f" {word.lstrip()}")
                )
            ),
            "logit_bias": {
                _token_id(tokenizer, token, size): bias
                for token, bias in _biases(self.values["logit_bias"]).items()
            },
            "choices": tuple(
                tuple(_ids(tokenizer, text)) for text in dict.fromkeys(self.values["choice"] or ())
            ),
        }


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _biases(given: list[str] | None) -> dict[str, float]:
    """Parse TOKEN=NUMBER options and files of ``{token: number}``. Raises UserError."""
    found: dict[str, object] = {}
    for option in given or ():
        token, equals, number = option.rpartition("=")
        if equals and token:
            found[token] = number
            continue
        try:
            read = json.loads(Path(option).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"--logit-bias {option}: expected TOKEN=NUMBER, or a JSON file of {{token: number}} ({error})"
            ) from None
        if not isinstance(read, dict):
            raise UserError(f"--logit-bias {option}: expected an object {{token: number}} in this file")
        found |= read
    return {token: _finite(token, number) for token, number in found.items()}


def _finite(token: str, given: object) -> float:
    try:
        number = float(str(given))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--logit-bias {token}={given}: expected a finite number, such as {token}=-5")
    return number


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str, size: int) -> int:
    """Return the id of a token that is given as its id or as its text. Raises UserError."""
    if token.isascii() and token.isdigit():
        if int(token) >= size:
            raise UserError(
                f"--logit-bias {token}: expected a token id below {size}, the size of the vocabulary"
            )
        return int(token)
    ids = _ids(tokenizer, token)
    if len(ids) == 1:
        return ids[0]
    known = tokenizer.get_vocab().get(token)
    if known is not None:
        return int(known)
    parts = ", ".join(f"{tokenizer.decode([one])!r} ({one})" for one in ids)
    raise UserError(
        f"--logit-bias {token!r}: expected one token, and this is {len(ids)}: {parts}.\n  Give the id of one of them."
    )
