"""Rows that are nearly the same, within files and across them: what `tunesmith data lint --near-duplicates`
says.

The files are read twice: first for the signature of every row, then for the words of those alone that may be
alike. So memory holds half a kilobyte a row, and the text of no row that resembles none. What is reported was
compared exactly.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tunesmith.data.check import minhash
from tunesmith.data.data_config import Source
from tunesmith.data.read.source import ROW_TYPES, open_source
from tunesmith.data.row_problems import Record, RowProblem, shorten
from tunesmith.data.rows import Row
from tunesmith.errors import DataError

Progress = Callable[[str], None]
"""Called with what is being done, in words."""

Neighbours = dict[int, dict[int, tuple[float, float]]]
"""Row -> row that it resembles -> how much, and the estimate of it."""

THRESHOLD, LOWEST = 0.8, 0.5
BATCH = 1024
"""Rows whose signatures are made at a time."""

LISTED, SHOWN = 10, 5
"""Clusters that are printed, and rows of each that are shown with what they resemble."""

AROUND = 20
"""Characters before and after the first difference of two rows that an excerpt shows."""


@dataclass(frozen=True)
class Like:
    """The row ``where`` resembles the row ``like``: ``jaccard`` of their shingles, and MinHash's ``estimate``
    of it.

    ``here`` and ``there``: what each says where they first differ; empty when they say the same but for
    capitals and spaces.
    """

    where: str
    like: str
    jaccard: float
    estimate: float
    here: str
    there: str


@dataclass(frozen=True)
class Cluster:
    """Rows that hang together: each resembles another one of them. ``like``: the first ones after the very first."""

    rows: tuple[str, ...]
    like: tuple[Like, ...]


@dataclass(frozen=True)
class NearReport:
    """``near`` of ``rows`` rows resemble another one; ``same`` of them say just what an earlier one says.

    ``learnt``: how many are training rows. ``eval_near``: evaluation rows that resemble one of those.
    ``recall``: the share that is expected to be found of the pairs just at ``threshold`` (of closer ones,
    more). ``clusters``: the largest first. ``surplus``: training rows, counted from 0 over all files, each of
    which resembles an evaluation row or an earlier training row that is not surplus.
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

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; of ``surplus`` the number."""
        names = ("threshold", "recall", "rows", "learnt", "near", "same", "eval_near", "seconds")
        said = {name: getattr(self, name) for name in names}
        return said | {
            "surplus": len(self.surplus),
            "clusters": [asdict(cluster) for cluster in self.clusters],
        }

    def lines(self) -> list[str]:
        """For people: the counts, and the largest clusters."""
        lines = [
            f"near-duplicates: {self.near} of {self.rows} rows are {self.threshold:g} or more like another one, in "
            f"{len(self.clusters)} clusters; {self.same} say just what an earlier one says"
        ]
        if self.rows > self.learnt:
            lines.append(
                f"near-duplicates: {self.eval_near} of {self.rows - self.learnt} evaluation rows resemble a training row"
            )
        for cluster in self.clusters[:LISTED]:
            lines.append(f"cluster of {len(cluster.rows)} rows: {cluster.rows[0]}")
            for one in cluster.like:
                differ = (
                    f": {shorten(one.here)} for {shorten(one.there)}"
                    if one.here or one.there
                    else ": the same words"
                )
                lines.append(
                    f"  {one.where} is {one.jaccard:.3f} like {one.like} (estimate {one.estimate:.3f}){differ}"
                )
            if len(cluster.rows) > len(cluster.like) + 1:
                lines.append(f"  and {len(cluster.rows) - len(cluster.like) - 1} more")
        if len(self.clusters) > LISTED:
            lines.append(f"and {len(self.clusters) - LISTED} more clusters; --json lists all")
        return lines


@dataclass(frozen=True)
class _Read:
    """All usable rows: ``source`` and ``row`` number of each, a digest of its words, its signature.

    The first ``learnt`` are for training.
    """

    source: np.ndarray
    row: np.ndarray
    digest: np.ndarray
    slots: np.ndarray
    learnt: int


@dataclass(frozen=True)
class _Pairs:
    """Two rows each, the lower number first, with their similarity and MinHash's estimate of it."""

    one: np.ndarray
    other: np.ndarray
    jaccard: np.ndarray
    estimate: np.ndarray


