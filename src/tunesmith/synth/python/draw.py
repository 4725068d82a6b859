"""Draws rows of a kind: module by module in an order that the seed gives, evenly from groups, no row twice.

A pure function of kind, language, seed, split and the Python that runs; reads no more modules than rows need.
"""

from __future__ import annotations

import inspect
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tunesmith.data.read.library import Module, modules, read_module
from tunesmith.errors import UserError
from tunesmith.synth.python.classify import classify, multilabel, topic
from tunesmith.synth.python.preferences import judged, preferences
from tunesmith.synth.python.questions import NO_ANSWER, docstrings, instructions, qa
from tunesmith.synth.python.tag import tag
from tunesmith.synth.python.wording import Candidate, number


@dataclass(frozen=True)
class Kind:
    """A kind of rows. ``make(module, lang, seed)`` yields all rows of a module; its docstring says what is real.

    ``labels``: what the summary counts of a row, None = its group. ``stratum`` of a module's name: modules are
    read and held out evenly from all strata; "" = not used. The encodings, tables that are all alike, are not.
    ``unanswerable``: some rows are questions without an answer, whose share a user chooses.
    """

    make: Callable[[Module, str, int], Iterator[Candidate]]
    labels: Callable[[dict[str, Any]], list[str]] | None = None
    stratum: Callable[[str], str] = lambda module: "" if module.startswith("encodings") else "all"
    unanswerable: bool = False

    @property
    def about(self) -> str:
        """What of a row is real and what is made up."""
        return inspect.getdoc(self.make) or ""


KINDS = {
    "docstrings": Kind(docstrings, stratum=lambda module: "all"),
    "instructions": Kind(instructions),
    "preferences": Kind(preferences),
    "judged": Kind(judged),
    "classify": Kind(classify, stratum=topic),
    "multilabel": Kind(multilabel, labels=lambda row: row["labels"] or ["none"]),
    "tag": Kind(tag, labels=lambda row: [one[2:] for one in row["ner_tags"] if one[0] == "B"] or ["-"]),
    "qa": Kind(qa, unanswerable=True),
}

SPLITS = ("train", "test")

HELD_OUT = 5
"""One module in so many is for testing."""

AHEAD = 600
"""Rows held while the modules are read, so that rows of one module do not follow one another."""

Pool = dict[str, list[Candidate]]
Progress = Callable[[int, int], None]
"""Called with the modules read so far and how many there are."""


def draw(
    name: str, rows: int, seed: int, lang: str, split: str | None, no_answer: float, on_progress: Progress
) -> list[Candidate]:
    """``rows`` rows of a kind, in an order that the seed gives. Raises UserError when fewer exist.

    ``split``: "train" or "test", whose modules are never the same and share no row; None = all modules.
    ``no_answer``: the share of questions that their context does not answer.
    """
    missing = round(rows * no_answer)
    none: list[Candidate] = []
    some: list[Candidate] = []
    for one in stream(KINDS[name], lang, seed, split, on_progress):
        (none if one.group.startswith(NO_ANSWER) else some).append(one)
        if len(none) >= missing and len(some) >= rows - missing:
            break
    else:
        shares = ((count, round(count * no_answer)) for count in range(len(none) + len(some), -1, -1))
        most = next(count for count, share in shares if share <= len(none) and count - share <= len(some))
        where = f" in the modules for {split}" if split else ""
        where += f" with --no-answer {no_answer:g}" if none else ""
        found = f"{name}: --rows is {rows}, but this Python's library gives {most}{where}."
        raise UserError(f"{found} Type --rows {most}, or fewer.")
    chosen = [*none[:missing], *some[: rows - missing]]
    random.Random(f"{seed}:rows").shuffle(chosen)
    return chosen


def stream(
    kind: Kind, lang: str, seed: int, split: str | None, on_progress: Progress = lambda done, total: None
) -> Iterator[Candidate]:
    """Every row of a kind, once; each from the group of which fewest have come, of the modules read so far."""
    order = random.Random(f"{seed}:modules")
    seen: set[str] = set()
    if split == "test":  # what also stands in a module to train on is no test
        training = map(read_module, chain(*strata(kind, "train")))
        seen = {_key(one) for module in training for one in kind.make(module, lang, seed)}
    places: list[tuple[float, str]] = []  # a random order that runs through each stratum at an even pace
    for names in strata(kind, split):
        order.shuffle(names)
        places += [(place / len(names), name) for place, name in enumerate(names)]
    pool: Pool = defaultdict(list)
    drawn: Counter[str] = Counter()
    later: list[Candidate] = []
    for done, (_, name) in enumerate(sorted(places), 1):
        subjects: dict[str, list[Candidate]] = defaultdict(list)
        for one in kind.make(read_module(name), lang, seed):
            if _key(one) not in seen:
                seen.add(_key(one))
                subjects[one.about].append(one)
        for some in subjects.values():  # one of each for now: of the group that has the fewest
            some.sort(key=lambda one: (drawn[one.group] + len(pool[one.group]), one.group))
            first, *others = some
            pool[first.group].append(first)
            later += others
        on_progress(done, len(places))
        yield from _drawn(pool, drawn, order, AHEAD)
    for one in later:
        pool[one.group].append(one)
    yield from _drawn(pool, drawn, order, 0)


def _drawn(pool: Pool, drawn: Counter[str], order: random.Random, left: int) -> Iterator[Candidate]:
    """Rows out of the pool until ``left`` of them stay."""
    for _ in range(sum(map(len, pool.values())) - left):
        group = min((name for name, rows in pool.items() if rows), key=lambda name: (drawn[name], name))
        drawn[group] += 1
        yield pool[group].pop(order.randrange(len(pool[group])))


def _key(one: Candidate) -> str:
    """What may not come twice: all columns but the last, which is the answer."""
    return json.dumps([*one.row.values()][:-1])


def strata(kind: Kind, split: str | None) -> list[list[str]]:
    """The modules of a split by stratum. Which are held out depends on the names of the modules alone."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(modules(), key=lambda name: (number(name), name)):
        found[kind.stratum(name)].append(name)
    unused = {"train": {HELD_OUT - 1}, "test": {*range(HELD_OUT - 1)}, None: set[int]()}[split]
    used = [found[stratum] for stratum in sorted(found) if stratum]
    return [[name for place, name in enumerate(names) if place % HELD_OUT not in unused] for names in used]
