"""Counts of the data, printed before training and kept in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from tunesmith.data.check.contamination import Contamination
from tunesmith.data.encode import turn_findings
from tunesmith.json_types import JsonObject


@dataclass(frozen=True)
class SourceReport:
    """One file. ``rows_read`` = ``rows_kept`` + ``rows_rejected``; ``problems``: the first ten, as text.

    ``left_out``: text that the template omits. ``revision``: the commit of a data set of the Hub.
    ``carriage_returns``: rows in which a line end ``\\r\\n`` was read as ``\\n``.
    ``in_turns``: see ``turn_findings``.
    """

    path: str
    role: str
    sha256: str
    format: str
    rows_read: int
    rows_kept: int
    rows_rejected: int
    problems: tuple[str, ...]
    left_out: JsonObject
    weight: float
    cached: bool
    seconds: float
    revision: str | None = None
    carriage_returns: int = 0
    in_turns: list[JsonObject] = field(default_factory=list)


@dataclass(frozen=True)
class SplitReport:
    """Training or evaluation examples after all policies, and the rows that they come from.

    ``unlearnable``: examples dropped because no token of theirs is a target. ``overlong``: examples above
    ``max_length``, with ``tokens`` in them, ``tokens_lost`` by the policy and their share of all tokens. For
    preferences, ``dropped`` counts rows left out whole, and the tokens are those of the other rows.
    """

    rows: int
    examples: int
    tokens: int
    supervised_tokens: int
    unlearnable: int
    unlearnable_first: tuple[str, ...]
    overlong: JsonObject
    duplicates: int
    histogram: JsonObject

    def line(self) -> str:
        """The counts in one line, without those that are 0."""
        over, dropped = self.overlong["rows"], self.overlong.get("dropped")
        parts = [f"{self.examples} examples of {self.rows} rows, {self.tokens} tokens"]
        if self.supervised_tokens != self.examples:  # equal where whole rows are supervised
            parts[0] += f", {self.supervised_tokens} supervised"
        if self.unlearnable:
            parts.append(f"{self.unlearnable} without supervised tokens dropped")
        if over and dropped is None:
            parts.append(f"{over} over max_length ({self.overlong['policy']})")
        elif over:
            cut = f"{over - dropped} prompts cut from the left, {dropped} rows dropped"
            parts.append(f"{over} over max_length: {cut}")
        if self.duplicates:
            parts.append(f"{self.duplicates} duplicates")
        return "; ".join(parts)


@dataclass(frozen=True)
class HeldOut:
    """The split by ``data.eval.fraction``: ``rows`` of ``of`` rows, in ``groups`` groups, are held out.

    ``asked``: the wanted number of rows. ``digest``: a hash of the groups, by which a resumed run knows that
    it holds out the same ones.
    """

    rows: int
    asked: int
    of: int
    groups: int
    digest: str

    def line(self) -> str:
        text = f"held out: {self.rows:,} of {self.of:,} rows"
        if self.groups < self.rows:
            text += f", in {self.groups:,} groups"
        if self.rows != self.asked:
            text += f"; {self.asked:,} were asked for, but rows with the same prompt stay together"
        return text


@dataclass(frozen=True)
class Report:
    """``eval``: all held-out rows; ``eval_sets``: those of each set of ``data.eval.sets``, by name.

    ``held_out``: how the evaluation rows were chosen, unless they have files of their own. ``cached``: every
    source came from the cache. ``duplicates_train_eval``: evaluation rows that equal a training row.
    ``contaminated``: evaluation rows that share a passage of text with a training row.
    """

    sources: tuple[SourceReport, ...]
    train: SplitReport
    eval: SplitReport | None
    eval_sets: dict[str, SplitReport]
    held_out: HeldOut | None
    template: str
    max_length: int
    duplicates_train_eval: int
    contaminated: Contamination | None
    cached: bool
    seconds: float

    @property
    def held_out_digest(self) -> str | None:
        """A hash of the held-out rows, where they are a share of the training rows."""
        return self.held_out.digest if self.held_out else None

    def as_dict(self) -> JsonObject:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people."""
        out = []
        for source in self.sources:
            at = f"; commit {source.revision[:12]}" if source.revision else ""
            kept = f"{source.rows_kept} of {source.rows_read} rows kept"
            out.append(f"{source.role}: {source.path}: {source.format}; {kept}{at}")
            if source.carriage_returns:
                out.append(f"  line ends: \\r\\n is read as \\n in {source.carriage_returns} rows")
            if source.left_out["rows"]:
                share = f"{source.left_out['rows']} of {source.left_out['looked_at']} rows compared"
                out.append(f"  the template omits text of {share}, for example {source.left_out['first'][0]}")
            out += [f"  {line}" for line in turn_findings.lines(source.path, source.in_turns)]
        out.append(f"template: {self.template}; max_length {self.max_length}")
        out += [self.held_out.line()] if self.held_out else []
        splits = {"train": self.train, "eval": self.eval}
        splits |= {f"eval {name}": split for name, split in self.eval_sets.items()}
        out += [f"{name}: {split.line()}" for name, split in splits.items() if split]
        if self.duplicates_train_eval:
            out.append(f"warning: {self.duplicates_train_eval} evaluation rows are also training rows")
        if self.contaminated and self.contaminated.rows:
            out.append(f"warning: {self.contaminated.line()}")
        return out


def histogram(lengths: np.ndarray) -> JsonObject:
    """Counts of lengths up to each edge (tokens, powers of two), with median, 95th percentile and maximum."""
    if not len(lengths):
        return {"edges": [], "counts": [], "median": 0, "p95": 0, "max": 0}
    longest = int(lengths.max())
    edges = [1 << power for power in range(4, 63) if 1 << power < longest] + [longest]
    ranked = np.sort(lengths)
    counts = np.diff(np.searchsorted(ranked, edges, side="right"), prepend=0).tolist()
    median, p95 = np.percentile(ranked, [50, 95], overwrite_input=True).tolist()
    return {"edges": edges, "counts": counts, "median": median, "p95": p95, "max": longest}


STREAM_ROWS = 10_000
"""Report progress of a stream every this many rows."""


def report_rows(note: Callable[[str], None]) -> Callable[[str, int], None]:
    """Return a function that reports how many rows of a stream were read; a stream has no known end."""
    reported: dict[str, int] = {}

    def count(label: str, rows: int) -> None:
        if rows // STREAM_ROWS > reported.get(label, 0):
            reported[label] = rows // STREAM_ROWS
            note(f"{label}: {rows:,} rows read")

    return count
