"""Rewards that check an answer with a library: mathematics (math-verify) and JSON (jsonschema).

Both libraries are optional. The error for a missing one comes before the weights are loaded.
"""

from __future__ import annotations

import json
import re
import signal
import threading
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.errors import MissingExtra, RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.rollout.reward_config import Completion, RewardKeys, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)
"""An answer that is one block of code, as models write JSON."""

TIMEOUT_SECONDS = 5
"""For each expression: an answer may contain one such as 9^9^9^9."""


class MathReward(RewardKeys):
    """1 if the mathematical answer equals that of a column, else 0; compared by math-verify."""

    type: Literal["math"] = "math"
    column: str = Field(description="column of the data with the right answer")

    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def scorer(self, place: str, tokenizer: PreTrainedTokenizerBase) -> Scorer:
        if find_spec("math_verify") is None:
            raise MissingExtra("math-verify", "math", f"{place} (type: math)")

        def score(answers: Sequence[Completion]) -> list[float]:
            golds = [str(answer.row.columns[self.column]) for answer in answers]
            return [_math_equal(gold, answer.text) for gold, answer in zip(golds, answers, strict=True)]

        return score


def _math_equal(gold: str, text: str) -> float:
    """Return 1.0 if ``text`` has the value of ``gold``; a ``gold`` without mathematics is compared as text."""
    from math_verify import verify

    expected = _parsed(gold)
    if not expected:
        return float(_plain(gold) == _plain(text))
    return float(verify(list(expected), _parse(text), timeout_seconds=_timeout()))


@lru_cache(maxsize=4096)  # the answers to one prompt have one reference
def _parsed(gold: str) -> tuple[object, ...]:
    return tuple(_parse(gold))


def _parse(text: str) -> list[object]:
    from math_verify import parse

    found: list[object] = parse(text, parsing_timeout=_timeout())
    return found


def _timeout() -> int | None:
    """math-verify's timeout is an alarm, which exists on Unix and in the main thread alone."""
    alarms = "SIGALRM" in signal.Signals.__members__ and threading.current_thread() is threading.main_thread()
    return TIMEOUT_SECONDS if alarms else None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


class JsonSchemaReward(RewardKeys):
    """1 if the answer is JSON that a schema accepts, else 0. It may be in a block of code."""

    type: Literal["json_schema"] = "json_schema"
    definition: JsonObject | str = Field(description="the JSON schema, or the path of a .json file with it")

    def scorer(self, place: str, tokenizer: PreTrainedTokenizerBase) -> Scorer:
        if find_spec("jsonschema") is None:
            raise MissingExtra("jsonschema", "json", f"{place} (type: json_schema)")
        is_valid = _validator(self._schema(place), place)

        def score(answers: Sequence[Completion]) -> list[float]:
            return [float(_accepts(is_valid, answer.text)) for answer in answers]

        return score

    def _schema(self, place: str) -> JsonObject:
        if not isinstance(self.definition, str):
            return self.definition
        try:
            schema = json.loads(Path(self.definition).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{place}.definition: {self.definition} cannot be read: {error}") from None
        if not isinstance(schema, dict):
            raise RecipeError(f"{place}.definition: expected a JSON object in {self.definition}")
        return schema


def _validator(schema: JsonObject, place: str) -> Callable[[object], bool]:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise RecipeError(f"{place}.definition is no JSON schema: {error.message}") from None
    is_valid: Callable[[object], bool] = kind(schema).is_valid
    return is_valid


def _accepts(is_valid: Callable[[object], bool], text: str) -> bool:
    if block := FENCED.fullmatch(text):
        text = block[1]
    try:
        return is_valid(json.loads(text))
    except (ValueError, RecursionError):
        return False
