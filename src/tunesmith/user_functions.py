"""Functions that a user writes and names by import path, ``MODULE:FUNCTION``: rewards and metrics of answers.

They get lists, with one item for each answer, and return one number for each answer.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from tunesmith.errors import RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.suggestions import did_you_mean

Function = Callable[..., object]


class NotNumbersError(Exception):
    """A function returned something else than one finite number for each answer.

    ``place``: the answer whose number is wrong; None if the whole value is. ``found``: what was returned.
    """

    def __init__(self, expected: str, found: object, place: int | None = None) -> None:
        super().__init__(expected)
        self.expected, self.found, self.place = expected, found, place


def check_path(call: str, example: str) -> None:
    """Raise ValueError unless ``call`` has the form MODULE:FUNCTION."""
    module, colon, function = call.partition(":")
    if not colon or not function.isidentifier() or not all(map(str.isidentifier, module.split("."))):
        raise ValueError(f"expected MODULE:FUNCTION, such as {example}, got {call!r}")


def load(call: str, place: str, folder: str | None, parameters: Sequence[str], args: JsonObject) -> Function:
    """Import the function ``call``, which takes ``parameters`` by position and ``args`` by name.

    ``folder`` and the working directory are searched for the module. ``place``: recipe key or flag, for
    errors. Raises RecipeError for a module or a function that cannot be used.
    """
    function = _function(call, place, folder)
    try:
        inspect.signature(function).bind(*([] for _ in parameters), **args)
    except TypeError as error:
        arguments = ", ".join([*parameters, *(f"{key}=..." for key in args)])
        raise RecipeError(
            f"{place}: {call} cannot be called as f({arguments}): {error}.\n  Correct the function, or its arguments."
        ) from None
    except ValueError:  # a function of a compiled module shows no signature
        pass
    return function


def numbers(values: object, count: int) -> list[float]:
    """Return what a function returned as ``count`` floats. Raises NotNumbersError."""
    listed = _plain(values, "tolist")  # of an array or a tensor
    if not isinstance(listed, list | tuple):
        raise NotNumbersError(f"a list of {count} numbers, one for each answer", values)
    if len(listed) != count:
        raise NotNumbersError(f"{count} numbers, one for each answer", len(listed))
    for place, value in enumerate(listed):
        number = _plain(value, "item")  # of a number of NumPy or torch
        if not isinstance(number, int | float) or not abs(number) <= sys.float_info.max:
            raise NotNumbersError("a finite number for each answer", value, place)
    return [float(value) for value in listed]


def where(error: BaseException) -> str:
    """Return `` (my_rewards.py, line 12)``: the last line of the user's code before the error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    package = str(Path(__file__).parent)
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename
    ]
    own = [frame for frame in frames if not frame.filename.startswith(package)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def _plain(value: object, method: str) -> object:
    convert = getattr(value, method, None)
    return convert() if convert else value


def _function(call: str, place: str, folder: str | None) -> Function:
    module_name, _, name = call.partition(":")
    module = _module(module_name, place, folder)
    found = vars(module).get(name)
    if found is None:
        functions = [key for key, one in vars(module).items() if callable(one) and not key.startswith("_")]
        raise RecipeError(
            f"{place}: {module.__file__} has no function {name!r}. {did_you_mean(name, functions)}"
        )
    if not callable(found) or isinstance(found, type) or inspect.iscoroutinefunction(found):
        kind = "an async function" if inspect.iscoroutinefunction(found) else f"a {type(found).__name__}"
        raise RecipeError(f"{place}: expected {call} to be a function that returns numbers, it is {kind}")
    return found


def _module(name: str, place: str, folder: str | None) -> ModuleType:
    """Import the module. The folders stay on Python's path, because a function may import from them later."""
    folders = [str(Path(one).resolve()) for one in dict.fromkeys((folder or ".", "."))]
    sys.path[:0] = [one for one in folders if one not in sys.path]
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise RecipeError(f"{place}: {name} cannot be imported{where(error)}: {error}") from error
        raise RecipeError(
            f"{place}: there is no module {name!r} in {' or '.join(folders)}.\n"
            f"  Write the function into {Path(folders[0]) / name.replace('.', '/')}.py, or correct {place}."
        ) from None
    except Exception as error:
        raise RecipeError(
            f"{place}: {name} cannot be imported{where(error)}: {type(error).__name__}: {error}"
        ) from error
