"""Rows as the model will see them, what is learnt in colour."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text as Coloured

from tunesmith.data.batch.pack import Example
from tunesmith.data.data_config import Source
from tunesmith.data.encode.rankings import encode
from tunesmith.data.encode.templates import apply_template
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import RowProblem
from tunesmith.data.rows import Chat, Judged, Labelled, Question, Ranking, Row, Tagged
from tunesmith.data.store.cache import targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADS = (Labelled, Tagged, Question)
"""Rows that are shown as they are: what a label's number is, an objective knows once it has seen all rows."""

LEARNT = "bold green"
CONTEXT = "dim"


@dataclass(frozen=True)
class Shown:
    """One example: where its row stands, its text in stretches (text, learnt), and its counts."""

    where: str
    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    supervised: int
    known: str | None = None
    """Of a row that is no text to be written: its label, tags or answers, in words."""

    def head(self) -> str:
        """Where it stands, and what is known of it or how much is learnt."""
        if self.known is not None:
            return f"{self.where}: {self.known}"
        return f"{self.where}: {self.supervised} of {self.tokens} tokens learnt"

    def coloured(self) -> Coloured:
        """The whole text; what is learnt is green, and underlined for those who see no colour."""
        text = Coloured()
        for piece, learnt in self.pieces:
            text.append(piece, style=f"{LEARNT} underline" if learnt else CONTEXT)
        return text

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        pieces = [{"text": text, "supervised": learnt} for text, learnt in self.pieces]
        return {
            "where": self.where,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "pieces": pieces,
        } | ({} if self.known is None else {"known": self.known})


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


def preview(
    source: Source,
    objective: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    rows: int = 3,
    accepted: tuple[type, ...] = (),
) -> Preview:
    """The first ``rows`` good rows of a source as examples, and the bad rows met before them.

    ``accepted``: more row types than the objective learns from; these are shown as the file has them.

    Raises DataError when the file cannot be read or a row cannot be rendered.
    """
    opened = open_source(source, accepted or tuple(objective.traits.rows))
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
        good += 1
        where = f"{record.path}:{record.row}"
        if isinstance(row, Ranking):
            shown.append(_ranking(where, row, tokenizer))
        elif isinstance(row, Judged):
            shown.append(_judged(where, row, tokenizer))
        elif isinstance(row, HEADS) or not isinstance(row, tuple(objective.traits.rows)):
            shown.append(_as_it_is(where, row, tokenizer))
        else:
            for example in objective.encode([row], tokenizer)[0]:
                pieces = tuple(stretches(example, tokenizer))
                shown.append(Shown(where, pieces, len(example["input_ids"]), targets(example)))
        if good == rows:
            break
    return Preview(source.label, opened.description, said, tuple(shown), tuple(problems))


def _as_it_is(where: str, row: Row, tokenizer: PreTrainedTokenizerBase) -> Shown:
    """A row with what is known of it: tagged words and the first answer are coloured."""
    text, marked, known = "", [], "nothing known"
    if isinstance(row, Labelled):
        text = row.text if row.text_pair is None else f"{row.text}\n{row.text_pair}"
        if row.labels is not None:
            known = f"labels {', '.join(row.labels) or 'none'}"
        elif row.label is not None:
            known = f"label {row.label}"
    elif isinstance(row, Tagged):
        text = row.text
        tagged = [(place, tag) for place, tag in zip(row.words, row.tags or ()) if tag != "O"]
        marked = [place for place, _ in tagged]
        if row.tags is not None:
            known = (
                ", ".join(f"{text[start:end]}/{tag}" for (start, end), tag in tagged)
                or "no word has a tag but O"
            )
    elif isinstance(row, Question):
        before = f"{row.question}\n"
        text = before + row.context
        if row.answers is not None:
            known = ", ".join(f"{answer!r} at {start}" for answer, start in row.answers) or "no answer"
        marked = [
            (len(before) + start, len(before) + start + len(answer))
            for answer, start in (row.answers or ())[:1]
        ]
    pieces, at = [], 0
    for start, end in marked:
        pieces += [(text[at:start], False), (text[start:end], True)]
        at = end
    pieces.append((text[at:], False))
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Shown(where, tuple(piece for piece in pieces if piece[0]), count, 0, known)


def _ranking(where: str, row: Ranking, tokenizer: PreTrainedTokenizerBase) -> Shown:
    """The prompt once, then each answer under its rank, as the model sees them."""
    ((example,),) = encode([row], tokenizer, max_length=None, overlong="error")
    ids, learnt = example["input_ids"], example["learnt"]
    edges = np.cumsum(example["answers"]).tolist()
    pieces = stretches({"input_ids": ids[: edges[0]], "supervised": learnt[: edges[0]]}, tokenizer)
    for place, (start, end) in enumerate(itertools.pairwise(edges)):
        score = "" if row.scores is None else f", score {row.scores[place]:g}"
        pieces.append((f"\n--- answer {place + 1}: rank {row.ranks[place] + 1}{score}\n", False))
        pieces += stretches({"input_ids": ids[start:end], "supervised": learnt[start:end]}, tokenizer)
    order = sorted(range(len(row.ranks)), key=lambda place: row.ranks[place])
    said = f"answer {order[0] + 1}" + "".join(
        f" {'=' if row.ranks[one] == row.ranks[other] else '>'} {other + 1}"
        for one, other in itertools.pairwise(order)
    )
    count = int(learnt.sum())
    return Shown(where, tuple(pieces), len(ids), count, f"{said}; {count} of {len(ids)} tokens learnt")


def _judged(where: str, row: Judged, tokenizer: PreTrainedTokenizerBase) -> Shown:
    """The prompt, then the response, as the model sees them; the head says whether the response is desirable."""
    ((example,),) = encode([row.ranking()], tokenizer, max_length=None, overlong="error")
    pieces = stretches({"input_ids": example["input_ids"], "supervised": example["learnt"]}, tokenizer)
    label = {True: "desirable", False: "undesirable", None: "not labelled"}[row.desirable]
    count, tokens = int(example["learnt"].sum()), len(example["input_ids"])
    return Shown(where, tuple(pieces), tokens, count, f"{label}; {count} of {tokens} tokens learnt")


def stretches(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of an example cut where learning begins and ends, decoded from its tokens: (text, learnt)."""
    ids, learnt = example["input_ids"], example["supervised"]
    edges = [0, *(np.flatnonzero(np.diff(learnt.astype(np.int8))) + 1).tolist(), len(ids)]
    return [
        (
            tokenizer.decode(
                ids[start:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
            bool(learnt[start]),
        )
        for start, end in itertools.pairwise(edges)
        if end > start
    ]
