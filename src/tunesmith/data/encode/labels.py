"""The names of classes: found in the rows, in an order that depends on the names alone, and what problem they make."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tunesmith.data.rows import Labelled
from tunesmith.errors import DataError
from tunesmith.suggestions import did_you_mean

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
"""transformers' names of the three problems."""

LARGEST = 1e18
"""A number to be predicted; errors are squared in fp32."""

WHOLE = re.compile(r"-?\d{1,18}")

MANY = 1000
"""Classes; above that, what stands in the column is hardly a class."""


@dataclass
class Survey:
    """What rows say of their labels. ``counts``: rows that have each, 0 where they only say that it does not hold; ``fractions``:
    rows with a number that is not whole."""

    counts: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    several: int = 0
    fractions: int = 0

    def add(self, row: Labelled) -> None:
        if row.labels is not None:
            self.several += 1
            self.counts.update(dict.fromkeys(row.known, 0))
            self.counts.update(dict.fromkeys(row.labels, 1))
        elif row.label is not None:
            name = name_of(row.label)
            self.counts[name] += 1
            if isinstance(row.label, float) and not row.label.is_integer():
                self.fractions += 1
        else:
            return
        self.rows += 1

    @property
    def problem(self) -> str:
        """The problem that these labels make, by themselves."""
        if self.several:
            return MULTI
        return REGRESSION if self.fractions else SINGLE


def survey(rows: Iterable[Labelled]) -> Survey:
    found = Survey()
    for row in rows:
        found.add(row)
    return found


def name_of(label: str | float) -> str:
    """The name of a class that a file wrote as text or as a number: 1, 1.0 and "1" are one class."""
    if isinstance(label, str):
        return label
    return str(int(label)) if float(label).is_integer() else str(label)


def ordered(names: Iterable[str]) -> list[str]:
    """Whole numbers by size and before words; words by the alphabet."""
    return sorted(set(names), key=lambda name: (0, int(name), name) if is_whole(name) else (1, 0, name))


def is_whole(name: str) -> bool:
    """Whether a name is a whole number of a length that somebody may have meant as one."""
    return WHOLE.fullmatch(name) is not None


def distinct(names: Sequence[str] | None) -> None:
    """Raise ValueError for a list that has a name twice."""
    for name, count in Counter(names or ()).items():
        if count > 1:
            raise ValueError(
                f"labels has {name!r} {count} times: write each name once, in the order of their ids"
            )


def check(names: Sequence[str], problem: str) -> None:
    """Raise DataError for labels that nothing can be learnt from."""
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
    if len(names) > MANY:
        raise DataError(
            f"the label column has {len(names):,} different values, such as {names[0]!r}: that is hardly a set of classes.\n"
            "  For numbers set objective.problem_type=regression; else name the column with data.train.0.columns={label: COLUMN}."
        )


def unknown(name: str, names: Sequence[str]) -> tuple[str, str, str]:
    """(expected, got, fix) of a label that the model does not have."""
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"one of the labels {shown}", repr(name), did_you_mean(name, list(names))


def alike(names: Iterable[str]) -> list[list[str]]:
    """Names that a reader may take for one: they differ in case, white space, invisible characters or Unicode's form only."""
    groups: dict[str, list[str]] = {}
    for name in ordered(names):
        plain = "".join(
            one for one in unicodedata.normalize("NFKC", name) if unicodedata.category(one) != "Cf"
        )
        groups.setdefault(" ".join(plain.casefold().split()), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def guessed(problem: str, found: Survey) -> list[str]:
    """Said of numbers, which may be classes or not."""
    names = list(found.counts)
    numbers = [number for name in names if (number := as_number(name)) is not None]
    if problem == MULTI or not numbers or len(numbers) < len(names):
        return []
    if problem == REGRESSION:
        return [
            f"the labels are numbers from {min(numbers):g} to {max(numbers):g}, which are predicted as such (regression); "
            "for classes set objective.problem_type=single_label_classification"
        ]
    kind = "whole numbers" if all(map(is_whole, names)) else "numbers"
    return [
        f"the labels are {len(names)} {kind} (from {min(numbers):g} to {max(numbers):g}), taken as "
        "names of classes; for numbers to be predicted set objective.problem_type=regression"
    ]


def as_number(label: str | float) -> float | None:
    """A label as a number, None where it is none, or one whose square fp32 cannot hold."""
    try:
        value = float(label)
    except ValueError:
        return None
    return value if abs(value) <= LARGEST else None


def told(problem: str, names: Sequence[str], found: Survey) -> list[str]:
    """What is said of the labels before training: how many, the most frequent one, and those that no row has."""
    said = []
    if found.rows and problem == SINGLE:
        common, count = found.counts.most_common(1)[0]
        said.append(
            f"labels: {len(names)} classes; the most frequent is {common!r} ({count / found.rows:.1%} of the rows)"
        )
    elif found.rows and problem == MULTI:
        said.append(f"labels: {len(names)}, {sum(found.counts.values()) / found.rows:.2f} on a row")
    if never := [name for name in names if not found.counts[name]]:
        more = f" and {len(never) - 10} more" if len(never) > 10 else ""
        said.append(
            f"labels that no training row has, of which little is learnt: {', '.join(never[:10])}{more}"
        )
    return said
