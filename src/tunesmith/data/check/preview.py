"""Rows as the model sees them, with the supervised tokens in colour: ``tunesmith data preview``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text as RichText

from tunesmith.data.batch.pack import Example
from tunesmith.data.data_config import Source
from tunesmith.data.encode import prompt_examples, turn_tokens
from tunesmith.data.encode.rankings import encode
from tunesmith.data.encode.templates import Renderer, apply_template
from tunesmith.data.encode.turn_findings import find
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import RowProblem, shorten
from tunesmith.data.rows import Answered, Judged, Labelled, Prompt, Question, Ranking, Row, Tagged
from tunesmith.data.store.cache import targets
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK_ROWS = (Labelled, Tagged, Question)
"""Rows shown without encoding: an objective knows their label ids only after it has scanned all rows."""

SUPERVISED, CONTEXT = "bold green underline", "dim"
"""Styles; the underline is for readers who cannot tell the colours apart."""

UNKNOWN = "nothing known"

ORDER = "that of the file; training draws another one from the seed, unless train.shuffle is false"
"""The order of the rows shown, in words."""

Piece = tuple[str, bool]
"""A stretch of text, and whether it is supervised."""


@dataclass(frozen=True)
class PreviewRow:
    """One example. ``known``: its label, tags, answers or ranks as text; None where the target is text.

    ``notes``: ``turn_findings`` of the row."""

    where: str
    pieces: tuple[Piece, ...]
    tokens: int
    supervised: int
    known: str | None = None
    notes: tuple[str, ...] = ()

    def head(self) -> str:
        counts = f"{self.supervised} of {self.tokens} tokens supervised"
        return "; ".join([f"{self.where}: {counts if self.known is None else self.known}", *self.notes])

    def styled_text(self) -> RichText:
        text = RichText()
        for piece, supervised in self.pieces:
            text.append(piece, style=SUPERVISED if supervised else CONTEXT)
        return text

    def as_dict(self) -> JsonObject:
        pieces = [{"text": text, "supervised": supervised} for text, supervised in self.pieces]
        counts = {"where": self.where, "tokens": self.tokens, "supervised": self.supervised, "pieces": pieces}
        counts |= {"notes": list(self.notes)} if self.notes else {}
        return counts if self.known is None else counts | {"known": self.known}


@dataclass(frozen=True)
class Preview:
    """The first rows of a source, and the unusable rows before them."""

    path: str
    format: str
    template: str
    rows: tuple[PreviewRow, ...]
    problems: tuple[RowProblem, ...]

    def as_dict(self) -> JsonObject:
        return {
            "path": self.path,
            "format": self.format,
            "template": self.template,
            "rows": [row.as_dict() for row in self.rows],
            "problems": [problem.as_dict() for problem in self.problems],
        }


def preview(
    source: Source,
    objective: Any,  # an Objective, which data may not import
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    rows: int = 3,
    accepted: tuple[type, ...] = (),
    template_kwargs: Mapping[str, object] | None = None,
    special_tokens: turn_tokens.Policy | None = None,
) -> Preview:
    """Return the first ``rows`` usable rows of a source as examples, and the unusable rows before them.

    ``accepted``: row types to accept instead of the objective's. Rows of a type that the objective does not
    accept are shown without rendering. Raises DataError when the file cannot be read or a row cannot be
    rendered.
    """
    own_types = tuple(objective.traits.rows)
    opened = open_source(source, accepted or own_types)
    template_name = "none: the rows are plain text"
    if template is not None or template_kwargs or opened.uses_template(tokenizer):
        tokenizer, template_name = apply_template(tokenizer, template, template_kwargs)
    turn_tokens.set_policy(tokenizer, special_tokens or turn_tokens.policy_of(tokenizer))
    renderer = Renderer(tokenizer) if tokenizer.chat_template else None
    shown: list[PreviewRow] = []
    problems: list[RowProblem] = []
    usable = 0
    for item in opened.rows():
        if isinstance(item, RowProblem):
            problems.append(item)
            continue
        record, row = item
        where = f"{record.path}:{record.row}"
        if isinstance(row, Answered):
            shown.append(_answered_row(where, row, tokenizer))
        elif isinstance(row, Prompt):
            shown.append(_prompt_row(where, row, tokenizer))
        elif isinstance(row, TASK_ROWS) or not isinstance(row, own_types):
            shown.append(_task_row(where, row, tokenizer))
        else:
            for example in objective.encode([row], tokenizer)[0]:
                pieces = tuple(split_by_supervision(example, tokenizer))
                shown.append(PreviewRow(where, pieces, len(example["input_ids"]), targets(example)))
        notes = tuple(what if n == 1 else f"{what} ({n} times)" for what, n in find(row, renderer).items())
        shown = [replace(one, notes=notes) if one.where == where else one for one in shown]
        usable += 1
        if usable == rows:
            break
    return Preview(source.label, opened.description, template_name, tuple(shown), tuple(problems))


def _gold(row: Row) -> tuple[str, list[tuple[int, int]], str]:
    """Return a row's text, its coloured characters (tagged words, first answer), and its gold in words."""
    if isinstance(row, Labelled):
        text = row.text if row.text_pair is None else f"{row.text}\n{row.text_pair}"
        if row.labels is not None:
            return text, [], f"labels {', '.join(row.labels) or 'none'}"
        return text, [], UNKNOWN if row.label is None else f"label {row.label}"
    if isinstance(row, Tagged):
        tagged = [(word, tag) for word, tag in zip(row.words, row.tags or ()) if tag != "O"]
        known = ", ".join(f"{row.text[start:end]}/{tag}" for (start, end), tag in tagged)
        known = UNKNOWN if row.tags is None else known or "no word has a tag but O"
        return row.text, [word for word, _ in tagged], known
    if isinstance(row, Question):
        question, answers = f"{row.question}\n", row.answers or ()
        known = ", ".join(f"{answer!r} at {start}" for answer, start in answers) or "no answer"
        spans = [
            (len(question) + start, len(question) + start + len(answer)) for answer, start in answers[:1]
        ]
        return question + row.context, spans, UNKNOWN if row.answers is None else known
    return "", [], UNKNOWN


