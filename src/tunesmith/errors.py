"""Every error a user can meet, and the exit code each one stands for.

    TunesmithError                 exit 1: a bug of ours
    +-- UserError                  exit 2: the recipe, the data or the model folder is wrong; nothing was started
    |   +-- RecipeError
    |   +-- DataError
    |   |   +-- ReadOnceError
    |   +-- ModelError
    |   +-- MissingExtra
    +-- StoppedError               exit 3: training stopped itself; the last good checkpoint is kept
    |   +-- NonFiniteError
    |   +-- GradientOverflowError
    |   +-- DiskFullError
    |   +-- OutOfMemoryError
    |   +-- NotReproduced
    |   +-- ProcessLost
    +-- Interrupted                exit 130: stopped by a signal, after saving

A message says what is wrong, where, what was expected and what to do next.
"""


class TunesmithError(Exception):
    """Base of all named errors. ``exit_code`` is what the command line returns."""

    exit_code = 1


class UserError(TunesmithError):
    """Something the user can mend; raised before any work is started."""

    exit_code = 2


class RecipeError(UserError):
    """An unknown key, a wrong value, or two choices that do not go together."""


class DataError(UserError):
    """A file or a row that cannot be read, or data with nothing to learn from."""


class ReadOnceError(DataError):
    """A stream, which cannot be looked at before it is read."""


class ModelError(UserError):
    """A model name or folder that cannot be used."""


class MissingExtra(UserError):
    """An optional dependency is absent."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed.\n  Type: pip install 'tunesmith[{extra}]'"
        )


class StoppedError(TunesmithError):
    """Training stopped itself; what was saved before stays."""

    exit_code = 3


class NonFiniteError(StoppedError):
    """A loss or a gradient was not finite; no update was applied."""


class GradientOverflowError(StoppedError):
    """fp16 gradients overflowed at every loss scale; no update was applied."""


class DiskFullError(StoppedError):
    """There is no room for a checkpoint; the last one is kept."""


class OutOfMemoryError(StoppedError):
    """One row alone does not fit into memory."""


class ProcessLost(StoppedError):
    """One of several processes ended, or no longer answers; the last checkpoint is kept."""


class NotReproduced(StoppedError):
    """A run that was repeated came to another end."""


class Interrupted(TunesmithError):
    """SIGINT or SIGTERM arrived; a checkpoint was saved."""

    exit_code = 130
