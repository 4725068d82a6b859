"""The metrics of answers that a user names: those of the table, and Python functions by import path."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.errors import UserError
from tunesmith.metrics import answer_metrics, python_metric
from tunesmith.metrics.answer_metrics import AnswerMetric
from tunesmith.suggestions import did_you_mean


def of_names(
    names: Sequence[str], place: str = "--metric", folder: str | None = None
) -> dict[str, AnswerMetric]:
    """Return the metrics of these names. A name with a colon is the import path of a Python function.

    ``place``: flag or recipe key, for errors. ``folder``: searched for the function, as the working directory is.
    Raises UserError for an unknown name, with the nearest one, and for a function that cannot be used.
    """
    known, found = answer_metrics.table(), dict[str, AnswerMetric]()
    for name in names:
        if ":" in name:
            short, metric = name.partition(":")[2], python_metric.load(name, place, folder)
        elif name in known:
            short, metric = name, known[name]
        else:
            raise UserError(
                f"{place}: there is no metric {name!r}. {did_you_mean(name, known)}\n"
                f"  A Python function is named by its import path, such as {python_metric.EXAMPLE}."
            )
        if short in found or (":" in name and short in known):
            raise UserError(
                f"{place}: two metrics have the name {short!r}. Leave one out, or rename the function."
            )
        found[short] = metric
    return found
