"""A reward that is a Python function of the user, named by its import path.

The function gets the prompts (texts or lists of turns), the texts of the answers, and the rows (the other
columns of the data), and returns one number for each answer.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tunesmith.errors import RecipeError, RewardError
from tunesmith.json_types import JsonObject
from tunesmith.rollout.reward_config import Completion, RewardKeys, Scorer
from tunesmith.suggestions import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Function = Callable[..., object]

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
        module, colon, function = call.partition(":")
        if not colon or not function.isidentifier() or not all(map(str.isidentifier, module.split("."))):
            raise ValueError(f"expected MODULE:FUNCTION, such as {EXAMPLE}, got {call!r}")
        return call

    def default_name(self) -> str:
        return self.call.partition(":")[2]

    def scorer(self, place: str, tokenizer: PreTrainedTokenizerBase) -> Scorer:
        function = self._function(place)
        try:
            inspect.signature(function).bind([], [], [], **self.args)
        except TypeError as error:
            arguments = ", ".join(["prompts", "completions", "rows", *(f"{key}=..." for key in self.args)])
            raise RecipeError(
                f"{place}: {self.call} cannot be called as f({arguments}): {error}.\n"
                f"  Correct the function, or {place}.args."
            ) from None
        except ValueError:  # a function of a compiled module shows no signature
            pass

        def score(answers: Sequence[Completion]) -> object:
            prompts = [_shown(answer) for answer in answers]
            texts = [answer.text for answer in answers]
            rows = [dict(answer.row.columns) for answer in answers]
            try:
                return function(prompts, texts, rows, **self.args)
            except Exception as error:
                raise RewardError(
                    f"{self.call} failed{_where(error)}: {type(error).__name__}: {error}"
                ) from error

        return score

    def _function(self, place: str) -> Function:
        module_name, _, name = self.call.partition(":")
        module = self._module(module_name, place)
        found = vars(module).get(name)
        if found is None:
            functions = [
                key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
            ]
            raise RecipeError(
                f"{place}.call: {module.__file__} has no function {name!r}. {did_you_mean(name, functions)}"
            )
        if not callable(found) or isinstance(found, type) or inspect.iscoroutinefunction(found):
            kind = "an async function" if inspect.iscoroutinefunction(found) else f"a {type(found).__name__}"
            raise RecipeError(
                f"{place}.call: expected {self.call} to be a function that returns numbers, it is {kind}"
            )
        return found

    def _module(self, name: str, place: str) -> ModuleType:
        """Import the module. The folders stay on Python's path, because a function may import from them later."""
        folders = [str(Path(folder).resolve()) for folder in dict.fromkeys((self.folder or ".", "."))]
        sys.path[:0] = [folder for folder in folders if folder not in sys.path]
        importlib.invalidate_caches()
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise RecipeError(
                    f"{place}.call: {name} cannot be imported{_where(error)}: {error}"
                ) from error
            raise RecipeError(
                f"{place}.call: there is no module {name!r} in {' or '.join(folders)}.\n"
                f"  Write the function into {Path(folders[0]) / name.replace('.', '/')}.py, or correct {place}.call."
            ) from None
        except Exception as error:
            raise RecipeError(
                f"{place}.call: {name} cannot be imported{_where(error)}: {type(error).__name__}: {error}"
            ) from error


def _shown(answer: Completion) -> str | list[JsonObject]:
    """The prompt as the row has it: a text, or a list of turns."""
    prompt = answer.row.prompt
    return prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]


def _where(error: BaseException) -> str:
    """`` (my_rewards.py, line 12)``: the last line of the user's code before the error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename
    ]
    own = [frame for frame in frames if frame.filename != __file__]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
