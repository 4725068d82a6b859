"""Rewards that are rules: each scores an answer by its text, its tokens, or a column of its row.

Texts are compared after NFC, so that a decomposed Hangul syllable equals a composed one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from tunesmith.rollout.reward_config import Completion, RewardKeys, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Unit = Literal["tokens", "words", "characters"]

UNITS: dict[str, Callable[[Completion], int]] = {
    "tokens": lambda answer: answer.tokens,
    "words": lambda answer: len(answer.text.split()),
    "characters": lambda answer: len(_nfc(answer.text)),
}
"""Unit -> the number of them in an answer. Words are separated by white space, characters counted after NFC."""


class Rule(RewardKeys):
    """A reward that scores each answer alone."""

    def score(self, answer: Completion) -> float:
        """Return the reward of one answer. Every rule writes it."""
        raise NotImplementedError

    def scorer(self, place: str, tokenizer: PreTrainedTokenizerBase) -> Scorer:
        def score_all(answers: Sequence[Completion]) -> list[float]:
            return [float(self.score(answer)) for answer in answers]

        return score_all


class LengthReward(Rule):
    """-|length - target|, or minus what exceeds ``max``."""

    type: Literal["length"] = "length"
    target: int | None = Field(None, ge=0, description="the reward is -|length - target|")
    max: int | None = Field(
        None, ge=0, description="the reward is 0 up to this length, then minus the surplus"
    )
    unit: Unit = Field(
        "tokens",
        description="tokens (without the stop token), words (between white space) or characters",
    )

    @model_validator(mode="after")
    def _check_one(self) -> LengthReward:
        if (self.target is None) is (self.max is None):
            raise ValueError("set either target or max")
        return self

    def score(self, answer: Completion) -> float:
        length = UNITS[self.unit](answer)
        return -abs(length - self.target) if self.target is not None else -max(0, length - (self.max or 0))


class RegexReward(Rule):
    """1 if the answer matches a regular expression, else 0."""

    type: Literal["regex"] = "regex"
    pattern: str = Field(description="a regular expression of Python's re")
    match: Literal["search", "fullmatch"] = Field(
        "search", description="search = anywhere in the answer, fullmatch = the whole answer"
    )

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        return _compiled(pattern)

    def score(self, answer: Completion) -> float:
        expression = re.compile(_nfc(self.pattern))
        found = expression.search if self.match == "search" else expression.fullmatch
        return found(_nfc(answer.text)) is not None


class ContainsReward(Rule):
    """1 if the answer contains a text, else 0."""

    type: Literal["contains"] = "contains"
    text: str | list[str] | None = Field(None, description="a text or several, all of which must be there")
    column: str | None = Field(None, description="or: a column of the data with the text or texts")
    ignore_case: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> ContainsReward:
        if (self.text is None) is (self.column is None):
            raise ValueError("set either text or column")
        if self.text is not None and not all(_listed(self.text)):
            raise ValueError("text must not be empty: every answer contains it")
        return self

    def columns(self) -> tuple[str, ...]:
        return () if self.column is None else (self.column,)

    def score(self, answer: Completion) -> float:
        wanted = self.text if self.column is None else answer.row.columns[self.column]
        text = _comparable(answer.text, self.ignore_case)
        return all(_comparable(str(one), self.ignore_case) in text for one in _listed(wanted))


class ExactReward(Rule):
    """1 if the answer equals a column, else 0. White space counts as one space, and not at the ends."""

    type: Literal["exact"] = "exact"
    column: str = Field(description="column of the data with the right answer, or a list of right answers")
    pattern: str | None = Field(
        None,
        description="a regular expression with one group; what its last match in a text captures is compared, "
        "such as '#### (.+)'; it is also applied to the column, where it matches",
    )
    ignore_case: bool = False

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None and re.compile(_compiled(pattern)).groups != 1:
            raise ValueError(f"expected one group in parentheses, as '#### (.+)', got {pattern!r}")
        return pattern

    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, answer: Completion) -> float:
        found = self._captured(answer.text)
        if found is None:
            return 0.0
        for gold in _listed(answer.row.columns[self.column]):
            text = str(gold)
            captured = self._captured(text)
            if _is_equal(found, text if captured is None else captured, self.ignore_case):
                return 1.0
        return 0.0

    def _captured(self, text: str) -> str | None:
        """The compared part of a text; None if the pattern does not match."""
        if self.pattern is None:
            return text
        *_, last = [None, *re.finditer(_nfc(self.pattern), _nfc(text))]
        return None if last is None else last[1] or ""


class FinalStopReward(Rule):
    """1 if the answer ended by a stop token, 0 if it was cut at ``max_new_tokens``."""

    type: Literal["final_stop"] = "final_stop"

    def score(self, answer: Completion) -> float:
        return answer.stopped


def _compiled(pattern: str) -> str:
    """Return ``pattern``. Raises ValueError if it is no regular expression."""
    try:
        re.compile(_nfc(pattern))
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _comparable(text: str, ignore_case: bool) -> str:
    return _nfc(text).casefold() if ignore_case else _nfc(text)


def _is_equal(one: str, other: str, ignore_case: bool) -> bool:
    """Compare two texts, or two numbers by their value: 7, 7.0 and 1,000 are numbers."""
    texts = [" ".join(_comparable(text, ignore_case).split()) for text in (one, other)]
    numbers = [_number(text) for text in texts]
    return texts[0] == texts[1] or (numbers[0] is not None and numbers[0] == numbers[1])


NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?")


def _number(text: str) -> float | None:
    return float(text.replace(",", "")) if NUMBER.fullmatch(text) else None