def _task_row(where: str, row: Row, tokenizer: PreTrainedTokenizerBase) -> PreviewRow:
    """Show a row with its gold."""
    text, coloured, known = _gold(row)
    pieces: list[Piece] = []
    end = 0
    for start, next_end in coloured:
        pieces += [(text[end:start], False), (text[start:next_end], True)]
        end = next_end
    pieces.append((text[end:], False))
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return PreviewRow(where, tuple(piece for piece in pieces if piece[0]), tokens, 0, known)


def _answered_row(where: str, row: Answered, tokenizer: PreTrainedTokenizerBase) -> PreviewRow:
    """Show the prompt once, then each answer; those of a ranking under their rank."""
    ranking = row.ranking() if isinstance(row, Judged) else row
    ((example,),) = encode([ranking], tokenizer, max_length=None, overlong="error")
    ids, supervised = example["input_ids"], example["supervised"]
    if isinstance(row, Judged):
        pieces = split_by_supervision({"input_ids": ids, "supervised": supervised}, tokenizer)
        known = {True: "desirable", False: "undesirable", None: "not labelled"}[row.desirable]
    else:
        pieces, known = [], _order(row)
        ends = [0, *np.cumsum(example["answers"]).tolist()]
        for number, (start, end) in enumerate(itertools.pairwise(ends)):
            if number:
                score = "" if row.scores is None else f", score {row.scores[number - 1]:g}"
                pieces.append((f"\n--- answer {number}: rank {row.ranks[number - 1] + 1}{score}\n", False))
            part = {"input_ids": ids[start:end], "supervised": supervised[start:end]}
            pieces += split_by_supervision(part, tokenizer)
    count = int(supervised.sum())
    known = f"{known}; {count} of {len(ids)} tokens supervised"
    return PreviewRow(where, tuple(pieces), len(ids), count, known)


def _prompt_row(where: str, row: Prompt, tokenizer: PreTrainedTokenizerBase) -> PreviewRow:
    """Show the prompt as the policy reads it, and the columns that rewards may read."""
    ((example,),) = prompt_examples.encode([row], tokenizer)
    ids = example["input_ids"]
    pieces = split_by_supervision({"input_ids": ids, "supervised": np.zeros(len(ids), np.bool_)}, tokenizer)
    columns = "".join(f"; {name}: {shorten(value)}" for name, value in row.columns.items())
    return PreviewRow(where, tuple(pieces), len(ids), 0, f"a prompt of {len(ids)} tokens{columns}")


def _order(row: Ranking) -> str:
    """Return the answers from best to worst, such as ``answer 2 > 1 = 3``."""
    order = sorted(range(len(row.ranks)), key=lambda answer: row.ranks[answer])
    signs = ("=" if row.ranks[a] == row.ranks[b] else ">" for a, b in itertools.pairwise(order))
    rest = "".join(f" {sign} {answer + 1}" for sign, answer in zip(signs, order[1:]))
    return f"answer {order[0] + 1}{rest}"


def split_by_supervision(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Decode an example's tokens and split the text where supervision begins and ends."""
    ids, supervised = example["input_ids"], example["supervised"]
    edges = [0, *(np.flatnonzero(np.diff(supervised.astype(np.int8))) + 1).tolist(), len(ids)]
    keep = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [
        (tokenizer.decode(ids[start:end].tolist(), **keep), bool(supervised[start]))
        for start, end in itertools.pairwise(edges)
        if end > start
    ]
