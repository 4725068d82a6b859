"""Rows as the model will see them, what is learnt in colour."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.text import Text as Coloured

from tunesmith.data.cache import Example, targets
from tunesmith.data.config import Source
from tunesmith.data.problems import RowProblem
from tunesmith.data.rows import Chat
from tunesmith.data.source import open_source
from tunesmith.data.templates import apply_template

LEARNT = "bold green"
CONTEXT = "dim"


@dataclass(frozen=True)
class Shown:
    """One example: where its row stands, its text in stretches (text, learnt), and its counts."""

    where: str
    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    supervised: int

    def coloured(self) -> Coloured:
        """The whole text; what is learnt is green, and underlined for those who see no colour."""
        text = Coloured()
        for piece, learnt in self.pieces:
            text.append(piece, style=f"{LEARNT} underline" if learnt else CONTEXT)
        return text

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        pieces = [{"text": text, "supervised": learnt} for text, learnt in self.pieces]
        return {"where": self.where, "tokens": self.tokens, "supervised": self.supervised, "pieces": pieces}


@dataclass(frozen=True)
class Preview:
    """The first rows of a source."""

    path: str
    format: str
    template: str
    shown: tuple[Shown, ...]
    problems: tuple[RowProblem, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "path": self.path,
            "format": self.format,
            "template": self.template,
            "rows": [item.as_dict() for item in self.shown],
            "problems": [problem.as_dict() for problem in self.problems],
        }


def preview(source: Source, objective: Any, tokenizer: Any, template: str | None = None, rows: int = 3) -> Preview:
    """The first ``rows`` good rows of a source as examples, and the bad rows met before them.

    Raises DataError when the file cannot be read or a row cannot be rendered.
    """
    opened = open_source(source, tuple(objective.rows))
    said = "none: the rows are plain text"
    if template is not None or Chat in opened.kinds:
        tokenizer, said = apply_template(tokenizer, template)
    shown: list[Shown] = []
    problems: list[RowProblem] = []
    good = 0
    for item in opened.rows():
        if isinstance(item, RowProblem):
            problems.append(item)
            continue
        record, row = item
        for example in objective.encode([row], tokenizer)[0]:
            pieces = tuple(stretches(example, tokenizer))
            shown.append(Shown(f"{record.path}:{record.row}", pieces, len(example["input_ids"]), targets(example)))
        good += 1
        if good == rows:
            break
    return Preview(source.label, opened.description, said, tuple(shown), tuple(problems))


def stretches(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of an example cut where learning begins and ends, decoded from its tokens: (text, learnt)."""
    ids, learnt = example["input_ids"], example["supervised"]
    edges = [0, *(np.flatnonzero(np.diff(learnt.astype(np.int8))) + 1).tolist(), len(ids)]
    return [
        (
            tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False),
            bool(learnt[start]),
        )
        for start, end in itertools.pairwise(edges)
        if end > start
    ]
