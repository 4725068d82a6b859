"""A metric of answers that is a Python function of the user, named by its import path.

The function gets the prompts, the answers, and the references of each answer (a list of texts, empty where the
data have none), and returns one number for each answer; a larger number means a better answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith import user_functions
from tunesmith.errors import MetricError, UserError
from tunesmith.metrics.answer_metrics import Answered, AnswerMetric

EXAMPLE = "my_metrics:brevity"
PARAMETERS = ("prompts", "answers", "references")
SHOWN_CHARACTERS = 60
"""Characters of a wrong value in an error."""


def load(call: str, place: str, folder: str | None) -> AnswerMetric:
    """Return the metric ``call``. Raises UserError for a function that cannot be imported or called."""
    try:
        user_functions.check_path(call, EXAMPLE)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    function = user_functions.load(call, place, folder, PARAMETERS, {})

    def terms(answers: Sequence[Answered]) -> np.ndarray:
        return np.array([(value, 1.0) for value in _values(call, function, answers)], np.float64).reshape(
            -1, 2
        )

    words = f"mean of {call}"
    return AnswerMetric(words, "higher", terms, needs_reference=False)


def _values(call: str, function: user_functions.Function, answers: Sequence[Answered]) -> list[float]:
    """Call the function. Raises MetricError if it fails, or returns no finite number for an answer."""
    prompts, texts = [one.prompt for one in answers], [one.text for one in answers]
    references = [list(one.references) for one in answers]
    try:
        found = function(prompts, texts, references)
    except Exception as error:
        raise MetricError(
            f"{call} failed{user_functions.where(error)}: {type(error).__name__}: {error}"
        ) from error
    try:
        return user_functions.numbers(found, len(answers))
    except user_functions.NotNumbersError as problem:
        where = "" if problem.place is None else f" for the answer to row {answers[problem.place].row}"
        shown = f"{type(problem.found).__name__} {problem.found!r}"[:SHOWN_CHARACTERS]
        raise MetricError(
            f"{call}: expected {problem.expected}, got {shown}{where}. Correct the function."
        ) from None
