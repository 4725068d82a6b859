"""One source, encoded into the cache or found there."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith import files
from tunesmith.data import rows
from tunesmith.data.batch.pack import Example
from tunesmith.data.data_config import Source
from tunesmith.data.encode import turn_tokens
from tunesmith.data.encode.conversations import find_omitted_text
from tunesmith.data.encode.templates import Renderer
from tunesmith.data.encode.turn_findings import TurnFindings
from tunesmith.data.formats.record_values import has_carriage_returns
from tunesmith.data.read import builtin, class_folder, hub_set
from tunesmith.data.read.row_files import existing
from tunesmith.data.read.source import OpenedSource
from tunesmith.data.row_problems import Record, RowFault, RowProblem
from tunesmith.data.store import cache
from tunesmith.data.store.cache import Entry, Writer
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA = Path(__file__).parent.parent
ENCODING_FOLDERS = ("read", "formats", "encode")
ENCODING_FILES = ("rows.py", "row_problems.py", "text_windows.py", "store/encode_source.py", "store/cache.py")
"""Code in ``tunesmith.data`` that a stored example depends on: an edit of it makes every cache entry anew."""

BATCH_ROWS = 128  # rows tokenised in one call
BATCH_CHARACTERS = 1 << 18
"""Characters tokenised in one call: each token has its offsets, so long documents would take much memory."""

COMPARED_ROWS = 200  # conversations compared with their rendering, to report what a template omits
THREADS = 2

Located = tuple[Record, rows.Row]
Encodings = tuple[list[tuple[Located, list[Example]]], list[RowProblem]]

Progress = Callable[[str, int], None]  # called with a source's path and the rows read of it so far


class Objective(Protocol):
    """The part that preparation uses of an ``objectives.Objective``, which data must not import."""

    traits: Any  # objectives.Traits
    config: Any  # the Config of its file, a pydantic model
    facts: JsonObject
    max_length: int | None

    def scan(self, rows: Iterable[rows.Row]) -> None: ...
    def encode(self, rows: Sequence[rows.Row], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]: ...
    def encode_held_out(
        self, rows: Sequence[rows.Row], tokenizer: PreTrainedTokenizerBase
    ) -> list[list[Example]]: ...
    def extend(self, data: Encoded) -> Encoded: ...


@dataclass(frozen=True)
class Built:
    """A source in the cache. ``scratch`` keeps its temporary folder alive when there is no cache."""

    entry: Entry
    sha256: str
    cached: bool
    seconds: float
    scratch: object = None


def build(
    opened: OpenedSource,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    keep: bool,
    shared_key: str,
    on_progress: Progress | None,
) -> Built:
    """The processed rows of a source: from the cache if nothing changed, else encoded now.

    Raises DataError when a file is unreadable, DiskFullError when there is no room.
    """
    began = time.perf_counter()
    sha256 = content_hash(opened.source)
    options = opened.source.model_dump(mode="json", exclude={"path", "weight"})
    kinds = [kind.__name__ for kind in opened.accepted]
    facts = [
        sha256,
        Path(opened.source.path).suffix,
        options,
        kinds,
        opened.gold,
        opened.held_out,
        shared_key,
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    scratch = None if keep else cache.Scratch("tunesmith-data-")
    folder = (cache.store() if scratch is None else Path(scratch.name)) / key[:32]
    entry = cache.load(folder)
    if entry is not None:
        return Built(entry, sha256, True, time.perf_counter() - began, scratch)
    if folder.exists():
        files.remove_folder(folder)  # it is damaged
    writer = cache.begin(folder)
    try:
        info = _SourceEncoder(opened, objective, tokenizer).write(writer, on_progress)
        cache.finish(writer, folder, info)
    except OSError as error:
        raise cache.disk_error(error, folder.parent) from None
    finally:
        writer.abandon()
    entry = cache.load(folder)
    if entry is None:
        raise DataError(
            f"processed data in {folder} cannot be read back. Check the disk, or set data.cache=false."
        )
    return Built(entry, sha256, False, time.perf_counter() - began, scratch)


@dataclass(frozen=True)
class _SourceEncoder:
    opened: OpenedSource
    objective: Objective
    tokenizer: PreTrainedTokenizerBase

    def write(self, writer: Writer, on_progress: Progress | None) -> JsonObject:
        """Encode all rows into ``writer`` and return their counts."""
        read = kept = last = 0
        first: list[RowProblem] = []
        fatal = False
        carriage_returns = 0
        omitted: JsonObject = {"looked_at": 0, "rows": 0, "first": []}
        renderer = Renderer(self.tokenizer) if self.tokenizer.chat_template else None
        found = TurnFindings(self.opened.source.label)
        for encoded, problems in self._encode_ahead():
            read += len(problems)
            for (record, row), examples in encoded:
                group = rows.group_key(row) if record.group is None else record.group
                writer.add(examples, record.row, rows.digest(row), group)
                if record.row != last:  # a pair that becomes two rows is one row of the file
                    read, kept, last = read + 1, kept + 1, record.row
                    carriage_returns += has_carriage_returns(record.value)
                    found.add(row, record.row, renderer)
                if renderer and len(examples) == 1 and omitted["looked_at"] < COMPARED_ROWS:
                    _count_omitted(row, record, renderer, omitted)
            fatal = fatal or any(problem.fatal for problem in problems)
            first = sorted([*first, *problems], key=lambda problem: problem.row)[:10]
            if on_progress:
                on_progress(self.opened.source.label, read)
        listed = [asdict(problem) for problem in first]
        return {
            "read": read, "kept": kept, "problems": listed, "fatal": fatal, "left_out": omitted,
            "carriage_returns": carriage_returns, "in_turns": found.as_list(),
        }  # fmt: skip

    def _encode_ahead(self) -> Iterator[Encodings]:
        """Encode two batches at a time, in order: one is rendered, the other tokenised without the GIL."""
        with ThreadPoolExecutor(THREADS) as pool:
            running: deque[Future[Encodings]] = deque()
            for batch, problems in self._batches():
                running.append(pool.submit(self._encode, batch, problems))
                if len(running) > THREADS:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def _batches(self) -> Iterator[tuple[list[Located], list[RowProblem]]]:
        batch: list[Located] = []
        problems: list[RowProblem] = []
        size = 0
        for item in self.opened.rows():
            if isinstance(item, RowProblem):
                problems.append(item)
            else:
                batch.append(item)
                size += _characters(item[1])
            if len(batch) + len(problems) >= BATCH_ROWS or size >= BATCH_CHARACTERS:
                yield batch, problems
                batch, problems, size = [], [], 0
        if batch or problems:
            yield batch, problems

    def _encode(self, batch: Sequence[Located], problems: list[RowProblem]) -> Encodings:
        """Encode a batch in one call; if a row is at fault, each row alone, to find every fault."""
        if not batch:
            return [], problems
        encode = self.objective.encode_held_out if self.opened.held_out else self.objective.encode
        try:
            encoded = encode([row for _, row in batch], self.tokenizer)
            return list(zip(batch, encoded, strict=True)), problems
        except RowFault as fault:
            if len(batch) == 1:
                return [], [*problems, self.opened.problem(batch[0][0], fault)]
        parts = [self._encode([item], []) for item in batch]
        refused = [problem for _, faults in parts for problem in faults]
        return [one for done, _ in parts for one in done], problems + refused


def _characters(row: rows.Row) -> int:
    """Characters of a row that are tokenised."""
    match row:
        case rows.Text(text) | rows.Tagged(text):
            return len(text)
        case rows.PromptCompletion(first, second) | rows.Question(first, second):
            return len(first) + len(second)
        case rows.Labelled(text, pair):
            return len(text) + len(pair or "")
        case rows.Chat(messages):
            return sum(len(message["content"]) for message in messages)
    return (
        _characters(row.asked(has_template=False))
        if isinstance(row, rows.Prompt)
        else sum(map(_characters, row.written()))
    )


def _count_omitted(row: rows.Row, record: Record, renderer: Renderer, omitted: JsonObject) -> None:
    if isinstance(row, rows.Prompt):
        row = row.asked(has_template=True)
    written = row.written() if isinstance(row, rows.Answered) else [row]
    chats = [one for one in written if isinstance(one, rows.Chat)]
    if not chats:
        return
    omitted["looked_at"] += 1
    # a dict, because responses share their prompt
    missing = dict.fromkeys(text for chat in chats for text in find_omitted_text(chat, renderer))
    if missing:
        omitted["rows"] += 1
        listed = [f"{record.path}:{record.row}:{text}" for text in missing]
        omitted["first"] += listed[: 10 - len(omitted["first"])]


def content_hash(source: Source) -> str:
    """sha256 of a source's content; for a data set of the Hub also of its commit."""
    path = source.path
    if source.hub:
        return hub_set.content_hash(source)
    if path.startswith(builtin.PREFIX):
        return builtin.content_hash(path)
    if class_folder.is_class_folder(path):
        return class_folder.content_hash(path)
    return files.sha256(existing(path))


def shared_key(objective: Objective, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that examples depend on except the file: tokenizer, template, options, and code.

    The length policy is not in it: it is applied to a view of what is stored.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    content = hashlib.sha256(backend.to_str().encode())
    kind = type(objective)
    settings = objective.config.model_dump(mode="json", exclude={"overlong"})
    facts = [
        tokenizer.chat_template, {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        turn_tokens.policy_of(tokenizer), [kind.__module__, kind.__qualname__, settings, objective.facts],
        version("tokenizers"), version("transformers"), version("jinja2"), platform.python_version(),
    ]  # fmt: skip
    content.update(json.dumps(facts, sort_keys=True).encode())
    for path in code_files(objective):
        content.update(path.read_bytes())
    return content.hexdigest()


def code_files(objective: Objective) -> list[Path]:
    """Source files that an example depends on: those of ``tunesmith.data`` and the objective's own."""
    folders = [path for folder in ENCODING_FOLDERS for path in sorted((DATA / folder).glob("[!_]*.py"))]
    return [*(DATA / name for name in ENCODING_FILES), *folders, Path(inspect.getfile(type(objective)))]
