"""Findings of ``tunesmith data lint`` in files of unpaired preference: counts of desirable and undesirable
rows, repeated and contradicting rows, and whether the two kinds are balanced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tunesmith.data.check.balance import Balance
from tunesmith.data.check.lint_pairs import RowKinds, answer_digest, characters
from tunesmith.data.encode.judgements import prompt_key
from tunesmith.data.formats.dialogues import NONEMPTY_ANSWER
from tunesmith.data.row_problems import RowProblem
from tunesmith.data.rows import Judged
from tunesmith.json_types import JsonObject

KINDS = {
    "empty": "with an empty response",
    "duplicates": "that repeat an earlier row",
    "contradictions": "whose label contradicts an earlier row",
}


@dataclass
class JudgementFindings:
    """Counts of one file.

    ``rows``        usable rows; ``desirable`` of them are desirable
    ``characters``  of all desirable responses (True) and of all undesirable ones (False)
    ``prompts``     keys of the distinct prompts
    """

    path: str
    role: str
    rows: int = 0
    desirable: int = 0
    characters: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    prompts: set[int] = field(default_factory=set)
    kinds: RowKinds = field(default_factory=lambda: RowKinds(KINDS))

    def count_refused(self, problem: RowProblem) -> None:
        """Count an unusable row if its response is empty."""
        if problem.expected == NONEMPTY_ANSWER:
            self.kinds.count("empty", f"{self.path}:{problem.row}")

    def add(self, row: Judged, number: int, seen: dict[bytes, str]) -> None:
        """Count row ``number``. ``seen``: (prompt, response, label) -> its first place in any file."""
        where, prompt = f"{self.path}:{number}", prompt_key(row)
        desirable = bool(row.desirable)
        self.rows += 1
        self.desirable += desirable
        self.characters[desirable] += characters(row.response)
        self.prompts.add(prompt)
        key = prompt.to_bytes(8, "little") + answer_digest(row.response)
        for kind, label in ("duplicates", desirable), ("contradictions", not desirable):
            if earlier := seen.get(key + bytes([label])):
                self.kinds.count(kind, f"{where} and {earlier}")
        seen.setdefault(key + bytes([desirable]), where)

    def as_dict(self) -> JsonObject:
        """Return the counts as JSON; means are None where there is no row of the kind."""
        undesirable = self.rows - self.desirable
        return {
            "path": self.path,
            "role": self.role,
            "rows": self.rows,
            "desirable": self.desirable,
            "undesirable": undesirable,
            "prompts": len(self.prompts),
            **self.kinds.as_dict(),
            "characters_desirable": self.characters[True] / self.desirable if self.desirable else None,
            "characters_undesirable": self.characters[False] / undesirable if undesirable else None,
        }

    def lines(self) -> list[str]:
        """Return the counts and lengths, then one line for each kind of row that occurs."""
        good, bad = self.desirable, self.rows - self.desirable
        head = f"{self.path}: {good} desirable and {bad} undesirable rows for {len(self.prompts)} prompts"
        if good and bad:
            means = self.characters[True] / good, self.characters[False] / bad
            head += f" (mean characters: desirable {means[0]:.0f}, undesirable {means[1]:.0f})"
        return [head, *self.kinds.lines(self.path)]


def balance_warnings(files: Sequence[JudgementFindings]) -> list[str]:
    """Return what is wrong with the balance of all training files together.

    One file may hold the desirable responses, another the undesirable ones.
    """
    train = [file for file in files if file.role == "train"]
    desirable = sum(file.desirable for file in train)
    counts = Balance(desirable, sum(file.rows for file in train) - desirable)
    return [text for text in (counts.one_sided(), counts.advice()) if text is not None]
