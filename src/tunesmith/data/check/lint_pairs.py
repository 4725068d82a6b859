"""What `tunesmith data lint` says of answers that were compared: sides that are no use, pairs that repeat or contradict one
another, and whether length alone tells which answer was chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.formats.preference_fields import (
    DIFFERENT_ANSWERS,
    NONEMPTY_ANSWER,
    SAME_PROMPT,
    strip_contents,
)
from tunesmith.data.row_problems import RowProblem
from tunesmith.data.rows import Message, Ranking

FIRST = 10
"""Rows named of each kind."""

REFUSED = {DIFFERENT_ANSWERS: "equal", NONEMPTY_ANSWER: "empty", SAME_PROMPT: "prompts_differ"}
"""Rows that are problems, by what was expected of them."""

SAID = {
    "equal": "with equal answers",
    "empty": "with an empty answer",
    "prompts_differ": "whose sides differ in their prompt",
    "duplicates": "that repeat an earlier pair",
    "contradictions": "that prefer what an earlier row rejects",
    "against_scores": "whose scores say the contrary",
}


@dataclass
class Pairs:
    """Of one file. ``rows``: rankings that can be used; ``pairs``: two answers of one of them whose ranks differ. ``longer`` and
    ``shorter``: pairs whose better answer is the longer or shorter one, in characters; ``better`` and ``worse``: characters of
    all. ``counts``: rows of each kind in SAID; ``first``: where the first of them stand, and the row they are like."""

    path: str
    role: str
    rows: int = 0
    pairs: int = 0
    longer: int = 0
    shorter: int = 0
    better: int = 0
    worse: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SAID, 0))
    first: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in SAID})

    def refused(self, problem: RowProblem) -> None:
        """Count a row that cannot be used, if it is one of the kinds in REFUSED."""
        if problem.expected in REFUSED:
            self._count(REFUSED[problem.expected], f"{self.path}:{problem.row}")

    def add(self, row: Ranking, number: int, seen: dict[bytes, str]) -> None:
        """Count row ``number``. ``seen``: where each (prompt, better, worse) was read first, in this file and in others."""
        where = f"{self.path}:{number}"
        self.rows += 1
        lengths = [characters(answer) for answer in row.answers]
        answers = [answer_digest(answer) for answer in row.answers]
        prompt = answer_digest(row.prompt)
        found: dict[str, str] = {}
        for better, worse in row.pairs():
            self.pairs += 1
            self.longer += lengths[better] > lengths[worse]
            self.shorter += lengths[better] < lengths[worse]
            self.better += lengths[better]
            self.worse += lengths[worse]
            key, reverse = (
                prompt + answers[better] + answers[worse],
                prompt + answers[worse] + answers[better],
            )
            for kind, other in (("duplicates", seen.get(key)), ("contradictions", seen.get(reverse))):
                if other is not None and other != where:
                    found.setdefault(kind, f"{where} and {other}")
            if row.scores is not None and row.scores[better] < row.scores[worse]:
                found.setdefault("against_scores", where)
            seen.setdefault(key, where)
        for kind, place in found.items():
            self._count(kind, place)

    def _count(self, kind: str, where: str) -> None:
        self.counts[kind] += 1
        if len(self.first[kind]) < FIRST:
            self.first[kind].append(where)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; shares and means are None where there is no pair."""
        unequal = self.longer + self.shorter
        return {
            "path": self.path,
            "role": self.role,
            "rows": self.rows,
            "pairs": self.pairs,
            **self.counts,
            "first": {kind: places for kind, places in self.first.items() if places},
            "longer_chosen": self.longer / unequal if unequal else None,
            "as_long": self.pairs - unequal,
            "characters_chosen": self.better / self.pairs if self.pairs else None,
            "characters_rejected": self.worse / self.pairs if self.pairs else None,
        }

    def lines(self) -> list[str]:
        """For people: how the lengths are, then each kind of row that there is."""
        said = self.as_dict()
        out = [f"{self.path}: {self.pairs} pairs in {self.rows} rows"]
        if said["longer_chosen"] is not None:
            out[0] += (
                f"; of two answers the longer one is the better in {said['longer_chosen']:.1%} "
                f"(characters on average: better {said['characters_chosen']:.0f}, worse {said['characters_rejected']:.0f})"
            )
        for kind, count in self.counts.items():
            if count:
                places = "; ".join(place.replace(f"{self.path}:", "row ") for place in self.first[kind])
                places += "; ..." if count > FIRST else ""
                out.append(f"  {count} {'row' if count == 1 else 'rows'} {SAID[kind]}: {places}")
        return out


def characters(answer: str | Sequence[Message]) -> int:
    """How long an answer is: the characters of all that it says."""
    return len(answer) if isinstance(answer, str) else sum(len(message["content"]) for message in answer)


def answer_digest(said: str | Sequence[Message]) -> bytes:
    """The same for all ways to write the same: the order of a turn's keys and the spaces around its text do not matter."""
    written = json.dumps(strip_contents(said), sort_keys=True, default=str)
    return hashlib.blake2b(written.encode(), digest_size=8).digest()
