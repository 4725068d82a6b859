"""Draw rows of one kind: module by module in a seeded order, evenly over the groups, no row twice.

The rows are a pure function of kind, language, seed, split and the running Python. No more modules are read
than needed.
"""

from __future__ import annotations

import inspect
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from tunesmith.data.read.library import Module, modules, read_module
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject
from tunesmith.synth.python.classify import classify, multilabel, topic
from tunesmith.synth.python.preferences import judged, preferences
from tunesmith.synth.python.questions import NO_ANSWER, docstrings, instructions, qa
from tunesmith.synth.python.tag import tag
from tunesmith.synth.python.texts import summaries, translations
from tunesmith.synth.python.wording import Candidate, number


@dataclass(frozen=True)
class Kind:
    """A kind of rows. ``make(module, lang, seed)`` yields all rows of a module.

    ``labels``: the labels of a row that the summary counts; None = its group. ``stratum(name of a module)``:
    modules are read and held out evenly from all strata; "" = not used (``encodings`` holds tables that are
    all alike). ``unanswerable``: some rows are questions without an answer, whose share the user sets.
    """

    make: Callable[[Module, str, int], Iterator[Candidate]]
    labels: Callable[[JsonObject], list[str]] | None = None
    stratum: Callable[[str], str] = lambda module: "" if module.startswith("encodings") else "all"
    unanswerable: bool = False

    @property
    def about(self) -> str:
        """Return which parts of a row are real and which are made up: the docstring of ``make``."""
        return inspect.getdoc(self.make) or ""


KINDS = {
    "docstrings": Kind(docstrings, stratum=lambda module: "all"),
    "instructions": Kind(instructions),
    "preferences": Kind(preferences),
    "judged": Kind(judged),
    "classify": Kind(classify, stratum=topic),
    "multilabel": Kind(multilabel, labels=lambda row: row["labels"] or ["none"]),
    "tag": Kind(tag, labels=lambda row: [name[2:] for name in row["ner_tags"] if name[0] == "B"] or ["-"]),
    "qa": Kind(qa, unanswerable=True),
    "summaries": Kind(summaries),
    "translations": Kind(translations),
}

SPLITS = ("train", "test")

HELD_OUT = 5
"""One module in this many is for testing."""

AHEAD = 600
"""Rows held back while modules are read, so that rows of one module are spread."""

Pool = dict[str, list[Candidate]]
Progress = Callable[[int, int], None]
"""Called with the modules read so far and their total number."""


def draw(
    name: str, rows: int, seed: int, lang: str, split: str | None, no_answer: float, on_progress: Progress
) -> list[Candidate]:
    """Return ``rows`` rows of a kind in a seeded order. Raises UserError when fewer exist.

    ``split``: "train" or "test", which share no module and no row; None = all modules.
    ``no_answer``: the share of questions that their context does not answer.
    """
    wanted = round(rows * no_answer)
    unanswerable: list[Candidate] = []
    answerable: list[Candidate] = []
    for row in stream(KINDS[name], lang, seed, split, on_progress):
        (unanswerable if row.group.startswith(NO_ANSWER) else answerable).append(row)
        if len(unanswerable) >= wanted and len(answerable) >= rows - wanted:
            break
    else:
        counts = range(len(unanswerable) + len(answerable), -1, -1)
        shares = ((count, round(count * no_answer)) for count in counts)
        most = next(n for n, none in shares if none <= len(unanswerable) and n - none <= len(answerable))
        where = f" in the modules for {split}" if split else ""
        where += f" with --no-answer {no_answer:g}" if unanswerable else ""
        raise UserError(
            f"{name}: --rows is {rows}, but this Python's library gives {most}{where}. Type --rows {most}, or fewer."
        )
    drawn = [*unanswerable[:wanted], *answerable[: rows - wanted]]
    random.Random(f"{seed}:rows").shuffle(drawn)
    return drawn


def stream(
    kind: Kind, lang: str, seed: int, split: str | None, on_progress: Progress = lambda done, total: None
) -> Iterator[Candidate]:
    """Yield every row of a kind once, from the group with the fewest rows so far among the modules read."""
    order = random.Random(f"{seed}:modules")
    seen: set[str] = set()
    if split == "test":  # a row that a training module also gives is no test
        training = map(read_module, chain(*strata(kind, "train")))
        seen = {_key(row) for module in training for row in kind.make(module, lang, seed)}
    places: list[tuple[float, str]] = []  # a random order that runs through each stratum at an even pace
    for names in strata(kind, split):
        order.shuffle(names)
        places += [(place / len(names), name) for place, name in enumerate(names)]
    pool: Pool = defaultdict(list)
    drawn: Counter[str] = Counter()
    later: list[Candidate] = []
    for done, (_, name) in enumerate(sorted(places), 1):
        subjects: dict[str, list[Candidate]] = defaultdict(list)
        for row in kind.make(read_module(name), lang, seed):
            if _key(row) not in seen:
                seen.add(_key(row))
                subjects[row.about].append(row)
        for candidates in subjects.values():  # for now one of each subject: of the group with the fewest rows
            candidates.sort(key=lambda row: (drawn[row.group] + len(pool[row.group]), row.group))
            first, *others = candidates
            pool[first.group].append(first)
            later += others
        on_progress(done, len(places))
        yield from _draw_from_pool(pool, drawn, order, AHEAD)
    for row in later:
        pool[row.group].append(row)
    yield from _draw_from_pool(pool, drawn, order, 0)


def _draw_from_pool(pool: Pool, drawn: Counter[str], order: random.Random, left: int) -> Iterator[Candidate]:
    """Draw rows until ``left`` of them remain."""
    for _ in range(sum(map(len, pool.values())) - left):
        group = min((name for name, rows in pool.items() if rows), key=lambda name: (drawn[name], name))
        drawn[group] += 1
        yield pool[group].pop(order.randrange(len(pool[group])))


def _key(row: Candidate) -> str:
    """Return what may not occur twice: all columns but the last, which is the answer."""
    return json.dumps([*row.row.values()][:-1])


def strata(kind: Kind, split: str | None) -> list[list[str]]:
    """Return the modules of a split by stratum. The names of the modules alone decide which are held out."""
    strata: dict[str, list[str]] = defaultdict(list)
    for name in sorted(modules(), key=lambda name: (number(name), name)):
        strata[kind.stratum(name)].append(name)
    excluded = {"train": {HELD_OUT - 1}, "test": {*range(HELD_OUT - 1)}, None: set[int]()}[split]
    used = [strata[stratum] for stratum in sorted(strata) if stratum]
    return [[name for place, name in enumerate(names) if place % HELD_OUT not in excluded] for names in used]
