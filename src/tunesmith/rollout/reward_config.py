"""The keys that every reward has, and the answers that it scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.data.rows import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """One answer to score. ``text`` has no stop token; ``ids`` end with it if the answer ``stopped`` by one.

    ``row``: its prompt, with the other columns of the row. ``name``: for messages, such as ``rollout:3:1``.
    """

    row: Prompt
    text: str
    ids: Sequence[int]
    stopped: bool
    name: str

    @property
    def tokens(self) -> int:
        """Tokens of the answer, without the one that ended it."""
        return len(self.ids) - self.stopped


class Scorer(Protocol):
    """A reward that is ready to score: one number for each answer."""

    def __call__(self, answers: Sequence[Completion]) -> object: ...


class RewardKeys(BaseModel):
    """Keys that every reward has. A reward is a subclass with a key ``type``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    weight: float = Field(1.0, description="factor of this reward in the sum; negative = a penalty")
    name: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="its name in logs and figures; default: the type, the function's name, or the run's",
    )

    def default_name(self) -> str:
        """The name where the recipe gives none."""
        kind: str = type(self).model_fields["type"].default
        return kind

    def columns(self) -> tuple[str, ...]:
        """Columns that every row of the data must have."""
        return ()

    def scorer(self, place: str, tokenizer: PreTrainedTokenizerBase) -> Scorer:
        """Return the reward, ready to score; no weights are loaded.

        Every reward writes it. ``place``: the key of the recipe, for errors. ``tokenizer``: the policy's. Raises
        UserError.
        """
        raise NotImplementedError
