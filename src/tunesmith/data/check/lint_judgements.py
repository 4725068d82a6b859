"""What `tunesmith data lint` reports of unpaired preference.

It counts desirable and undesirable rows, finds rows that repeat or contradict one another, and says whether the two kinds
can be trained on as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.check.balance import Balance
from tunesmith.data.check.lint_pairs import FIRST, answer_digest, characters
from tunesmith.data.encode.judgements import prompt_key
from tunesmith.data.formats.preference_fields import NONEMPTY_ANSWER
from tunesmith.data.row_problems import RowProblem
from tunesmith.data.rows import Judged

KINDS = {
    "empty": "with an empty response",
    "duplicates": "that repeat an earlier row",
    "contradictions": "that judge a response otherwise than an earlier row",
}


@dataclass
class Judgements:
    """Figures of one file.

    ``rows``        rows that can be used; ``desirable`` of them are desirable
    ``characters``  of all desirable responses (True) and of all undesirable ones (False)
    ``prompts``     keys of the distinct prompts
    ``counts``      rows of each of KINDS; ``first``: where the first of them are, and the row each is like
    """

    path: str
    role: str
    rows: int = 0
    desirable: int = 0
    characters: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    prompts: set[int] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    first: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def refused(self, problem: RowProblem) -> None:
        """Count a row that cannot be used, if its response is empty."""
        if problem.expected == NONEMPTY_ANSWER:
            self._count("empty", f"{self.path}:{problem.row}")

    def add(self, row: Judged, number: int, seen: dict[bytes, str]) -> None:
        """Count row ``number``. ``seen``: where each (prompt, response, label) was read first, in any file."""
        where, prompt = f"{self.path}:{number}", prompt_key(row)
        good = bool(row.desirable)
        self.rows += 1
        self.desirable += good
        self.characters[good] += characters(row.response)
        self.prompts.add(prompt)
        said = prompt.to_bytes(8, "little") + answer_digest(row.response)
        for kind, other in (
            ("duplicates", seen.get(said + bytes([good]))),
            ("contradictions", seen.get(said + bytes([not good]))),
        ):
            if other is not None:
                self._count(kind, f"{where} and {other}")
        seen.setdefault(said + bytes([good]), where)

    def _count(self, kind: str, where: str) -> None:
        self.counts[kind] += 1
        if len(self.first[kind]) < FIRST:
            self.first[kind].append(where)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; means are None where there is no row of the kind."""
        undesirable = self.rows - self.desirable
        return {
            "path": self.path,
            "role": self.role,
            "rows": self.rows,
            "desirable": self.desirable,
            "undesirable": undesirable,
            "prompts": len(self.prompts),
            **self.counts,
            "first": {kind: places for kind, places in self.first.items() if places},
            "characters_desirable": self.characters[True] / self.desirable if self.desirable else None,
            "characters_undesirable": self.characters[False] / undesirable if undesirable else None,
        }

    def lines(self) -> list[str]:
        """For people: the counts, then each kind of row that there is."""
        found = self.as_dict()
        head = f"{self.path}: {self.desirable} desirable and {found['undesirable']} undesirable rows for {found['prompts']} prompts"
        if self.desirable and found["undesirable"]:
            head += (
                f" (characters on average: desirable {found['characters_desirable']:.0f}, "
                f"undesirable {found['characters_undesirable']:.0f})"
            )
        out = [head]
        for kind, count in self.counts.items():
            if count:
                places = "; ".join(place.replace(f"{self.path}:", "row ") for place in self.first[kind])
                places += "; ..." if count > FIRST else ""
                out.append(f"  {count} {'row' if count == 1 else 'rows'} {KINDS[kind]}: {places}")
        return out


def warnings(files: Sequence[Judgements]) -> list[str]:
    """Return what is wrong with the balance of all training files together.

    One file may hold the desirable responses, another the undesirable ones.
    """
    train = [file for file in files if file.role == "train"]
    good = sum(file.desirable for file in train)
    found = Balance(good, sum(file.rows for file in train) - good)
    return [text for text in (found.one_sided(), found.advice()) if text is not None]
