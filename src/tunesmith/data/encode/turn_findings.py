"""Findings in the turns of a file: turn tokens typed in a message, unknown keys, unfilled placeholders."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from tunesmith.data.encode import turn_tokens
from tunesmith.data.encode.templates import Renderer
from tunesmith.data.formats.turns import KNOWN_KEYS
from tunesmith.data.rows import Answered, Chat, Judged, Prompt, Row, turns
from tunesmith.json_types import JsonObject

FIRST = 3
"""Rows listed of each finding."""

PLACEHOLDER = re.compile(r"\{\{\s*[\w.]+\s*\}\}")
HEADER = re.compile(r"^### (?:Instruction|Input|Response|질문|답변):", re.MULTILINE)
"""Signs of an unfilled template, and of text that another prompt format has already rendered."""

READ_AS = {"text": "read as plain text", "allow": "read as the token", "error": "refused"}


def find(row: Row, render: Renderer | None) -> Counter[str]:
    """Count each finding in a row.

    Without ``render`` no template is known, so turn tokens are not counted.
    """
    if isinstance(row, Answered):
        ranking = row.ranking() if isinstance(row, Judged) else row
        parts = (ranking.prompt, *ranking.answers)
        row = Chat(tuple(message for part in parts for message in turns(part)), ranking.tools)
    if isinstance(row, Prompt):
        row = row.asked(render is not None)
    if not isinstance(row, Chat):
        return Counter()
    found: Counter[str] = Counter()
    if render is not None:
        policy = turn_tokens.policy_of(render.tokenizer)
        for tokens in turn_tokens.typed(row, render).values():
            for token, count in tokens.items():
                found[f"the turn token {token} typed in a message, {READ_AS[policy]}"] += count
    template = "" if render is None else repr(render.tokenizer.chat_template)
    for message in row.messages:
        for key in message.keys() - KNOWN_KEYS:
            if key not in template:
                found[f"the key {key!r} in a turn, which no template reads"] += 1
        found["a placeholder such as {{name}} in a message"] += len(PLACEHOLDER.findall(message["content"]))
        for header in HEADER.findall(message["content"]):
            found[f"the header {header} of another prompt format in a message"] += 1
    return +found


@dataclass
class TurnFindings:
    """The findings of one file: in how many rows, how often, and where the first ones are."""

    path: str
    rows: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[int]] = field(default_factory=dict)

    def add(self, row: Row, number: int, render: Renderer | None) -> None:
        """Count the findings of row ``number`` of the file."""
        for what, count in find(row, render).items():
            self.rows[what] += 1
            self.counts[what] += count
            self.first.setdefault(what, [])
            if len(self.first[what]) < FIRST:
                self.first[what].append(number)

    def as_list(self) -> list[JsonObject]:
        return [
            {"what": what, "rows": self.rows[what], "count": self.counts[what], "first": self.first[what]}
            for what in self.rows
        ]

    def lines(self) -> list[str]:
        return lines(self.path, self.as_list())


def lines(path: str, findings: list[JsonObject]) -> list[str]:
    """Return ``TurnFindings.as_list`` as lines to print."""
    out = []
    for one in findings:
        rows, more = one["rows"], ", ..." if one["rows"] > FIRST else ""
        often = "" if one["count"] == rows else f" ({one['count']} times)"
        listed = ", ".join(map(str, one["first"]))
        have = "row has" if rows == 1 else "rows have"
        out.append(f"{path}: {rows} {have} {one['what']}{often}: row {listed}{more}")
    return out
