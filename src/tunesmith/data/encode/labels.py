"""Class names, in an order that depends on the names alone, and the problem type that the labels imply."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator

from tunesmith.data.rows import Labelled
from tunesmith.errors import DataError
from tunesmith.suggestions import closest

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
"""Values of transformers' ``problem_type``."""

LARGEST_TARGET = 1e18  # largest regression target: errors are squared in fp32
WHOLE_NUMBER = re.compile(r"-?\d{1,18}")
MOST_CLASSES = 1000  # a column with more different values hardly holds classes


def _numbers_as_names(given: object) -> object:
    """Return a list of names with its whole numbers as text; any other value unchanged."""
    if not isinstance(given, list | tuple):
        return given
    return [str(name) if type(name) is int else name for name in given]


Names = Annotated[list[str], BeforeValidator(_numbers_as_names)]
"""Names of labels in a recipe. YAML parses the name of a numbered class, such as 3, as an integer."""


@dataclass
class Survey:
    """Labels of all training rows. ``counts``: rows that have each label (0 where rows only deny it);
    ``several``: rows with a list of labels; ``fractions``: rows with a number that is not whole."""

    counts: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    several: int = 0
    fractions: int = 0

    @property
    def problem(self) -> str:
        """The problem type that these labels imply."""
        if self.several:
            return MULTI
        return REGRESSION if self.fractions else SINGLE


def survey(rows: Iterable[Labelled]) -> Survey:
    made = Survey()
    for row in rows:
        if row.labels is not None:
            made.several += 1
            made.counts.update(dict.fromkeys(row.known, 0))
            made.counts.update(dict.fromkeys(row.labels, 1))
        elif row.label is not None:
            made.counts[name_of(row.label)] += 1
            made.fractions += isinstance(row.label, float) and not row.label.is_integer()
        made.rows += row.labels is not None or row.label is not None
    return made


def name_of(label: str | float) -> str:
    """The class name of a label that a file has as text or as a number: 1, 1.0 and "1" are one class."""
    if isinstance(label, str):
        return label
    return str(int(label)) if float(label).is_integer() else str(label)


def sort_names(names: Iterable[str]) -> list[str]:
    """Whole numbers by size and before words; words by the alphabet."""
    return sorted(set(names), key=lambda name: (0, int(name), name) if is_whole(name) else (1, 0, name))


def is_whole(name: str) -> bool:
    """True for a whole number of at most 18 digits."""
    return WHOLE_NUMBER.fullmatch(name) is not None


def refuse_repeats(names: Sequence[str] | None) -> None:
    """Raise ValueError for a list that has a name twice."""
    for name, count in Counter(names or ()).items():
        if count > 1:
            raise ValueError(
                f"labels has {name!r} {count} times: write each name once, in the order of their ids"
            )


def check_names(names: Sequence[str], problem: str) -> None:
    """Raise DataError for labels that a classifier cannot be trained on."""
    if problem == SINGLE and len(names) < 2:
        there = f"only the class {names[0]!r}" if names else "no label at all"
        raise DataError(
            f"the training rows have {there}: a classifier needs two.\n"
            "  Look at the label column with `tunesmith data preview`, or name another with data.train.0.columns={label: COLUMN}."
        )
    if problem == MULTI and not names:
        raise DataError(
            "no training row has a label. Name the column with data.train.0.columns={labels: COLUMN}."
        )
    if len(names) > MOST_CLASSES:
        raise DataError(
            f"the label column has {len(names):,} different values, such as {names[0]!r}, and at most {MOST_CLASSES:,} can be "
            "classes.\n"
            "  For numbers set objective.problem_type=regression; else name the column with data.train.0.columns={label: COLUMN}."
        )


def unknown_label(name: str, names: Sequence[str]) -> tuple[str, str, str]:
    """(expected, got, fix) of a label that the model does not have."""
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    close = [] if is_whole(name) else closest(name, names)
    fix = f"Did you mean `{close[0]}`? " if close else ""
    named = [*names, name] if len(names) < 10 else [*names[:2], "...", name]
    fix += f"Correct it; or name it before training: objective.labels=[{', '.join(named)}]."
    return f"one of the labels {listed}", repr(name), fix


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ only in case, white space, invisible characters or Unicode form."""
    groups: dict[str, list[str]] = {}
    for name in sort_names(names):
        visible = (one for one in unicodedata.normalize("NFKC", name) if unicodedata.category(one) != "Cf")
        groups.setdefault(" ".join("".join(visible).casefold().split()), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def numeric_label_notes(problem: str, found: Survey) -> list[str]:
    """Report the assumption made about numeric labels, which may be classes or regression targets."""
    names = list(found.counts)
    numbers = [number for name in names if (number := as_number(name)) is not None]
    if problem == MULTI or not numbers or len(numbers) < len(names):
        return []
    span = f"from {min(numbers):g} to {max(numbers):g}"
    if problem == REGRESSION:
        return [
            f"the labels are numbers {span}: regression targets; for classes set "
            "objective.problem_type=single_label_classification"
        ]
    kind = "whole numbers" if all(map(is_whole, names)) else "numbers"
    return [
        f"the labels are {len(names)} {kind} ({span}): class names; for regression targets set "
        "objective.problem_type=regression"
    ]


def as_number(label: str | float) -> float | None:
    """A label as a regression target; None where it is no number, or fp32 cannot hold its square."""
    try:
        value = float(label)
    except ValueError:
        return None
    return value if abs(value) <= LARGEST_TARGET else None


def label_notes(problem: str, names: Sequence[str], found: Survey) -> list[str]:
    """Notes before training: how many labels, the most frequent one, and those that no training row has."""
    notes = []
    if found.rows and problem == SINGLE:
        common, count = found.counts.most_common(1)[0]
        share = f"{count / found.rows:.1%} of the rows"
        notes.append(f"labels: {len(names)} classes; the most frequent is {common!r} ({share})")
    elif found.rows and problem == MULTI:
        notes.append(f"labels: {len(names)}, {sum(found.counts.values()) / found.rows:.2f} on a row")
    if never := [name for name in names if not found.counts[name]]:
        more = f" and {len(never) - 10} more" if len(never) > 10 else ""
        notes.append(
            f"labels that no training row has, so the model cannot learn them: {', '.join(never[:10])}{more}"
        )
    return notes
