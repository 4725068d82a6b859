"""Every error that a user can meet; its base class decides the exit code of the command line.

A message has four parts in this order: what is wrong, where, what was expected and found, what to type next.
"""


class TunesmithError(Exception):
    """Base of all named errors. ``exit_code`` is what the command line returns: 1 is a bug in tunesmith."""

    exit_code = 1


class UserError(TunesmithError):
    """Exit 2: the recipe, the data, the model folder or the command line is wrong. Nothing was started."""

    exit_code = 2


class RecipeError(UserError):
    """An unknown key, a wrong value, or two keys that conflict."""


class DataError(UserError):
    """A file or a row that cannot be read, or data without supervised tokens."""


class ReadOnceError(DataError):
    """A stream, which cannot be inspected before training reads it."""


class SettingError(UserError):
    """A setting out of its range. The command line names its flag instead of ``name``."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{name} is {value!r}; expected {expected}")
        self.name, self.value, self.expected = name, value, expected


class ModelError(UserError):
    """A model name or folder that cannot be used."""


class MissingExtra(UserError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed.\n"
            f"  Type: pip install 'tunesmith[{extra}]'"
        )


class StoppedError(TunesmithError):
    """Exit 3: training stopped itself. Everything saved before is kept."""

    exit_code = 3


class NonFiniteError(StoppedError):
    """A loss, a gradient or an updated weight was not finite. It was not saved."""


class GradientOverflowError(StoppedError):
    """fp16 gradients overflowed at every loss scale; no update was applied."""


class DiskError(StoppedError):
    """The disk accepts no more data: it became read-only, or it is broken. The last checkpoint is kept."""


class DiskFullError(DiskError):
    """The disk has no room for a file; the last checkpoint is kept."""


class OutOfMemoryError(StoppedError):
    """A single row needs more memory than there is."""


class RewardError(StoppedError):
    """A reward raised an error or returned no score. The answers are kept, and scored when the run resumes."""


class MetricError(StoppedError):
    """A metric that a user wrote raised an error or returned no number. The answers in ``--out`` are kept."""


class StaleRolloutError(StoppedError):
    """Answers were sampled by other weights than those of the policy. No update was applied."""


class ProcessLost(StoppedError):
    """One of several processes ended or does not answer; the last checkpoint is kept."""


class NotReproduced(StoppedError):
    """A repeated run differs from the first one."""


class JudgeError(StoppedError):
    """A judge on a server does not answer. Its verdicts so far are kept."""


class ServerError(StoppedError):
    """A server that answers prompts does not answer, or not as expected. Its answers so far are kept."""


class Interrupted(TunesmithError):
    """Exit 130: SIGINT or SIGTERM arrived; a checkpoint was saved."""

    exit_code = 130
