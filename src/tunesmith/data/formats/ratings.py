"""Grades of compared answers: ranks, scores and margins, in columns of the row or as keys of each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunesmith.data.formats.fields import FieldFault, Values, parse_json
from tunesmith.data.row_problems import shorten

GRADE_KEYS = ("rank", "score", "overall_score", "rating")
"""Keys of the grade of an answer, as in {"answer": "...", "rank": 1}."""

LARGEST = 1e30
"""Scores and their differences are stored as float32."""

NUMBER_FIX = "Write the number, or delete the row."

Numbers = tuple[float, ...]


def pair_scores(values: Values) -> Numbers | None:
    """Scores of chosen and rejected: from two columns, else a list of both, else (margin, 0)."""
    if not values.needs_gold:
        return None
    names = ("chosen_score", "rejected_score")
    given = [name for name in names if _is_set(values, name)]
    if len(given) == 1:
        (missing,) = set(names) - set(given)
        expected = f"a score, as there is a {given[0]}"
        raise FieldFault(missing, expected, "nothing", "Write both scores, or none.")
    if given:
        return tuple(_number(values[name], name) for name in names)
    if _is_set(values, "scores"):
        return _numbers(values["scores"], "scores", 2)
    return (_number(values["margin"], "margin"), 0.0) if _is_set(values, "margin") else None


def _is_set(values: Values, name: str) -> bool:
    return values.get(name) not in (None, "")


def ranks_and_scores(values: Values, answers: Sequence[object]) -> tuple[tuple[int, ...], Numbers | None]:
    """(ranks, 0 = best; scores if given): from columns, else from keys of the answers, else their order.

    ``answers``: as the file has them. Ranks take precedence over scores, and scores over labels."""
    count = len(answers)
    if not values.needs_gold:
        return (0,) * count, None
    columns = [name for name in ("ranks", "scores", "labels") if values.get(name) is not None]
    objects = [item for item in answers if isinstance(item, Mapping)]
    numbers = _grades(objects, bool(columns)) if len(objects) == count else {}
    numbers |= {name: _numbers(values[name], name, count) for name in columns}
    scores = numbers.get("scores")
    if "ranks" in numbers:
        return _dense_ranks(numbers["ranks"]), scores
    higher_is_better = scores if scores is not None else numbers.get("labels")
    if higher_is_better is not None:
        return _dense_ranks(tuple(-number for number in higher_is_better)), scores
    return tuple(range(count)), None


def _grades(answers: Sequence[Mapping[str, object]], has_columns: bool) -> dict[str, Numbers]:
    """Ranks or scores from keys of the answers; {} without such keys.

    A number under an unknown key may be a grade. Without grades in columns such a row is refused, because the
    order of its answers may mean nothing."""
    keys = [key for key in GRADE_KEYS if any(key in item for item in answers)]
    if keys:
        grade = next((key for key in keys if all(key in item for item in answers)), keys[0])
        for index, item in enumerate(answers):
            if grade not in item:
                expected, fix = f"a {grade}, as other answers have one", f"Write it, or remove every {grade}."
                raise FieldFault(f"answers[{index}].{grade}", expected, "nothing", fix)
        places = enumerate(answers)
        numbers = tuple(_number(item[grade], f"answers[{index}].{grade}") for index, item in places)
        return {"ranks" if grade == "rank" else "scores": numbers}
    for index, item in enumerate(answers):
        for key, number in item.items():
            if isinstance(number, int | float) and not has_columns:
                fix = "Rename it, add a column of ranks, or remove it and write the best answer first."
                expected = f"a grade under {', '.join(GRADE_KEYS)}"
                raise FieldFault(f"answers[{index}].{key}", expected, f"a number under {key!r}", fix)
    return {}


def _numbers(value: object, field: str, count: int) -> Numbers:
    value = parse_json(value, field, "a list of numbers")
    if not isinstance(value, list | tuple) or len(value) != count:
        got = f"{len(value)}: {shorten(value)}" if isinstance(value, list | tuple) else shorten(value)
        expected = f"a list of {count} numbers, one for each answer"
        raise FieldFault(field, expected, got, "Write one number for each answer.")
    return tuple(_number(item, f"{field}[{index}]") for index, item in enumerate(value))


def _number(value: object, field: str) -> float:
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if not isinstance(number, int | float) or (isinstance(number, bool) and not field.startswith("labels")):
        raise FieldFault(field, "a number", shorten(value), NUMBER_FIX)
    if not abs(number) <= LARGEST:
        raise FieldFault(field, "a finite number", shorten(value), NUMBER_FIX)
    return float(number)


def _dense_ranks(numbers: Numbers) -> tuple[int, ...]:
    """0 for the lowest numbers, 1 for the next, ..."""
    order = sorted(set(numbers))
    return tuple(order.index(number) for number in numbers)


def better_side(names: Mapping[str, object]) -> str:
    """Describe which answer of a pair is better, with the column names of the file."""
    chosen = names.get("chosen", f"the last answer of {names.get('messages')}")
    return f"{chosen} is better than {names.get('rejected')}"


def better_answer(names: Mapping[str, object]) -> str:
    """Describe the order of several answers, with the column names of the file."""
    for field, end in (("ranks", "lowest"), ("scores", "highest"), ("labels", "highest")):
        if field in names:
            return f"the answer with the {end} of {names[field]} is the best"
    return "the first answer is the best, unless the answers have ranks or scores"
