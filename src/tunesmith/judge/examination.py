"""Examine a judge on pairs whose better answer is known, before its verdicts may name a winner.

The built-in pairs (``calibration.json``, English and Korean) are balanced: in half of them the better answer
is the shorter one. So a judge that goes by length, by position or by chance agrees with them no more than
chance does, and Cohen's kappa is about 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from tunesmith.data.data_config import Source
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import RowProblem, bad_rows_error
from tunesmith.data.rows import Ranking, TextOrTurns
from tunesmith.errors import DataError
from tunesmith.judge.judges import Pair
from tunesmith.judge.verdicts import BothOrders, Outcome, Verdicts
from tunesmith.metrics.intervals import LEVEL

LEAST_KAPPA = 0.4
"""Below it, agreement is called "fair" at best (Landis and Koch 1977)."""
MOST_PREFERENCE = 0.2
"""Largest distance of the share of first, or of longer, answers that a judge prefers from the unbiased share."""
LEAST_RETEST = 0.9
MOST_MISSING = 0.1
RETESTED = 16
"""Pairs that are judged a second time."""
DRAWS = 500


@dataclass(frozen=True)
class KnownPair:
    """A prompt with an answer that is known to be better than another."""

    prompt: str
    better: str
    worse: str

    @property
    def better_is_longer(self) -> bool:
        return len(self.better) > len(self.worse)


@dataclass(frozen=True)
class Examination:
    """Figures of a judge on known pairs. ``failures``: why its verdicts name no winner; empty = it passed."""

    pairs: int
    kappa: float
    kappa_low: float
    kappa_high: float
    agreement: float
    first: float
    """Share of verdicts for the answer that was read first; unbiased: 0.5."""
    longer: float
    """Share of decided pairs in which the longer answer won; unbiased: the share in which it is the better."""
    longer_is_better: float
    retest: float
    """Share of verdicts that a second asking repeats."""
    missing: float
    """Share of pairs without a verdict."""
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


def built_in() -> list[KnownPair]:
    """Return the calibration pairs of tunesmith."""
    content = resources.files("tunesmith.judge").joinpath("calibration.json").read_text(encoding="utf-8")
    return [KnownPair(**one) for one in json.loads(content)]


def from_file(path: str | Path) -> list[KnownPair]:
    """Return the pairs of a file of human rankings (chosen and rejected, or several ranked answers).

    Raises DataError for a file without such rows."""
    opened = open_source(Source(path=str(path)), (Ranking,))
    found, problems = [], []
    for item in opened.rows():
        if isinstance(item, RowProblem):
            problems.append(item)
            continue
        row = item[1]
        assert isinstance(row, Ranking)
        texts = [_text(answer) for answer in row.answers]
        found += [KnownPair(_text(row.prompt), texts[better], texts[worse]) for better, worse in row.pairs()]
    if problems:
        raise bad_rows_error(problems, len(problems), "Nothing was judged.")
    if not found:
        raise DataError(f"{path} has no pair of answers of different rank")
    return found


def _text(value: TextOrTurns) -> str:
    return value if isinstance(value, str) else "\n\n".join(str(turn["content"]) for turn in value)


def examine(
    verdicts: Verdicts, known: Sequence[KnownPair], advance: Callable[[int], None] = lambda count: None
) -> Examination:
    """Ask the judge about the pairs in both orders. The better answer is the first one of every other pair."""
    pairs = [
        Pair(one.prompt, *((one.worse, one.better) if place % 2 else (one.better, one.worse)))
        for place, one in enumerate(known)
    ]
    truth: list[Outcome] = ["second" if place % 2 else "first" for place in range(len(known))]
    judged = verdicts.ask(pairs, advance)
    again = verdicts.ask_again(pairs[:RETESTED])
    repeated = [
        (one.forward.first_better, other.first_better)
        for one, other in zip(judged[: len(again)], again, strict=True)
    ]
    return _figures(known, truth, judged, repeated)


def _figures(
    known: Sequence[KnownPair],
    truth: Sequence[Outcome],
    judged: Sequence[BothOrders],
    repeated: Sequence[tuple[float | None, float | None]],
) -> Examination:
    given = [(place, one.outcome) for place, one in enumerate(judged) if one.outcome is not None]
    gold = np.array([truth[place] for place, _ in given])
    outcome = np.array([outcome for _, outcome in given])
    kappa, low, high = _kappa(gold, outcome)
    picked = [first for one in judged for first in one.picked_first]
    decided = [(place, outcome) for place, outcome in given if outcome != "tie"]
    longer = [known[place].better_is_longer == (outcome == truth[place]) for place, outcome in decided]
    longer_is_better = [known[place].better_is_longer for place, _ in decided]
    same = [None not in both and (both[0] > 0.5) == (both[1] > 0.5) for both in repeated]  # type: ignore[operator]
    figures = {
        "kappa": kappa,
        "first": _share(picked),
        "longer": _share(longer),
        "longer_is_better": _share(longer_is_better),
        "retest": _share(same),
        "missing": 1 - len(given) / len(known),
    }
    return Examination(
        pairs=len(known), kappa_low=low, kappa_high=high, agreement=float((gold == outcome).mean()) if len(given) else 0.0,
        failures=tuple(_failures(figures)), **figures,
    )  # fmt: skip


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if values else 0.5


def _kappa(gold: np.ndarray, outcome: np.ndarray) -> tuple[float, float, float]:
    """Return Cohen's kappa (1960) with its bootstrap interval. Ties agree with no known pair."""
    from sklearn.metrics import cohen_kappa_score

    def one(rows: np.ndarray) -> float:
        if not len(rows) or len(set(gold[rows]) | set(outcome[rows])) < 2:
            return float("nan")
        return float(cohen_kappa_score(gold[rows], outcome[rows]))

    value = one(np.arange(len(gold)))
    if not np.isfinite(value):
        return 0.0, 0.0, 0.0
    generator = np.random.default_rng(0)
    drawn = [one(generator.integers(0, len(gold), len(gold))) for _ in range(DRAWS)]
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)


def _failures(figures: dict[str, float]) -> list[str]:
    found = []
    if figures["kappa"] < LEAST_KAPPA:
        found.append(f"kappa with known answers is {figures['kappa']:.2f}; at least {LEAST_KAPPA} is needed")
    if abs(figures["first"] - 0.5) > MOST_PREFERENCE:
        place = "first" if figures["first"] > 0.5 else "second"
        share = max(figures["first"], 1 - figures["first"])
        found.append(f"it prefers the {place} answer in {share:.0%} of its verdicts")
    if abs(figures["longer"] - figures["longer_is_better"]) > MOST_PREFERENCE:
        word = "longer" if figures["longer"] > figures["longer_is_better"] else "shorter"
        found.append(
            f"it prefers the {word} answer: the longer one won {figures['longer']:.0%} of decided pairs and was "
            f"better in {figures['longer_is_better']:.0%}"
        )
    if figures["retest"] < LEAST_RETEST:
        found.append(f"asked again, it repeats {figures['retest']:.0%} of its verdicts")
    if figures["missing"] > MOST_MISSING:
        found.append(f"it gave no verdict on {figures['missing']:.0%} of the pairs")
    return found
