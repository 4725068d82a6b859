"""Findings of ``tunesmith data lint`` in files of preference pairs and rankings: unusable, repeated and
contradicting pairs, and how often the longer answer is the preferred one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tunesmith.data.formats.dialogues import NONEMPTY_ANSWER
from tunesmith.data.formats.preference_fields import DIFFERENT_ANSWERS, SAME_PROMPT, strip_contents
from tunesmith.data.row_problems import RowProblem
from tunesmith.data.rows import Message, Ranking
from tunesmith.json_types import JsonObject

FIRST = 10
"""Rows listed of each kind."""

REFUSED = {DIFFERENT_ANSWERS: "equal", NONEMPTY_ANSWER: "empty", SAME_PROMPT: "prompts_differ"}
"""``expected`` of a refused row -> its kind."""

KINDS = {
    "equal": "with equal answers",
    "empty": "with an empty answer",
    "prompts_differ": "whose sides differ in their prompt",
    "duplicates": "that repeat an earlier pair",
    "contradictions": "that prefer what an earlier row rejects",
    "against_scores": "whose scores contradict the preference",
}


class RowKinds:
    """Counts of rows by the keys of ``kinds``, and where the first FIRST rows of each kind are."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds = kinds
        self.counts = dict.fromkeys(kinds, 0)
        self.first: dict[str, list[str]] = {kind: [] for kind in kinds}

    def count(self, kind: str, where: str) -> None:
        self.counts[kind] += 1
        if len(self.first[kind]) < FIRST:
            self.first[kind].append(where)

    def as_dict(self) -> JsonObject:
        return {**self.counts, "first": {kind: places for kind, places in self.first.items() if places}}

    def lines(self, path: str) -> list[str]:
        """Return one line for each kind that occurs in the file ``path``."""
        lines = []
        for kind, count in self.counts.items():
            if count:
                places = "; ".join(place.replace(f"{path}:", "row ") for place in self.first[kind])
                more = "; ..." if count > FIRST else ""
                rows = "row" if count == 1 else "rows"
                lines.append(f"  {count} {rows} {self.kinds[kind]}: {places}{more}")
        return lines


@dataclass
class PairFindings:
    """Counts of one file. A pair is two answers of one ranking whose ranks differ.

    ``rows``             usable rankings
    ``longer, shorter``  pairs whose better answer is the longer or the shorter one, in characters
    ``better, worse``    characters of all better and all worse answers
    """

    path: str
    role: str
    rows: int = 0
    pairs: int = 0
    longer: int = 0
    shorter: int = 0
    better: int = 0
    worse: int = 0
    kinds: RowKinds = field(default_factory=lambda: RowKinds(KINDS))

    def count_refused(self, problem: RowProblem) -> None:
        """Count an unusable row if it is of one of the kinds in REFUSED."""
        if problem.expected in REFUSED:
            self.kinds.count(REFUSED[problem.expected], f"{self.path}:{problem.row}")

    def add(self, row: Ranking, number: int, seen: dict[bytes, str]) -> None:
        """Count row ``number``. ``seen``: (prompt, better, worse) -> its first place in any file."""
        where = f"{self.path}:{number}"
        self.rows += 1
        lengths = [characters(answer) for answer in row.answers]
        answers = [answer_digest(answer) for answer in row.answers]
        prompt = answer_digest(row.prompt)
        kinds: dict[str, str] = {}
        for better, worse in row.pairs():
            self.pairs += 1
            self.longer += lengths[better] > lengths[worse]
            self.shorter += lengths[better] < lengths[worse]
            self.better += lengths[better]
            self.worse += lengths[worse]
            key = prompt + answers[better] + answers[worse]
            reverse = prompt + answers[worse] + answers[better]
            for kind, earlier in ("duplicates", seen.get(key)), ("contradictions", seen.get(reverse)):
                if earlier is not None and earlier != where:
                    kinds.setdefault(kind, f"{where} and {earlier}")
            if row.scores is not None and row.scores[better] < row.scores[worse]:
                kinds.setdefault("against_scores", where)
            seen.setdefault(key, where)
        for kind, place in kinds.items():
            self.kinds.count(kind, place)

    def as_dict(self) -> JsonObject:
        """Return the counts as JSON; shares and means are None where there is no pair."""
        unequal = self.longer + self.shorter
        return {
            "path": self.path,
            "role": self.role,
            "rows": self.rows,
            "pairs": self.pairs,
            **self.kinds.as_dict(),
            "longer_chosen": self.longer / unequal if unequal else None,
            "as_long": self.pairs - unequal,
            "characters_chosen": self.better / self.pairs if self.pairs else None,
            "characters_rejected": self.worse / self.pairs if self.pairs else None,
        }

    def lines(self) -> list[str]:
        """Return the lengths, then one line for each kind of row that occurs."""
        head = f"{self.path}: {self.pairs} pairs in {self.rows} rows"
        if unequal := self.longer + self.shorter:
            head += (
                f"; where lengths differ, the longer answer is the better one in {self.longer / unequal:.1%} (mean "
                f"characters: better {self.better / self.pairs:.0f}, worse {self.worse / self.pairs:.0f})"
            )
        return [head, *self.kinds.lines(self.path)]


def characters(answer: str | Sequence[Message]) -> int:
    """Return the number of characters of all turns of an answer."""
    return len(answer) if isinstance(answer, str) else sum(len(message["content"]) for message in answer)


def answer_digest(answer: str | Sequence[Message]) -> bytes:
    """Return a digest that ignores the order of a turn's keys and the spaces around its text."""
    written = json.dumps(strip_contents(answer), sort_keys=True, default=str)
    return hashlib.blake2b(written.encode(), digest_size=8).digest()
