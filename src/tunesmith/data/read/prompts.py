"""Read the prompts of a data file as training reads its rows, each with the answer in the file."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.data.data_config import Source
from tunesmith.data.read.source import OpenedSource, open_source
from tunesmith.data.row_problems import Record, RowProblem, bad_rows_error, shorten
from tunesmith.data.rows import (
    Chat,
    Judged,
    Message,
    Prompt,
    PromptCompletion,
    Ranking,
    Row,
    Text,
    TextOrTurns,
)
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject

ROWS = (Chat, PromptCompletion, Text, Ranking, Judged, Prompt)
"""Row types that have a prompt to answer."""


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """The prompt of a row. ``reference``: the answer in the data, the best of several; None = unknown.

    ``prompt``: a Chat is rendered with the chat template. A Text is continued without it, as in training. A
    string comes from a file that does not show which of the two it is. ``adapter``: the name of the adapter that
    answers; None = the model as it is."""

    row: int
    prompt: str | Chat | Text
    reference: TextOrTurns | None
    adapter: str | None = None

    def as_dict(self) -> JsonObject:
        """``row``, ``prompt`` (a text, or turns), ``adapter``, ``tools`` and ``reference`` where there are any."""
        shown: JsonObject = {"row": self.row, "prompt": self.shown()}
        if self.adapter is not None:
            shown["adapter"] = self.adapter
        if isinstance(self.prompt, Chat) and self.prompt.tools:
            shown["tools"] = list(self.prompt.tools)
        return shown if self.reference is None else {**shown, "reference": _shown(self.reference)}

    def reference_text(self) -> str | None:
        """Return the answer in the data as one text; None if there is none, or it is empty."""
        if self.reference is None:
            return None
        shown = _shown(self.reference)
        text = shown if isinstance(shown, str) else joined_turns(shown)
        return text if text.strip() else None

    def text(self) -> str:
        """Return the prompt as one text."""
        shown = self.shown()
        return shown if isinstance(shown, str) else joined_turns(shown)

    def shown(self) -> str | list[Message]:
        """Return the text of a prompt; its turns if there are several or there are tools."""
        if isinstance(self.prompt, str):
            return self.prompt
        if isinstance(self.prompt, Text):
            return self.prompt.text
        alone = len(self.prompt.messages) == 1 and not self.prompt.tools
        return str(self.prompt.messages[0]["content"]) if alone else list(self.prompt.messages)


def joined_turns(turns: Sequence[Mapping[str, object]]) -> str:
    """Return the texts of turns, with an empty line between them."""
    return "\n\n".join(str(turn.get("content") or "") for turn in turns)


def _shown(reference: TextOrTurns) -> str | list[Message]:
    """Return the text of an answer; its turns if they hold more than one text."""
    if isinstance(reference, str):
        return reference
    only_text = len(reference) == 1 and reference[0].keys() <= {"role", "content"}
    return str(reference[0]["content"]) if only_text else list(reference)


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a source. Each iteration reads the file again, row by row.

    ``plain``: a prompt that is only text is continued without a chat template. ``adapter_column``: the column that
    names the adapter of each row, one of ``adapters``."""

    opened: OpenedSource
    plain: bool
    adapter_column: str | None = None
    adapters: Sequence[str] = ()

    @property
    def description(self) -> str:
        """The format and the columns."""
        return f"{self.opened.source.label}: {self.opened.description}"

    def check(self) -> tuple[int, int]:
        """Read all rows; return the number of prompts and of those with an answer in the file.

        Raises DataError with every row that cannot be read, and for a file without prompts."""
        problems: list[RowProblem] = []
        prompts = references = 0
        for item in self._items():
            if isinstance(item, RowProblem):
                problems.append(item)
            else:
                prompts, references = prompts + 1, references + (item.reference is not None)
        if problems:
            raise bad_rows_error(problems, len(problems), "Nothing was generated.")
        if not prompts:
            raise DataError(f"{self.opened.source.label} has no prompts. Add rows, or name another file.")
        return prompts, references

    def __iter__(self) -> Iterator[AskedPrompt]:
        """Yield the prompts. Raises DataError for a row that cannot be read, which ``check`` reports first."""
        for item in self._items():
            if isinstance(item, RowProblem):
                raise bad_rows_error([item], 1, "The file changed while it was read.")
            yield item

    def _items(self) -> Iterator[AskedPrompt | RowProblem]:
        seen: Record | None = None
        for item in self.opened.rows():
            if isinstance(item, RowProblem):
                yield item
            elif item[0] is not seen:  # a pair that became two rows has one prompt
                seen, row = item
                found = _split(row, self.plain)
                if found is None:
                    fix = "Add the question, or delete the row."
                    yield seen.problem("row", "a turn to answer", "only answers", fix)
                    continue
                adapter = None if self.adapter_column is None else seen.value.get(self.adapter_column)
                if adapter is not None and adapter in self.adapters:
                    yield AskedPrompt(seen.row, *found, str(adapter))
                elif self.adapter_column is None:
                    yield AskedPrompt(seen.row, *found)
                else:
                    expected = f"the name of an adapter ({', '.join(self.adapters)})"
                    fix = "Correct the name, or add --adapter NAME=FOLDER."
                    yield seen.problem(self.adapter_column, expected, shorten(adapter), fix)


