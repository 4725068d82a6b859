"""A reward that is a Python function of the user, named by its import path.

The function gets the prompts (texts or lists of turns), the texts of the answers, and the rows (the other
columns of the data), and returns one number for each answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tunesmith import user_functions
from tunesmith.errors import RewardError
from tunesmith.json_types import JsonObject
from tunesmith.rollout.reward_config import Completion, RewardKeys, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLE = "my_rewards:brevity"


class PythonReward(RewardKeys):
    """The numbers that a Python function returns."""

    type: Literal["python"] = "python"
    call: str = Field(
        description=f"MODULE:FUNCTION, such as {EXAMPLE}; looked for in the folder of the recipe and in the working directory"
    )
    args: JsonObject = Field({}, description="further keyword arguments of the function")
    folder: str | None = Field(None, description="folder of the module; default: that of the recipe")

    @model_validator(mode="before")
    @classmethod
    def _fill_folder(cls, keys: object, info: ValidationInfo) -> object:
        """A recipe is read from a file in a folder, which the run's copy of the recipe must remember."""
        folder = (info.context or {}).get("folder")
        return {"folder": folder, **keys} if isinstance(keys, dict) and folder else keys

    @field_validator("call")
    @classmethod
    def _check_call(cls, call: str) -> str:
        user_functions.check_path(call, EXAMPLE)
        return call

    def default_name(self) -> str:
        return self.call.partition(":")[2]

    def scorer(self, place: str, tokenizer: PreTrainedTokenizerBase) -> Scorer:
        parameters = ("prompts", "completions", "rows")
        function = user_functions.load(self.call, f"{place}.call", self.folder, parameters, self.args)

        def score(answers: Sequence[Completion]) -> object:
            prompts = [_shown(answer) for answer in answers]
            texts = [answer.text for answer in answers]
            rows = [dict(answer.row.columns) for answer in answers]
            try:
                return function(prompts, texts, rows, **self.args)
            except Exception as error:
                raise RewardError(
                    f"{self.call} failed{user_functions.where(error)}: {type(error).__name__}: {error}"
                ) from error

        return score


def _shown(answer: Completion) -> str | list[JsonObject]:
    """The prompt as the row has it: a text, or a list of turns."""
    prompt = answer.row.prompt
    return prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
