"""Nearly equal rows, within files and across them: the report of ``tunesmith data lint --near-duplicates``.

The files are read twice: once for the signature of every row, once for the text of the candidate pairs alone.
So memory holds half a kilobyte a row and little text. Every reported pair was compared exactly.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from tunesmith.data.check import minhash
from tunesmith.data.data_config import Source
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import Record, RowProblem, shorten
from tunesmith.data.rows import ROW_TYPES, Row
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject

Progress = Callable[[str], None]
"""Called with a description of the current work."""

Neighbours = dict[int, dict[int, tuple[float, float]]]
"""Row -> similar row -> (similarity, MinHash's estimate of it); both directions."""

THRESHOLD, LOWEST = 0.8, 0.5
BATCH = 1024
"""Rows whose signatures are made at a time."""

LISTED, SHOWN = 10, 5
"""Clusters that are printed, and rows of each that are shown with the row they resemble."""

AROUND = 20
"""Characters before and after the first difference of two rows in an excerpt."""


@dataclass(frozen=True)
class Resemblance:
    """The row ``where`` resembles the row ``like``: ``jaccard`` is their similarity, ``estimate`` MinHash's.

    ``here`` and ``there``: excerpts around the first difference, empty when only capitals and spaces differ.
    """

    where: str
    like: str
    jaccard: float
    estimate: float
    here: str
    there: str


@dataclass(frozen=True)
class Cluster:
    """Rows in a chain of similar pairs. ``like``: the first SHOWN rows after the very first."""

    rows: tuple[str, ...]
    like: tuple[Resemblance, ...]


@dataclass(frozen=True)
class NearReport:
    """``near`` of ``rows`` rows resemble another row; ``same`` of them have the same text as an earlier row.

    ``learnt``: training rows. ``eval_near``: evaluation rows that resemble a training row. ``recall``:
    expected share of the pairs just at ``threshold`` that are found (more of closer pairs). ``clusters``: the
    largest first. ``surplus``: training rows, counted from 0 over all files, that resemble an evaluation row
    or an earlier training row that is not surplus.
    """

    threshold: float
    recall: float
    rows: int
    learnt: int
    near: int
    same: int
    eval_near: int
    clusters: tuple[Cluster, ...]
    surplus: frozenset[int]
    seconds: float

    def as_dict(self) -> JsonObject:
        """Return the report as JSON, with the number of ``surplus`` rows."""
        return asdict(self) | {"surplus": len(self.surplus)}

    def lines(self) -> list[str]:
        """Return the counts and the largest clusters for printing."""
        lines = [
            f"near-duplicates: {self.near} of {self.rows} rows have a similarity of {self.threshold:g} or more with another "
            f"row, in {len(self.clusters)} clusters; {self.same} have the same text as an earlier row"
        ]
        if held := self.rows - self.learnt:
            near = f"{self.eval_near} of {held} evaluation rows"
            lines.append(f"near-duplicates: {near} resemble a training row")
        for cluster in self.clusters[:LISTED]:
            lines.append(f"cluster of {len(cluster.rows)} rows: {cluster.rows[0]}")
            for row in cluster.like:
                similarity = f"similarity {row.jaccard:.3f} with {row.like} (estimate {row.estimate:.3f})"
                excerpts = f"{shorten(row.here)} for {shorten(row.there)}"
                same = "" == row.here == row.there
                lines.append(f"  {row.where}: {similarity}: {'the same text' if same else excerpts}")
            if more := len(cluster.rows) - len(cluster.like) - 1:
                lines.append(f"  and {more} more")
        if len(self.clusters) > LISTED:
            lines.append(f"and {len(self.clusters) - LISTED} more clusters; --json lists all")
        return lines


def near_duplicates(
    train: Sequence[Source],
    evaluation: Sequence[Source] = (),
    threshold: float = THRESHOLD,
    accepted: tuple[type, ...] = ROW_TYPES,
    on_progress: Progress = lambda _: None,
) -> NearReport:
    """Compare all rows of all files. Unusable rows, and files that cannot be opened, are ignored.

    ``threshold``: a Jaccard similarity from LOWEST to 1. Raises DataError for any other, and when a file
    changes meanwhile; MissingExtra without rensa.
    """
    if not LOWEST <= threshold <= 1:
        raise DataError(
            f"the threshold of near-duplicates is {threshold}. Expected a similarity of {LOWEST} to 1, such as 0.8."
        )
    began = time.perf_counter()
    sources = [*train, *evaluation]
    places, digests, slots = _read_signatures(sources, accepted, on_progress)
    training_rows = int(np.count_nonzero(places[:, 0] < len(train)))
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    leader = first[group]  # for each row the first row with its text
    distinct = np.unique(leader)
    on_progress("looking for candidate pairs")
    pairs, estimates = minhash.candidates(slots, distinct, threshold)
    texts = _read_texts(sources, accepted, np.unique(pairs), on_progress)
    neighbours = _compare(pairs, estimates, texts, threshold, on_progress)
    clusters = _clusters(leader, neighbours)

    def where(row: int) -> str:
        source, number = places[row].tolist()
        return f"{sources[source].path}:{number}"

    return NearReport(
        threshold=threshold,
        recall=minhash.recall(threshold, *minhash.choose_bands(threshold)),
        rows=len(leader),
        learnt=training_rows,
        near=sum(map(len, clusters)),
        same=len(leader) - len(distinct),
        eval_near=_count_eval_near(leader, neighbours, training_rows),
        clusters=tuple(_cluster(rows, leader, neighbours, texts, where) for rows in clusters),
        surplus=_surplus(leader, neighbours, training_rows),
        seconds=time.perf_counter() - began,
    )


def kept_rows(
    train: Sequence[Source], report: NearReport, accepted: tuple[type, ...] = ROW_TYPES
) -> Iterator[JsonObject]:
    """Yield the usable training rows that are not surplus, as their files have them."""
    last: Record | None = None
    for number, (_, record, _) in enumerate(_usable_rows(train, accepted)):
        if number not in report.surplus and record is not last:  # one pair may have become two rows
            yield record.value
            last = record


def _usable_rows(sources: Sequence[Source], accepted: tuple[type, ...]) -> Iterator[tuple[int, Record, Row]]:
    """Yield (number of the source, record, row), always in the same order."""
    for number, source in enumerate(sources):
        try:
            opened = open_source(source, accepted)
        except DataError:
            continue  # ``lint`` reports it
        for item in opened.rows():
            if not isinstance(item, RowProblem):
                yield number, *item


def _read_signatures(
    sources: Sequence[Source], accepted: tuple[type, ...], on_progress: Progress
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return source and row number int32[rows, 2], digest uint64[rows] and signature of all usable rows."""
    places: list[tuple[int, int]] = []
    digests: list[int] = []
    slots: list[np.ndarray] = [np.empty((0, minhash.SLOTS), np.uint32)]
    rows = _usable_rows(sources, accepted)
    while batch := list(itertools.islice(rows, BATCH)):
        texts = [minhash.row_text(row) for _, _, row in batch]
        slots.append(minhash.signatures(texts))
        places += [(source, record.row) for source, record, _ in batch]
        digests += map(minhash.digest, texts)
        on_progress(f"signatures of {len(places)} rows made")
    at = np.array(places, np.int32).reshape(-1, 2)
    return at, np.array(digests, np.uint64), np.concatenate(slots)


def _read_texts(
    sources: Sequence[Source], accepted: tuple[type, ...], wanted: np.ndarray, on_progress: Progress
) -> dict[int, str]:
    """Read the text of some rows again; in the order of the rows."""
    texts: dict[int, str] = {}
    if not len(wanted):
        return texts
    on_progress(f"reading {len(wanted)} rows of candidate pairs")
    numbers = set(wanted.tolist())
    for number, (_, _, row) in enumerate(_usable_rows(sources, accepted)):
        if number in numbers:
            texts[number] = minhash.row_text(row)
    if len(texts) < len(wanted):
        raise DataError(
            "a file became shorter while it was read. Stop the program that writes to it and try again."
        )
    return texts


def _compare(
    pairs: np.ndarray, estimates: np.ndarray, texts: dict[int, str], threshold: float, on_progress: Progress
) -> Neighbours:
    """Return the pairs whose sets of shingles reach the threshold."""
    last, shingles = -1, np.empty(0, np.uint64)
    neighbours: Neighbours = defaultdict(dict)
    for done, ((lower, higher), estimate) in enumerate(zip(pairs.tolist(), estimates.tolist())):
        if lower != last:
            last, shingles = lower, np.unique(minhash.shingles(texts[lower]))
        if done % BATCH == 0:
            on_progress(f"{done} of {len(pairs)} pairs compared")
        jaccard = minhash.jaccard(shingles, np.unique(minhash.shingles(texts[higher])))
        if jaccard >= threshold:
            neighbours[lower][higher] = neighbours[higher][lower] = (jaccard, estimate)
    return neighbours


def _clusters(leader: np.ndarray, neighbours: Neighbours) -> list[np.ndarray]:
    """Return the sets of connected rows, each sorted; the largest set first."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = [(row, other) for row, others in neighbours.items() for other in others if row < other]
    ends = np.array(pairs, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs), np.int8), (ends[0], ends[1])), (len(leader), len(leader)))
    component = connected_components(graph, directed=False)[1][leader]
    order = np.argsort(component, kind="stable")
    sets = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    return sorted((rows for rows in sets if len(rows) > 1), key=lambda rows: (-len(rows), rows[0]))


