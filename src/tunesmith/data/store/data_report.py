"""What became of the data, as plain figures: shown before training, kept in the run folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tunesmith.data.check.contamination import Contamination


@dataclass(frozen=True)
class SourceReport:
    """One file. ``rows_read`` = ``rows_kept`` + ``rows_rejected``; ``problems``: the first ten, as text.

    ``revision``: the commit of a data set of the Hub.
    """

    path: str
    role: str
    sha256: str
    format: str
    rows_read: int
    rows_kept: int
    rows_rejected: int
    problems: tuple[str, ...]
    left_out: dict[str, Any]
    weight: float
    cached: bool
    seconds: float
    revision: str | None = None


@dataclass(frozen=True)
class SplitReport:
    """Training or evaluation examples as they will be learnt.

    ``unlearnable``: examples dropped because nothing in them is a target. ``overlong``: examples above ``max_length``, with
    ``tokens`` in them, ``tokens_lost`` by the policy and the share of all tokens that is lost. Of preferences ``dropped`` counts
    rows left out whole, and the tokens are those of the others.
    """

    rows: int
    examples: int
    tokens: int
    supervised_tokens: int
    unlearnable: int
    unlearnable_first: tuple[str, ...]
    overlong: dict[str, Any]
    duplicates: int
    histogram: dict[str, Any]

    def line(self) -> str:
        """The figures in one line; what did not happen is not mentioned."""
        learnt = (
            f", {self.supervised_tokens} learnt" if self.supervised_tokens != self.examples else ""
        )  # else rows are
        parts = [f"{self.examples} examples of {self.rows} rows, {self.tokens} tokens{learnt}"]
        if self.unlearnable:
            parts.append(f"{self.unlearnable} with nothing to learn dropped")
        if self.overlong["rows"]:
            what = f"{self.overlong['rows']} over max_length"
            if "dropped" in self.overlong:
                dropped = self.overlong["dropped"]
                parts.append(
                    f"{what}: {self.overlong['rows'] - dropped} prompts cut from the left, {dropped} rows left out whole"
                )
            else:
                parts.append(f"{what} ({self.overlong['policy']})")
        if self.duplicates:
            parts.append(f"{self.duplicates} duplicates")
        return "; ".join(parts)


@dataclass(frozen=True)
class Report:
    """``eval``: all held-out rows; ``eval_sets``: those of each set of ``data.eval.sets``, by name.

    ``cached``: every source came from the cache. ``duplicates_train_eval``: evaluation rows that are also trained on.
    ``contaminated``: evaluation rows that share a long stretch of tokens with a training row.
    """

    sources: tuple[SourceReport, ...]
    train: SplitReport
    eval: SplitReport | None
    eval_sets: dict[str, SplitReport]
    template: str
    max_length: int
    duplicates_train_eval: int
    contaminated: Contamination | None
    cached: bool
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people."""
        out = []
        for source in self.sources:
            at = f"; commit {source.revision[:12]}" if source.revision else ""
            out.append(
                f"{source.role}: {source.path}: {source.format}; {source.rows_kept} of {source.rows_read} rows kept{at}"
            )
            if source.left_out["rows"]:
                share = f"{source.left_out['rows']} of {source.left_out['looked_at']} rows looked at"
                out.append(
                    f"  the template leaves out text of {share}, for example {source.left_out['first'][0]}"
                )
        out.append(f"template: {self.template}; max_length {self.max_length}")
        splits = {"train": self.train, "eval": self.eval} | {
            f"eval {name}": split for name, split in self.eval_sets.items()
        }
        out += [f"{name}: {split.line()}" for name, split in splits.items() if split]
        if self.duplicates_train_eval:
            out.append(f"warning: {self.duplicates_train_eval} evaluation rows are also in the training rows")
        if self.contaminated and self.contaminated.rows:
            out.append(f"warning: {self.contaminated.line()}")
        return out


def histogram(lengths: np.ndarray) -> dict[str, Any]:
    """Counts of lengths up to each edge (tokens, powers of two), with median, 95th percentile and maximum."""
    if not len(lengths):
        return {"edges": [], "counts": [], "median": 0, "p95": 0, "max": 0}
    longest = int(lengths.max())
    edges = [1 << power for power in range(4, 63) if 1 << power < longest] + [longest]
    ranked = np.sort(lengths)
    counts = np.diff(np.searchsorted(ranked, edges, side="right"), prepend=0)
    median, p95 = np.percentile(ranked, [50, 95], overwrite_input=True)
    return {
        "edges": edges,
        "counts": counts.tolist(),
        "median": float(median),
        "p95": float(p95),
        "max": longest,
    }
