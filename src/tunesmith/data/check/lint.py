"""Every bad row of some files, and every duplicate: what `tunesmith data lint` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.check.lint_judgements import Judgements, warnings
from tunesmith.data.check.lint_pairs import Pairs
from tunesmith.data.data_config import Source
from tunesmith.data.encode.conversations import TrainOn, find_omitted_text, render
from tunesmith.data.encode.spans import SpanError
from tunesmith.data.encode.templates import RENDER_ERRORS
from tunesmith.data.read.source import open_source
from tunesmith.data.row_problems import Record, RowProblem
from tunesmith.data.rows import ROW_TYPES, Answered, Chat, Judged, Ranking, Row, digest
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Duplicate:
    """A row that says exactly what an earlier one says, in the same file or between training and evaluation."""

    where: str
    same_as: str


@dataclass(frozen=True)
class FileReport:
    """``rows`` = ``kept`` + ``rejected``."""

    path: str
    role: str
    format: str
    rows: int
    kept: int
    rejected: int


@dataclass(frozen=True)
class LintReport:
    """``problems`` are rows that cannot be used; ``duplicates``, ``left_out`` (words the template drops), ``pairs`` (of files
    with preferences or rankings) and ``judged`` (of files with a label for each response) are remarks."""

    files: tuple[FileReport, ...]
    problems: tuple[RowProblem, ...]
    duplicates: tuple[Duplicate, ...]
    leaked: tuple[Duplicate, ...]
    left_out: tuple[str, ...]
    pairs: tuple[Pairs, ...] = ()
    judged: tuple[Judgements, ...] = ()

    @property
    def ok(self) -> bool:
        """No row is bad and no evaluation row is trained on."""
        return not self.problems and not self.leaked

    @property
    def warnings(self) -> list[str]:
        """What would go wrong in training on all training files together."""
        return warnings(self.judged)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "ok": self.ok,
            "files": [asdict(file) for file in self.files],
            "problems": [problem.as_dict() for problem in self.problems],
            "duplicates": [asdict(item) for item in self.duplicates],
            "leaked": [asdict(item) for item in self.leaked],
            "left_out": list(self.left_out),
            "pairs": [item.as_dict() for item in self.pairs],
            "judged": [item.as_dict() for item in self.judged],
            "warnings": self.warnings,
        }


def lint(
    train: Sequence[Source],
    evaluation: Sequence[Source] = (),
    accepted: tuple[type, ...] = ROW_TYPES,
    tokenizer: PreTrainedTokenizerBase = None,
) -> LintReport:
    """Read every row of every file and list all that is wrong.

    With a ``tokenizer`` each row is also rendered: what its chat template refuses is a problem, what it drops a remark. A
    file that cannot be opened, or whose columns fit no format, is a problem of that file; nothing raises.
    """
    renderer = Renderer(tokenizer) if tokenizer is not None and tokenizer.chat_template else None
    files: list[FileReport] = []
    problems: list[RowProblem] = []
    duplicates: list[Duplicate] = []
    leaked: list[Duplicate] = []
    dropped: list[str] = []
    pairs: list[Pairs] = []
    judged: list[Judgements] = []
    preferred: dict[bytes, str] = {}  # prompt, better and worse answer -> where they first stand
    labelled: dict[bytes, str] = {}  # prompt, response and label -> the same
    seen: dict[int, str] = {}  # digest -> where a training row first said it
    for role, source in [*(("train", item) for item in train), *(("eval", item) for item in evaluation)]:
        inside: dict[int, str] = {}
        kept = rejected = 0
        description = "unknown"
        compared, labels = Pairs(source.label, role), Judgements(source.label, role)
        try:
            opened = open_source(source, accepted)
            description = opened.description
            tally = labels if opened.convert is not None and opened.convert.form.row is Judged else compared
            for item in opened.rows():
                bad = item if isinstance(item, RowProblem) else _rendered(*item, renderer, dropped)
                if bad is not None:
                    problems.append(bad)
                    rejected += 1
                    tally.refused(bad)
                elif not isinstance(item, RowProblem):
                    kept += 1
                    if isinstance(item[1], Ranking):
                        compared.add(item[1], item[0].row, preferred)
                    elif isinstance(item[1], Judged):
                        labels.add(item[1], item[0].row, labelled)
                    mark, where = digest(item[1]), f"{source.label}:{item[0].row}"
                    if role == "eval" and mark in seen:
                        leaked.append(Duplicate(where, seen[mark]))
                    if mark in inside:
                        duplicates.append(Duplicate(where, inside[mark]))
                    inside.setdefault(mark, where)
        except DataError as error:
            problems.append(RowProblem(source.label, 0, "file", "a file of rows", str(error), "", fatal=True))
        if compared.rows or any(compared.counts.values()):
            pairs.append(compared)
        if labels.rows or any(labels.counts.values()):
            judged.append(labels)
        if role == "train":
            seen = {**inside, **seen}
        files.append(FileReport(source.label, role, description, kept + rejected, kept, rejected))
    return LintReport(
        tuple(files),
        tuple(problems),
        tuple(duplicates),
        tuple(leaked),
        tuple(dropped),
        tuple(pairs),
        tuple(judged),
    )


def _rendered(
    record: Record,
    row: Row,
    renderer: Renderer | None,
    dropped: list[str],
    train_on: TrainOn | int = "assistant",
) -> RowProblem | None:
    """What the chat template has against a row. Words that it leaves out are added to ``dropped``."""
    if isinstance(row, Answered):
        lost: list[str] = []
        found = [_rendered(record, whole, renderer, lost, len(row.prompt)) for whole in row.written()]
        dropped += dict.fromkeys(lost)  # answers have their prompt in common
        return next((problem for problem in found if problem is not None), None)
    if renderer is None or not isinstance(row, Chat):
        return None
    try:
        render(row, renderer, train_on)
    except SpanError as error:
        return RowProblem(record.path, record.row, "row", error.expected, error.got, error.fix, record.line)
    except RENDER_ERRORS as error:
        fix = "Change the row or the template."
        return RowProblem(
            record.path,
            record.row,
            "row",
            "a conversation the chat template takes",
            str(error),
            fix,
            record.line,
        )
    dropped += [f"{record.path}:{record.row}:{place}" for place in find_omitted_text(row, renderer)]
    return None