def near_duplicates(
    train: Sequence[Source],
    evaluation: Sequence[Source] = (),
    threshold: float = THRESHOLD,
    accepted: tuple[type, ...] = ROW_TYPES,
    on_progress: Progress = lambda _: None,
) -> NearReport:
    """Compare all rows of all files. Rows that cannot be used, and files that cannot be opened, are passed
    over.

    ``threshold``: a Jaccard similarity of LOWEST to 1. Raises DataError for another one, and when a file
    changes meanwhile; MissingExtra without rensa.
    """
    if not LOWEST <= threshold <= 1:
        raise DataError(
            f"the threshold of near-duplicates is {threshold}. Expected a similarity of {LOWEST} to 1, such as 0.8."
        )
    began = time.perf_counter()
    sources = [*train, *evaluation]
    read = _read(sources, len(train), accepted, on_progress)
    _, first, group = np.unique(read.digest, return_index=True, return_inverse=True)
    leader = first[group]  # of each row: the first row with its words
    alone = np.unique(leader)
    on_progress("looking for rows that may be alike")
    pairs, estimates = minhash.candidates(read.slots, alone, threshold)
    texts = _texts(sources, accepted, np.unique(pairs), on_progress)
    alike = _compared(pairs, estimates, texts, threshold, on_progress)
    clusters = _clusters(leader, alike)
    neighbours = _neighbours(alike)

    def where(row: int) -> str:
        return f"{sources[read.source[row]].path}:{read.row[row]}"

    return NearReport(
        threshold=threshold,
        recall=minhash.recall(threshold, *minhash.banding(threshold)),
        rows=len(leader),
        learnt=read.learnt,
        near=sum(map(len, clusters)),
        same=len(leader) - len(alone),
        eval_near=_eval_near(leader, alike, read.learnt),
        clusters=tuple(_shown(rows, leader, neighbours, texts, where) for rows in clusters),
        surplus=_surplus(leader, neighbours, read.learnt),
        seconds=time.perf_counter() - began,
    )


def kept_rows(
    train: Sequence[Source], report: NearReport, accepted: tuple[type, ...] = ROW_TYPES
) -> Iterator[dict[str, Any]]:
    """The usable training rows that are not surplus, as their files have them."""
    last: Record | None = None
    for number, (_, record, _) in enumerate(_usable(train, accepted)):
        if (
            number not in report.surplus and record is not last
        ):  # of two rows made of one pair either keeps the pair
            yield record.value
            last = record


def _usable(sources: Sequence[Source], accepted: tuple[type, ...]) -> Iterator[tuple[int, Record, Row]]:
    """(number of the source, record, row), always in the same order."""
    for number, source in enumerate(sources):
        try:
            opened = open_source(source, accepted)
        except DataError:
            continue  # which lint has said
        for item in opened.rows():
            if not isinstance(item, RowProblem):
                yield number, *item