def _count_eval_near(leader: np.ndarray, neighbours: Neighbours, training_rows: int) -> int:
    """Count the evaluation rows that resemble a training row; training rows have the lowest numbers."""
    return sum(
        first < training_rows or any(other < training_rows for other in neighbours.get(first, ()))
        for first in leader[training_rows:].tolist()
    )


def _surplus(leader: np.ndarray, neighbours: Neighbours, training_rows: int) -> frozenset[int]:
    """Return the training rows to leave out, so that each of them resembles a row that is kept."""
    kept = set(leader[training_rows:].tolist())
    surplus = set()
    for row, first in enumerate(leader[:training_rows].tolist()):
        if row != first or row in kept or any(other in kept for other in neighbours.get(row, ())):
            surplus.add(row)
        else:
            kept.add(row)
    return frozenset(surplus)


def _cluster(
    rows: np.ndarray,
    leader: np.ndarray,
    neighbours: Neighbours,
    texts: dict[int, str],
    where: Callable[[int], str],
) -> Cluster:
    like = []
    for row in rows[1 : SHOWN + 1].tolist():
        first = int(leader[row])
        if first != row:
            like.append(Resemblance(where(row), where(first), 1.0, 1.0, "", ""))
            continue
        other = max(neighbours[row], key=lambda number: (neighbours[row][number][0], -number))
        excerpts = _first_difference(texts[row], texts[other])
        like.append(Resemblance(where(row), where(other), *neighbours[row][other], *excerpts))
    return Cluster(tuple(map(where, rows.tolist())), tuple(like))


def _first_difference(a: str, b: str) -> tuple[str, str]:
    """Return excerpts of both texts around their first difference."""
    size = min(len(a), len(b))
    at = next((place for place in range(size) if a[place] != b[place]), size)
    return a[max(0, at - AROUND) : at + AROUND], b[max(0, at - AROUND) : at + AROUND]
