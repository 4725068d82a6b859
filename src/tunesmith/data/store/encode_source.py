"""One source, encoded into the cache or found there."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import platform
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from tunesmith import files
from tunesmith.data.data_config import Source
from tunesmith.data.encode.conversations import Renderer, left_out
from tunesmith.data.encode.templates import template_text
from tunesmith.data.read import builtin, class_folder, hub_set
from tunesmith.data.read.row_files import existing
from tunesmith.data.read.source import OpenedSource
from tunesmith.data.row_problems import Record, RowFault, RowProblem
from tunesmith.data.rows import Answered, Chat, PromptCompletion, Row, Text, digest
from tunesmith.data.store import cache
from tunesmith.data.store.cache import Entry, Example, Writer
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODING = (
    "rows", "row_problems",
    "read.row_files", "read.json_rows", "read.source", "read.class_folder", "read.conll", "read.hub_set",
    "formats.columns", "formats.fields", "formats.turns", "formats.ratings", "formats.preference_fields",
    "formats.judgement_fields", "formats.label_fields", "formats.word_fields", "formats.squad_file",
    "encode.conversations", "encode.spans", "encode.templates", "encode.texts", "encode.tagging", "encode.questions",
    "encode.rankings", "encode.judgements", "encode.labels",
    "store.encode_source", "store.cache",
)  # fmt: skip
"""Modules of tunesmith.data that a stored example depends on: an edit of one of them makes every cache entry anew."""

BATCH = 128
"""Rows tokenised in one call."""

CHARACTERS = 1 << 18
"""And characters: a batch of long documents would take much memory (each token has its offsets)."""

LOOKED_AT = 200
"""Conversations compared with their rendering, to notice what a template leaves out."""

THREADS = 2

TEXTS = ("text", "text_pair", "question", "context")
"""Fields of the rows of a head that are tokenised."""

Located = tuple[Record, Row]
Encodings = tuple[list[tuple[Located, list[Example]]], list[RowProblem]]

Progress = Callable[[str, int], None]
"""Called with a source's path and the rows read of it so far."""


@dataclass(frozen=True)
class Built:
    """A source in the cache. ``scratch`` keeps a temporary folder alive when nothing is to be kept."""

    entry: Entry
    sha256: str
    cached: bool
    scratch: object = None


def build(
    opened: OpenedSource,
    objective: Any,
    tokenizer: PreTrainedTokenizerBase,
    keep: bool,
    shared_key: str,
    on_progress: Progress | None,
) -> Built:
    """The processed rows of a source: from the cache when nothing changed, else made now.

    Raises DataError when a file is unreadable, DiskFullError when there is no room.
    """
    sha256 = content_hash(opened.source)
    options = opened.source.model_dump(mode="json", exclude={"path", "weight"})
    kinds = [kind.__name__ for kind in opened.accepted]
    key = hashlib.sha256(
        json.dumps(
            [sha256, Path(opened.source.path).suffix, options, kinds, opened.gold, shared_key]
        ).encode()
    ).hexdigest()
    scratch = None if keep else cache.Scratch("tunesmith-data-")
    folder = (cache.store() if scratch is None else Path(scratch.name)) / key[:32]
    entry = cache.load(folder)
    if entry is not None:
        return Built(entry, sha256, True, scratch)
    if folder.exists():
        files.remove_folder(folder)  # what is there is not what was written
    writer = cache.begin(folder)
    try:
        info = _write(writer, opened, objective, tokenizer, on_progress)
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
    return Built(entry, sha256, False, scratch)


def _write(
    writer: Writer,
    opened: OpenedSource,
    objective: Any,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Progress | None,
) -> dict[str, Any]:
    """Encode all rows; what was counted on the way."""
    read = kept = last = 0
    first: list[RowProblem] = []
    fatal = False
    unseen: dict[str, Any] = {"looked_at": 0, "rows": 0, "first": []}
    renderer = Renderer(tokenizer) if tokenizer.chat_template else None
    for encoded, problems in _ahead(_batches(opened.rows()), opened, objective, tokenizer):
        read += len(problems)
        for (record, row), examples in encoded:
            writer.add(examples, record.row, digest(row))
            if record.row != last:  # a pair that becomes two rows is one row of the file
                read, kept, last = read + 1, kept + 1, record.row
            if renderer and len(examples) == 1 and unseen["looked_at"] < LOOKED_AT:
                _compare(row, record, renderer, unseen)
        fatal = fatal or any(problem.fatal for problem in problems)
        first = sorted([*first, *problems], key=lambda problem: problem.row)[:10]
        if on_progress:
            on_progress(opened.source.label, read)
    return {
        "read": read, "kept": kept, "problems": [asdict(problem) for problem in first], "fatal": fatal, "left_out": unseen,
    }  # fmt: skip


