"""The rewards of a recipe, mixed by weight: from sampled answers to one number each.

``rules``, ``checked_answers``, ``python_reward`` and ``reward_models`` hold the types. Everything that can be
wrong with their arguments is refused before weights are loaded. What goes wrong while they score stops the
run with a RewardError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from tunesmith import user_functions
from tunesmith.data.row_problems import RowFault, shorten
from tunesmith.data.rows import Prompt
from tunesmith.errors import RecipeError, RewardError
from tunesmith.rollout.checked_answers import JsonSchemaReward, MathReward
from tunesmith.rollout.python_reward import PythonReward
from tunesmith.rollout.reward_config import Completion, RewardKeys, Scorer
from tunesmith.rollout.reward_models import ModelReward, RewardModel
from tunesmith.rollout.rules import ContainsReward, ExactReward, FinalStopReward, LengthReward, RegexReward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.rollout.session_protocol import Session

Reward = Annotated[
    PythonReward
    | LengthReward
    | RegexReward
    | ContainsReward
    | ExactReward
    | MathReward
    | JsonSchemaReward
    | FinalStopReward
    | ModelReward,
    Field(discriminator="type"),
]
"""One item of the recipe's list of rewards."""

SUM = "reward"
"""Name of the weighted sum in logs, which no reward may have."""


@dataclass(frozen=True)
class Scored:
    """``total`` float64 (n,): the weighted sum. ``by_name``: each reward without its weight, float64 (n,)."""

    total: np.ndarray
    by_name: dict[str, np.ndarray]


class Rewards:
    """The rewards of a recipe, ready to score. Raises UserError for arguments that cannot work."""

    def __init__(
        self,
        configs: Sequence[RewardKeys],
        tokenizer: PreTrainedTokenizerBase,
        place: str = "objective.rewards",
    ) -> None:
        """``tokenizer``: the policy's. ``place``: the key of the list in the recipe, for errors."""
        self.configs = tuple(configs)
        self.names = _names(configs, place)
        self.scorers: tuple[Scorer, ...] = tuple(
            config.scorer(f"{place}.{number}", tokenizer) for number, config in enumerate(configs)
        )

    @property
    def notes(self) -> list[str]:
        """Decisions that the recipe does not show, to be printed once."""
        return [note for model in self._models for note in model.notes]

    @property
    def _models(self) -> list[RewardModel]:
        return [scorer for scorer in self.scorers if isinstance(scorer, RewardModel)]

    def open(self, run: Session) -> None:
        """Make reward models ready on the device of ``run``. Every process calls it, before it samples.

        Where a reward model can be an adapter of the policy's network, it is attached to it now."""
        for model in self._models:
            model.open(run)

    def check_rows(self, rows: Sequence[Prompt]) -> None:
        """Raise RowFault for the first row that lacks a column which a reward reads."""
        for index, row in enumerate(rows):
            for name, config in zip(self.names, self.configs, strict=True):
                for column in config.columns():
                    if column not in row.columns:
                        there = ", ".join(map(shorten, row.columns)) or "none"
                        fix = "Add it to the row, or name another column in the recipe."
                        expected = f"a column {column!r}, which the reward {name} reads"
                        raise RowFault(index, expected, f"the columns {there}", fix, column)

    def score(self, answers: Sequence[Completion]) -> Scored:
        """Score ``answers`` with every reward. Raises RewardError naming the reward and the answer."""
        total, by_name = np.zeros(len(answers)), {}
        for name, config, scorer in zip(self.names, self.configs, self.scorers, strict=True):
            values = _checked(scorer(answers), answers, name) if answers else np.zeros(0)
            by_name[name] = values
            total = total + config.weight * values
        return Scored(total, by_name)


def _names(configs: Sequence[RewardKeys], place: str) -> tuple[str, ...]:
    """The name of each reward. Raises RecipeError if there is none, or two have the same."""
    if not configs:
        raise RecipeError(
            f"{place}: expected at least one reward, such as {{type: length, max: 30, unit: words}}"
        )
    names = [config.name or _default_name(config) for config in configs]
    for number, name in enumerate(names):
        if Counter(names)[name] > 1 or name == SUM:
            why = "is the name of the sum of all rewards" if name == SUM else "is the name of two rewards"
            raise RecipeError(f"{place}.{number}: {name!r} {why}. Set {place}.{number}.name.")
    return tuple(names)


def _default_name(config: RewardKeys) -> str:
    """Return the default name; a model's folder or a function called like the sum gives its type instead."""
    name = config.default_name()
    return name if name != SUM else RewardKeys.default_name(config)


def _checked(values: object, answers: Sequence[Completion], name: str) -> np.ndarray:
    """``values`` as float64 (n,). Raises RewardError unless it is one finite number for each answer."""
    try:
        return np.array(user_functions.numbers(values, len(answers)), np.float64)
    except user_functions.NotNumbersError as problem:
        found = _kind(problem.found) if problem.found is values else str(problem.found)
        if problem.place is not None:
            answer = answers[problem.place]
            found = f"{shorten(problem.found)} for {answer.name}: {shorten(answer.text, 200)}"
        raise RewardError(f"reward {name}: expected {problem.expected}, got {found}") from None


def _kind(value: object) -> str:
    return f"{type(value).__name__} {shorten(value)}"
