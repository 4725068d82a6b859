"""What numbers say of answers that were compared: ranks, scores and margins, in columns or beside each answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunesmith.data.formats.fields import FieldFault, Values, parsed
from tunesmith.data.row_problems import shorten

NAMES = ("rank", "score", "overall_score", "rating")
"""Keys of the grade that stands beside an answer, as in {"answer": "...", "rank": 1}."""

LARGEST = 1e30
"""Scores become float32, and so do their differences."""

Numbers = tuple[float, ...]


def of_pair(values: Values) -> Numbers | None:
    """Scores of the chosen and the rejected answer: each by its name, else a list of both, else a margin and 0."""
    if not values.get("gold", True):
        return None
    given = {
        name: values[name]
        for name in ("chosen_score", "rejected_score")
        if values.get(name) not in (None, "")
    }
    if len(given) == 1:
        (there,), (missing,) = given, {"chosen_score", "rejected_score"} - given.keys()
        raise FieldFault(missing, f"a score, as there is a {there}", "nothing", "Write both scores, or none.")
    if given:
        return _number(given["chosen_score"], "chosen_score"), _number(
            given["rejected_score"], "rejected_score"
        )
    if values.get("scores") not in (None, ""):
        return _numbers(values["scores"], "scores", 2)
    return None if values.get("margin") in (None, "") else (_number(values["margin"], "margin"), 0.0)


def of_ranking(values: Values, answers: Sequence[Any]) -> tuple[tuple[int, ...], Numbers | None]:
    """(ranks from 0 = best, scores if there are any) of answers as the file has them: as columns say, or keys beside each answer,
    or their order."""
    count = len(answers)
    if not values.get("gold", True):
        return (0,) * count, None
    judged = [name for name in ("ranks", "scores", "labels") if values.get(name) is not None]
    numbers = _beside(answers, bool(judged)) if all(isinstance(item, Mapping) for item in answers) else {}
    numbers |= {name: _numbers(values[name], name, count) for name in judged}
    scores = numbers.get("scores")
    if "ranks" in numbers:
        return _dense(numbers["ranks"], best=min), scores
    if scores is not None or "labels" in numbers:
        return _dense(numbers["labels"] if scores is None else scores, best=max), scores
    return tuple(range(count)), None


def _beside(answers: Sequence[Mapping[str, Any]], judged: bool) -> dict[str, Numbers]:
    """Ranks or scores. Where answers may be graded under a key that nobody knows, their order in the file says nothing."""
    there = [key for key in NAMES if any(key in item for item in answers)]
    if there:
        grade = next((key for key in there if all(key in item for item in answers)), there[0])
        places = [f"answers[{place}].{grade}" for place in range(len(answers))]
        missing = next((place for place, item in zip(places, answers) if grade not in item), None)
        if missing is not None:
            raise FieldFault(
                missing,
                f"a {grade}, as other answers have one",
                "nothing",
                f"Write it, or take every {grade} out.",
            )
        numbers = tuple(_number(item[grade], place) for place, item in zip(places, answers))
        return {"ranks" if grade == "rank" else "scores": numbers}
    odd = [
        (place, key)
        for place, item in enumerate(answers)
        for key, number in item.items()
        if isinstance(number, int | float)
    ]
    if odd and not judged:
        place, key = odd[0]
        fix = "Rename it, add a column with the ranks, or take it out: then the best answer stands first."
        raise FieldFault(
            f"answers[{place}].{key}", f"a grade under {', '.join(NAMES)}", f"a number under {key!r}", fix
        )
    return {}


def _numbers(value: Any, field: str, count: int) -> Numbers:
    value = parsed(value, field, "a list of numbers")
    if not isinstance(value, list | tuple) or len(value) != count:
        got = f"{len(value)}: {shorten(value)}" if isinstance(value, list | tuple) else shorten(value)
        raise FieldFault(
            field,
            f"a list of {count} numbers, one for each answer",
            got,
            "Write as many as there are answers.",
        )
    return tuple(_number(item, f"{field}[{place}]") for place, item in enumerate(value))


def _number(value: Any, field: str) -> float:
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if not isinstance(number, int | float) or (isinstance(number, bool) and not field.startswith("labels")):
        raise FieldFault(field, "a number", shorten(value), "Write the number, or delete the row.")
    if not abs(number) <= LARGEST:
        raise FieldFault(field, "a finite number", shorten(value), "Write the number, or delete the row.")
    return float(number)


def _dense(numbers: Sequence[float], best: Callable[..., float]) -> tuple[int, ...]:
    """0 for the best ones, 1 for the next, ..."""
    order = sorted(set(numbers), reverse=best is max)
    return tuple(order.index(number) for number in numbers)