def _ahead(
    batches: Iterator[tuple[list[Located], list[RowProblem]]],
    opened: OpenedSource,
    objective: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Encodings]:
    """Encode two batches at a time, in order: one is rendered (Python) while the other is tokenised (outside the GIL)."""
    with ThreadPoolExecutor(THREADS) as pool:
        running: deque[tuple[Future[Encodings], list[RowProblem]]] = deque()
        for batch, problems in batches:
            running.append((pool.submit(_encode, batch, opened, objective, tokenizer), problems))
            if len(running) > THREADS:
                yield _joined(*running.popleft())
        while running:
            yield _joined(*running.popleft())


def _joined(future: Future[Encodings], problems: list[RowProblem]) -> Encodings:
    encoded, refused = future.result()
    return encoded, problems + refused


def _batches(
    rows: Iterator[Located | RowProblem],
) -> Iterator[tuple[list[Located], list[RowProblem]]]:
    batch: list[Located] = []
    problems: list[RowProblem] = []
    size = 0
    for item in rows:
        if isinstance(item, RowProblem):
            problems.append(item)
        else:
            batch.append(item)
            size += _characters(item[1])
        if len(batch) + len(problems) >= BATCH or size >= CHARACTERS:
            yield batch, problems
            batch, problems, size = [], [], 0
    if batch or problems:
        yield batch, problems


def _characters(row: Row) -> int:
    if isinstance(row, Text):
        return len(row.text)
    if isinstance(row, PromptCompletion):
        return len(row.prompt) + len(row.completion)
    if isinstance(row, Chat):
        return sum(len(message["content"]) for message in row.messages)
    if isinstance(row, Answered):
        return sum(map(_characters, row.written()))
    return sum(len(part) for name in TEXTS if isinstance(part := getattr(row, name, None), str))


def _encode(
    batch: Sequence[Located], opened: OpenedSource, objective: Any, tokenizer: PreTrainedTokenizerBase
) -> Encodings:
    """Encode a batch in one call; when a row is at fault, each row on its own, so that every fault is found."""
    if not batch:
        return [], []
    try:
        return list(zip(batch, objective.encode([row for _, row in batch], tokenizer), strict=True)), []
    except RowFault as fault:
        if len(batch) == 1:
            return [], [opened.problem(batch[0][0], fault)]
    encoded, problems = [], []
    for item in batch:
        done, refused = _encode([item], opened, objective, tokenizer)
        encoded += done
        problems += refused
    return encoded, problems


def _compare(row: Row, record: Record, renderer: Renderer, unseen: dict[str, Any]) -> None:
    chats = [one for one in (row.written() if isinstance(row, Answered) else [row]) if isinstance(one, Chat)]
    if not chats:
        return
    unseen["looked_at"] += 1
    missing = dict.fromkeys(
        place for chat in chats for place in left_out(chat, renderer)
    )  # answers share their prompt
    if missing:
        unseen["rows"] += 1
        unseen["first"] += [f"{record.path}:{record.row}:{place}" for place in missing][
            : 10 - len(unseen["first"])
        ]


def content_hash(source: Source) -> str:
    """sha256 of a source's content; of a data set of the Hub also of its commit."""
    path = source.path
    if source.hub:
        return hub_set.content_hash(source)
    if path.startswith(builtin.PREFIX):
        return builtin.content_hash(path)
    if class_folder.is_class_folder(path):
        return class_folder.content_hash(path)
    return files.sha256(existing(path))


def shared_key(objective: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that shapes examples besides the file: tokenizer, template, options, and the code involved."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    content = hashlib.sha256(backend.to_str().encode())
    facts = [
        template_text(tokenizer), {name: str(token) for name, token in tokenizer.special_tokens_map.items()}, _options(objective),
        version("tokenizers"), version("transformers"), version("jinja2"), platform.python_version(),
    ]  # fmt: skip
    content.update(json.dumps(facts, sort_keys=True).encode())
    for path in _code(objective):
        content.update(path.read_bytes())
    return content.hexdigest()


def _options(objective: Any) -> Any:
    """The objective's name and settings, as JSON. The length policy is no part of it: that is a view on what is stored."""
    config = getattr(objective, "config", None)
    settings = (
        config.model_dump(mode="json")
        if isinstance(config, BaseModel)
        else {k: repr(v) for k, v in vars(objective).items()}
    )
    settings.pop("overlong", None)
    return [
        type(objective).__module__,
        type(objective).__qualname__,
        settings,
        getattr(objective, "facts", {}),
    ]


def _code(objective: Any) -> list[Path]:
    """Source files that decide what an example is: the modules of ``ENCODING`` and the objective's own file."""
    named = [
        Path(str(spec.origin))
        for name in ENCODING
        if (spec := importlib.util.find_spec(f"tunesmith.data.{name}"))
    ]
    return [*named, Path(inspect.getfile(type(objective)))]