@dataclass(frozen=True)
class ChosenPrompts:
    """Some prompts of a file, in its order. Each iteration reads the file again, so no text is kept."""

    file: PromptFile
    rows: frozenset[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, asked: object) -> bool:
        return isinstance(asked, AskedPrompt) and asked.row in self.rows

    def __iter__(self) -> Iterator[AskedPrompt]:
        return (one for one in self.file if one.row in self.rows)


def choose(file: PromptFile, count: int, among: Container[int] | None = None) -> ChosenPrompts:
    """Choose ``count`` prompts of a file by a hash of their rows, so that every model answers the same.

    ``among``: rows to choose from; None = all. Raises DataError for a file with a row that cannot be read."""
    rows = (one.row for one in file if among is None or one.row in among)
    return ChosenPrompts(file, frozenset(heapq.nsmallest(count, rows, key=order_of)))


def order_of(row: int) -> bytes:
    """Return the place of a row in the order in which rows are chosen."""
    return hashlib.sha256(str(row).encode()).digest()


def open_prompts(source: Source, trained_on: Sequence[str] = ()) -> PromptFile:
    """Open the prompts of a source.

    ``trained_on``: names of the row types that the model was trained on, if known. The file is read as rows
    of these types if possible. If neither Chat nor Prompt is among them, a prompt is text without a chat
    template. Raises DataError for a file that cannot be read as prompts."""
    sampled = Prompt.__name__ in trained_on
    preferred = (Prompt,) if sampled else tuple(kind for kind in ROWS if kind.__name__ in trained_on)
    plain = bool(trained_on) and not sampled and Chat.__name__ not in trained_on
    return PromptFile(_open(source, preferred), plain)


def read_prompts(source: Source, trained_on: Sequence[str] = ()) -> tuple[list[AskedPrompt], str]:
    """Return all prompts of a source as a list, and a description of its format and columns.

    ``trained_on`` as in ``open_prompts``. Raises DataError for a file without prompts and for rows that cannot
    be read."""
    file = open_prompts(source, trained_on)
    file.check()
    return list(file), file.opened.description


def _open(source: Source, preferred: tuple[type, ...]) -> OpenedSource:
    if preferred:
        try:
            opened = open_source(source, preferred, prompts=True)
            if opened.kinds <= {*preferred}:
                return opened
        except DataError:  # rows of another type, such as a plain list of prompts
            pass
    return open_source(source, ROWS, prompts=True)


def _split(row: Row, plain: bool) -> tuple[str | Chat | Text, TextOrTurns | None] | None:
    """Return (prompt, reference) of a row; None if it has no prompt."""
    if isinstance(row, Text):
        return (row if plain else row.text), None
    if isinstance(row, PromptCompletion):
        if row.completion:
            return Text(row.prompt), row.completion
        return (Text(row.prompt) if plain else row.prompt), None
    if isinstance(row, Chat):
        answered = row.messages[-1]["role"] == "assistant"
        asked = row.messages[:-1] if answered else row.messages
        return (Chat(asked, row.tools), row.messages[-1:] if answered else None) if asked else None
    if isinstance(row, Prompt):
        return (
            row.prompt if isinstance(row.prompt, str) and not plain else row.asked(has_template=False)
        ), None
    assert isinstance(row, Ranking | Judged)
    prompt = Text(row.prompt) if isinstance(row.prompt, str) else Chat(row.prompt, row.tools)
    if isinstance(row, Judged):
        return prompt, row.response if row.desirable else None
    known = len(set(row.ranks)) > 1
    return prompt, row.answers[row.ranks.index(min(row.ranks))] if known else None
