"""The balance of desirable and undesirable rows (KTO, Ethayarajh et al. 2024, arXiv:2402.01306)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tunesmith.data.rows import Judged
from tunesmith.errors import DataError

LARGEST_RATIO = 4 / 3
"""Weight times rows, desirable over undesirable, should be in [1, 4/3] (section 4.2, equation 8)."""


@dataclass(frozen=True)
class Balance:
    """Numbers of desirable and of undesirable rows."""

    desirable: int
    undesirable: int

    def one_sided(self) -> str | None:
        """Return what is wrong when one of the two kinds is missing, and what to type; else None."""
        rows = self.desirable + self.undesirable
        if (self.desirable and self.undesirable) or not rows:
            return None
        present, missing = ("desirable", "undesirable") if self.desirable else ("undesirable", "desirable")
        advice = ". To train on good responses alone, use objective: sft." if self.desirable else "."
        return (
            f"all {rows} training rows are {present}. KTO needs {missing} rows, too.\n"
            f"  Add some, or map the column that tells them apart: columns: {{label: COLUMN}}{advice}"
        )

    def check(self) -> None:
        """Raise DataError when one of the two kinds is missing."""
        if (wrong := self.one_sided()) is not None:
            raise DataError(wrong)

    def advice(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> str | None:
        """Return which weight to set, and to what, when the weighted ratio is outside [3/4, 4/3].

        Equation 8 asks for [1, 4/3]; slightly more undesirable rows than desirable ones are no reason to
        warn.
        """
        good, bad = desirable_weight * self.desirable, undesirable_weight * self.undesirable
        if not good or not bad or 1 / LARGEST_RATIO <= good / bad <= LARGEST_RATIO:
            return None
        if good < bad:
            name, low, high = "desirable_weight", bad / self.desirable, LARGEST_RATIO * bad / self.desirable
        else:
            name, high = "undesirable_weight", good / self.undesirable
            low = high / LARGEST_RATIO
        return (
            f"{self.desirable} desirable and {self.undesirable} undesirable rows, with desirable_weight "
            f"{desirable_weight:g} and undesirable_weight {undesirable_weight:g}: the weighted ratio is "
            f"{good / bad:.3g}, and the authors of KTO advise 1 to 4/3. Set {name} between {low:.3g} and "
            f"{high:.3g}, for example objective: {{type: kto, {name}: {(low * high) ** 0.5:.3g}}}"
        )


def balance(rows: Iterable[object]) -> Balance:
    """Count the rows of each kind; rows that are not Judged are ignored."""
    labels = [row.desirable for row in rows if isinstance(row, Judged)]
    return Balance(labels.count(True), labels.count(False))