def _read(sources: Sequence[Source], train: int, accepted: tuple[type, ...], on_progress: Progress) -> _Read:
    places: list[tuple[int, int]] = []
    digests: list[int] = []
    slots: list[np.ndarray] = [np.empty((0, minhash.SLOTS), np.uint32)]
    texts: list[str] = []

    def sketch() -> None:
        slots.append(minhash.signatures(texts))
        texts.clear()
        on_progress(f"signatures of {len(places)} rows made")

    for source, record, row in _usable(sources, accepted):
        text = minhash.words(row)
        places.append((source, record.row))
        said = minhash.letters(text).encode("utf-8", "surrogatepass")
        digests.append(int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little"))
        texts.append(text)
        if len(texts) == BATCH:
            sketch()
    if texts:
        sketch()
    at = np.array(places, np.int32).reshape(-1, 2)
    learnt = int(np.count_nonzero(at[:, 0] < train))
    return _Read(at[:, 0], at[:, 1], np.array(digests, np.uint64), np.concatenate(slots), learnt)


def _texts(
    sources: Sequence[Source], accepted: tuple[type, ...], wanted: np.ndarray, on_progress: Progress
) -> dict[int, str]:
    """The words of some rows, read again; in the order of the rows."""
    found: dict[int, str] = {}
    if not len(wanted):
        return found
    on_progress(f"reading {len(wanted)} rows that may be alike")
    numbers = set(wanted.tolist())
    for number, (_, _, row) in enumerate(_usable(sources, accepted)):
        if number in numbers:
            found[number] = minhash.words(row)
    if len(found) < len(wanted):
        raise DataError(
            "a file became shorter while it was read. Expected files that nothing writes to; try again."
        )
    return found


def _compared(
    pairs: np.ndarray, estimates: np.ndarray, texts: dict[int, str], threshold: float, on_progress: Progress
) -> _Pairs:
    """The pairs that are as alike as the threshold asks, by their sets of shingles."""
    last, ours = -1, np.empty(0, np.uint64)
    jaccard = np.empty(len(pairs))
    for done, (one, other) in enumerate(pairs.tolist()):
        if one != last:
            last, ours = one, np.unique(minhash.shingles(texts[one]))
        if done % BATCH == 0:
            on_progress(f"{done} of {len(pairs)} pairs compared")
        jaccard[done] = minhash.jaccard(ours, np.unique(minhash.shingles(texts[other])))
    kept = jaccard >= threshold
    return _Pairs(pairs[kept, 0], pairs[kept, 1], jaccard[kept], estimates[kept])


def _clusters(leader: np.ndarray, alike: _Pairs) -> list[np.ndarray]:
    """Rows that hang together, each set sorted; the largest set first."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.ones(len(alike.one), np.int8), (alike.one, alike.other)
    joined = connected_components(coo_array(edges, (len(leader), len(leader))), directed=False)[1][leader]
    order = np.argsort(joined, kind="stable")
    sets = np.split(order, np.flatnonzero(np.diff(joined[order])) + 1)
    return sorted((rows for rows in sets if len(rows) > 1), key=lambda rows: (-len(rows), rows[0]))


def _eval_near(leader: np.ndarray, alike: _Pairs, learnt: int) -> int:
    """How many evaluation rows resemble a training row. Those come first, so a leader of both is one of them."""
    near = alike.other[(alike.one < learnt) & (alike.other >= learnt)]
    held = leader[learnt:]
    return int(np.count_nonzero((held < learnt) | np.isin(held, near)))


def _surplus(leader: np.ndarray, neighbours: Neighbours, learnt: int) -> frozenset[int]:
    """Training rows to leave out, so that each resembles a row that stays."""
    stays = set(leader[learnt:].tolist())
    out = set()
    for row, first in enumerate(leader[:learnt].tolist()):
        if row != first or row in stays or any(other in stays for other in neighbours.get(row, ())):
            out.add(row)
        else:
            stays.add(row)
    return frozenset(out)


def _neighbours(alike: _Pairs) -> Neighbours:
    found: Neighbours = defaultdict(dict)
    for one, other, *similarity in zip(
        *(column.tolist() for column in (alike.one, alike.other, alike.jaccard, alike.estimate))
    ):
        found[one][other] = found[other][one] = (similarity[0], similarity[1])
    return found


def _shown(
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
            like.append(Like(where(row), where(first), 1.0, 1.0, "", ""))
            continue
        other = max(neighbours[row], key=lambda one: (neighbours[row][one][0], -one))
        like.append(
            Like(where(row), where(other), *neighbours[row][other], *_differ(texts[row], texts[other]))
        )
    return Cluster(tuple(map(where, rows.tolist())), tuple(like))


def _differ(one: str, other: str) -> tuple[str, str]:
    """Both texts about the place where they first differ."""
    size = min(len(one), len(other))
    at = next((place for place in range(size) if one[place] != other[place]), size)
    return one[max(0, at - AROUND) : at + AROUND], other[max(0, at - AROUND) : at + AROUND]
