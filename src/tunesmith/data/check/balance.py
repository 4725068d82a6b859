"""The balance of desirable and undesirable rows in unpaired preference.

The source is KTO (Ethayarajh et al. 2024, arXiv:2402.01306).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tunesmith.data.rows import Judged
from tunesmith.errors import DataError

LARGEST_RATIO = 4 / 3
"""Weight times number of rows, desirable over undesirable, should lie in [1, 4/3]: section 4.2, equation 8."""


@dataclass(frozen=True)
class Balance:
    """How many rows are desirable, and how many are not."""

    desirable: int
    undesirable: int

    def one_sided(self) -> str | None:
        """Return what is wrong when one of the two kinds is missing, and what to type; else None."""
        rows = self.desirable + self.undesirable
        if (self.desirable and self.undesirable) or not rows:
            return None
        there, missing = ("desirable", "undesirable") if self.desirable else ("undesirable", "desirable")
        return (
            f"all {rows} training rows are {there}. KTO needs {missing} rows, too.\n"
            f"  Add some, or map the column that tells them apart: columns: {{label: COLUMN}}"
            + (". To train on good responses alone, use objective: sft." if self.desirable else ".")
        )

    def check(self) -> None:
        """Raise DataError when one of the two kinds is missing."""
        wrong = self.one_sided()
        if wrong is not None:
            raise DataError(wrong)

    def advice(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> str | None:
        """Return which weight to change, and to what, when the weighted counts are far from balanced.

        Far is a ratio outside [3/4, 4/3]. Equation 8 asks for [1, 4/3]; a few more undesirable rows than
        desirable ones are no reason to warn.
        """
        good, bad = desirable_weight * self.desirable, undesirable_weight * self.undesirable
        if not good or not bad or 1 / LARGEST_RATIO <= good / bad <= LARGEST_RATIO:
            return None
        if good < bad:
            name, low, high = "desirable_weight", bad / self.desirable, LARGEST_RATIO * bad / self.desirable
        else:
            name, low, high = (
                "undesirable_weight",
                good / self.undesirable / LARGEST_RATIO,
                good / self.undesirable,
            )
        return (
            f"{self.desirable} desirable and {self.undesirable} undesirable rows, with desirable_weight "
            f"{desirable_weight:g} and undesirable_weight {undesirable_weight:g}: the weighted ratio is "
            f"{good / bad:.3g}, and the authors of KTO advise 1 to 4/3. Set {name} between {low:.3g} and {high:.3g}, for example "
            f"objective: {{type: kto, {name}: {(low * high) ** 0.5:.3g}}}"
        )


def balance(rows: Iterable[Any]) -> Balance:
    """Count the rows of each kind; rows that are not Judged are passed over."""
    labels = [row.desirable for row in rows if isinstance(row, Judged)]
    return Balance(labels.count(True), labels.count(False))
