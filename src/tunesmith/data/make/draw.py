"""Draws rows of a maker: module by module in an order that the seed gives, evenly from the maker's groups, no row twice.

A pure function of kind, language, seed, split and the Python that runs. No more modules are read than the rows need.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.make.library import module_name, read_module, sources
from tunesmith.data.make.maker import NO_ANSWER, Candidate, Maker, Row, number
from tunesmith.errors import UserError

KINDS = {
    "docstrings": "questions about Python and their documented answers",
    "instructions": "instructions about code, with true answers from its syntax tree",
    "preferences": "a prompt, a true answer, and a wrong one",
    "classify": "documentation and the topic of its module",
    "multilabel": "functions and the constructs that occur in them",
    "tag": "tokens of sentences about code, and what each names (BIO)",
    "qa": "questions whose answers are stretches of a source text",
}
"""One file of this folder each."""

AHEAD = 600
"""Rows held while the modules are read, so that rows of one module do not follow one another."""

SPLITS = ("train", "test")

HELD_OUT = 5
"""One module in so many is for testing."""

NO_ANSWER_SHARE = 0.2

Progress = Callable[[int, int], None]
"""Called with the modules read so far and how many there are."""


@dataclass(frozen=True)
class Drawn:
    """Rows in an order that the seed gives. ``counts``: how often each label or group occurs. ``modules``: how many were read."""

    rows: list[Row]
    counts: dict[str, int]
    modules: int
    about: str


def maker(kind: str) -> Maker:
    """The maker of a kind of rows."""
    made: Maker = importlib.import_module(f"tunesmith.data.make.{kind}").MAKER
    return made


def draw(
    kind: str,
    rows: int,
    seed: int = 0,
    lang: str = "en",
    split: str | None = None,
    no_answer: float = NO_ANSWER_SHARE,
    on_progress: Progress | None = None,
) -> Drawn:
    """``rows`` rows of a kind. ``split``: "train" or "test", whose modules are never the same and share no row.

    ``no_answer``: share of the questions (kind qa) that the context does not answer. Raises UserError when fewer exist.
    """
    made = maker(kind)
    unanswered = round(rows * no_answer) if made.questions else 0
    wanted = {True: unanswered, False: rows - unanswered}
    found: dict[bool, list[Candidate]] = {True: [], False: []}
    read = 0

    def reading(done: int, total: int) -> None:
        nonlocal read
        read = done
        if on_progress:
            on_progress(done, total)

    for group, row in stream(made, lang, seed, split, reading):
        of_kind = found[group.startswith(NO_ANSWER)]
        of_kind.append((group, row))
        if all(len(found[key]) >= count for key, count in wanted.items()):
            break
    else:
        raise UserError(_too_few(kind, rows, split, found, no_answer if made.questions else None))
    chosen = [*found[True][: wanted[True]], *found[False][: wanted[False]]]
    random.Random(f"{seed}:rows").shuffle(chosen)
    counts = Counter(label for group, row in chosen for label in (made.labels(row) if made.labels else [group]))
    return Drawn([row for _, row in chosen], dict(sorted(counts.items())), read, made.about[lang])


def _too_few(kind: str, rows: int, split: str | None, found: dict[bool, list[Candidate]], share: float | None) -> str:
    most = len(found[True]) + len(found[False])
    given = ""
    if share is not None:
        while round(most * share) > len(found[True]) or most - round(most * share) > len(found[False]):
            most -= 1
        given = f" with --no-answer {share:g}"
    where = f" in the modules for {split}" if split else ""
    return f"{kind}: {rows} rows are asked for, {most} exist{where}{given} in this Python's library. Say --rows {most}, or fewer."


def stream(
    made: Maker, lang: str, seed: int, split: str | None = None, on_progress: Progress | None = None
) -> Iterator[Candidate]:
    """Every row of a maker, once: at each moment of the group of which the fewest have come, as far as modules were read.

    Rows about the same function come after all others, so that few rows are about many functions.
    """
    order = random.Random(f"{seed}:modules")
    training, testing = halves(made)
    paths = _shuffled(testing if split == "test" else training if split == "train" else _merged(training, testing), order)
    seen: set[bytes] = set()
    if split == "test":  # what also stands in a module to train on is no test
        for path in (path for stratum in training.values() for path in stratum):
            seen.update(_key(made, row) for _, row in _made(made, path, lang, seed))
    pool: dict[str, list[Row]] = {}
    for group, row in made.besides(lang):
        seen.add(_key(made, row))
        if split != "test":
            pool.setdefault(group, []).append(row)
    come: Counter[str] = Counter()
    later: list[Candidate] = []
    for done, path in enumerate(paths, 1):
        subjects: dict[str, list[Candidate]] = {}
        for place, (group, row) in enumerate(_made(made, path, lang, seed)):
            key = _key(made, row)
            if key not in seen:
                seen.add(key)
                subjects.setdefault(made.subject(row) if made.subject else str(place), []).append((group, row))
        for some in subjects.values():  # one of each for now: of the group that has the fewest
            some.sort(key=lambda one: (come[one[0]] + len(pool.get(one[0], ())), one[0]))
            pool.setdefault(some[0][0], []).append(some[0][1])
            later += some[1:]
        if on_progress:
            on_progress(done, len(paths))
        yield from _drawn(pool, come, order, AHEAD)
    for group, row in later:
        pool.setdefault(group, []).append(row)
    yield from _drawn(pool, come, order, 0)


def _made(made: Maker, path: Path, lang: str, seed: int) -> Iterator[Candidate]:
    module = read_module(path)
    return made.candidates(module, lang, seed) if module else iter(())


def _key(made: Maker, row: Row) -> bytes:
    content = json.dumps([row[column] for column in made.identity], ensure_ascii=False)
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _drawn(pool: dict[str, list[Row]], come: Counter[str], order: random.Random, left: int) -> Iterator[Candidate]:
    """Rows out of the pool until ``left`` of them stay."""
    size = sum(map(len, pool.values()))
    while size > left:
        group = min((name for name, rows in pool.items() if rows), key=lambda name: (come[name], name))
        rows = pool[group]
        place = order.randrange(len(rows))
        rows[place], rows[-1] = rows[-1], rows[place]
        come[group] += 1
        size -= 1
        yield group, rows.pop()


def halves(made: Maker) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Files to train on and to test on, by stratum. Which is which depends on the module's name and its neighbours' alone."""
    strata: dict[str, list[Path]] = {}
    for path in sources():
        stratum = made.stratum(module_name(path))
        if stratum is not None:
            strata.setdefault(stratum, []).append(path)
    for paths in strata.values():
        paths.sort(key=lambda path: (number(module_name(path)), path))
    train = {name: [p for n, p in enumerate(paths) if n % HELD_OUT != HELD_OUT - 1] for name, paths in strata.items()}
    test = {name: paths[HELD_OUT - 1 :: HELD_OUT] for name, paths in strata.items()}
    return train, test


def _merged(one: dict[str, list[Path]], other: dict[str, list[Path]]) -> dict[str, list[Path]]:
    return {name: sorted([*paths, *other[name]]) for name, paths in one.items()}


def _shuffled(strata: dict[str, list[Path]], order: random.Random) -> list[Path]:
    """All files in a random order that runs through each stratum at an even pace."""
    placed: list[tuple[float, str, Path]] = []
    for name, paths in sorted(strata.items()):
        paths = list(paths)
        order.shuffle(paths)
        placed += [((place + order.random()) / len(paths), name, path) for place, path in enumerate(paths)]
    return [path for _, _, path in sorted(placed)]
