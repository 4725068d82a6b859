"""Every unusable row and every duplicate of some files: the report of ``tunesmith data lint``."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tunesmith.data.check.lint_judgements import JudgementFindings, balance_warnings
from tunesmith.data.check.lint_pairs import PairFindings
from tunesmith.data.data_config import Source
from tunesmith.data.encode.conversations import TrainOn, find_omitted_text, render, render_prompt
from tunesmith.data.encode.spans import SpanError
from tunesmith.data.encode.templates import RENDER_ERRORS, Renderer
from tunesmith.data.encode.turn_findings import TurnFindings
from tunesmith.data.formats.record_values import has_carriage_returns
from tunesmith.data.read import hub_set
from tunesmith.data.read.source import OpenedSource, open_source
from tunesmith.data.row_problems import Record, RowFault, RowProblem
from tunesmith.data.rows import ROW_TYPES, Answered, Chat, Judged, Prompt, Ranking, Row, digest
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Findings = PairFindings | JudgementFindings


class Objective(Protocol):
    """The methods of an ``objectives.Objective`` that lint calls; data must not import objectives."""

    def scan(self, rows: Iterable[Row]) -> None: ...
    def check_labels(self, row: Row, held_out: bool) -> None: ...


@dataclass(frozen=True)
class Duplicate:
    """A row with exactly the content of an earlier one, in the same file or in training and evaluation."""

    where: str
    same_as: str


@dataclass
class FileReport:
    """``rows`` = ``kept`` + ``rejected``. ``carriage_returns``: rows with a line end that is read as ``\\n``."""

    path: str
    role: str
    format: str = "unknown"
    rows: int = 0
    kept: int = 0
    rejected: int = 0
    carriage_returns: int = 0


@dataclass
class LintReport:
    """``problems``: unusable rows. ``leaked``: evaluation rows also in training. The rest are remarks.

    ``left_out``: texts that the chat template drops. ``pairs``, ``judged``: findings of each file with
    preferences or rankings, and of each file with one label for each response.
    """

    files: list[FileReport] = field(default_factory=list)
    problems: list[RowProblem] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    leaked: list[Duplicate] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    in_turns: list[TurnFindings] = field(default_factory=list)
    """Findings in the turns of each file; remarks, not problems."""
    pairs: list[PairFindings] = field(default_factory=list)
    judged: list[JudgementFindings] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems and not self.leaked

    @property
    def warnings(self) -> list[str]:
        """Return the problems of training on all training files together."""
        return balance_warnings(self.judged)

    def as_dict(self) -> JsonObject:
        return {
            "ok": self.ok,
            "files": [asdict(file) for file in self.files],
            "problems": [problem.as_dict() for problem in self.problems],
            "duplicates": [asdict(item) for item in self.duplicates],
            "leaked": [asdict(item) for item in self.leaked],
            "left_out": self.left_out,
            "in_turns": {item.path: item.as_list() for item in self.in_turns},
            "pairs": [item.as_dict() for item in self.pairs],
            "judged": [item.as_dict() for item in self.judged],
            "warnings": self.warnings,
        }


def lint(
    train: Sequence[Source],
    evaluation: Sequence[Source] = (),
    accepted: tuple[type, ...] = ROW_TYPES,
    tokenizer: PreTrainedTokenizerBase | None = None,
    objective: Objective | None = None,
    train_on: TrainOn = "completion",
    expand_turns: bool = False,
) -> LintReport:
    """Read every row of every file and list all problems; nothing raises.

    With an ``objective``, labels and tags that it refuses are problems, too.

    With a ``tokenizer`` each row is also rendered: a row that its chat template refuses is a problem, a text
    that the template drops is a remark. A file that cannot be opened, or whose columns match no format, is
    one problem. ``train_on`` and ``expand_turns`` are those of the objective: they decide which turns are
    supervised, and a template may rewrite one of these.
    """
    renderer = Renderer(tokenizer) if tokenizer is not None and tokenizer.chat_template else None
    report = LintReport()
    refusal: DataError | None = None
    if objective is not None and train and not any(source.streaming for source in train):
        try:
            objective.scan(_scanned(train, accepted))
        except DataError as error:
            refusal, objective = error, None
    first_pairs: dict[bytes, str] = {}  # (prompt, better, worse) -> where it was read first
    first_labels: dict[bytes, str] = {}  # (prompt, response, label) -> the same
    first_trained: dict[int, str] = {}  # digest of a training row -> the same
    for role, source in [*(("train", item) for item in train), *(("eval", item) for item in evaluation)]:
        first_in_file: dict[int, str] = {}
        file = FileReport(source.label, role)
        in_turns = TurnFindings(source.label)
        pairs, judged = PairFindings(source.label, role), JudgementFindings(source.label, role)
        try:
            opened = replace(open_source(source, accepted), held_out=role == "eval")
            file.format = opened.description
            labelled = opened.convert is not None and opened.convert.form.row is Judged
            check = partial(
                _problem, renderer=renderer, dropped=report.left_out, train_on=train_on, expand_turns=expand_turns,
            )  # fmt: skip
            findings = judged if labelled else pairs
            for record, row in _usable_rows(opened, file, findings, report, check, objective):
                in_turns.add(row, record.row, renderer)
                if isinstance(row, Ranking):
                    pairs.add(row, record.row, first_pairs)
                elif isinstance(row, Judged):
                    judged.add(row, record.row, first_labels)
                key, where = digest(row), f"{source.label}:{record.row}"
                if role == "eval" and key in first_trained:
                    report.leaked.append(Duplicate(where, first_trained[key]))
                if key in first_in_file:
                    report.duplicates.append(Duplicate(where, first_in_file[key]))
                first_in_file.setdefault(key, where)
        except DataError as error:
            fatal = RowProblem(source.label, 0, "file", "a file of rows", str(error), "", fatal=True)
            report.problems.append(fatal)
        if in_turns.rows:
            report.in_turns.append(in_turns)
        if pairs.rows or any(pairs.kinds.counts.values()):
            report.pairs.append(pairs)
        if judged.rows or any(judged.kinds.counts.values()):
            report.judged.append(judged)
        if role == "train":
            first_trained = first_in_file | first_trained
        report.files.append(file)
    if refusal is not None and not any(problem.fatal for problem in report.problems):
        # last, as in training: it may be no more than what the bad rows above lead to
        text = f"Without these rows, {refusal}" if report.problems else str(refusal)
        report.problems.append(RowProblem(train[0].label, 0, "file", "", text, "", fatal=True))
    return report


def advice(sources: Sequence[Source]) -> str:
    """Return the commands that list all bad rows of these sources; "" if they would list none."""
    commands = dict.fromkeys(filter(None, map(_command, sources)))
    return (
        f"Type {' and '.join(f'`{command}`' for command in commands)} for all of them. " if commands else ""
    )


def _command(source: Source) -> str | None:
    """Return the command that lists the bad rows of a source; None if it would list none.

    The command knows no objective and no template, so it does not list rows that only these refuse."""
    typed = ["tunesmith", "data", "lint", source.path]
    typed += ["--format", source.format] if source.format else []
    for field_name, columns in (source.columns or {}).items():
        for column in [columns] if isinstance(columns, str) else columns:
            typed += ["--column", f"{field_name}={column}"]
    if not source.streaming:  # a stream is read once
        as_typed = source.model_copy(update={"separator": None, "prompt_template": None, "limit": None})
        try:
            if not any(isinstance(item, RowProblem) for item in open_source(as_typed).rows()):
                return None
        except DataError:  # lint lists an error of the whole file, too
            pass
    return " ".join([*map(shlex.quote, typed), *hub_set.split_flags(source)])


def _scanned(train: Sequence[Source], accepted: tuple[type, ...]) -> Iterator[Row]:
    """Yield the usable training rows.

    Skip a file that cannot be opened: it is reported when its rows are listed.
    """
    for source in train:
        with suppress(DataError):
            items = open_source(source, accepted).rows()
            yield from (item[1] for item in items if not isinstance(item, RowProblem))


def _usable_rows(
    opened: OpenedSource,
    file: FileReport,
    findings: Findings,
    report: LintReport,
    check: Callable[[Record, Row], RowProblem | None],
    objective: Objective | None,
) -> Iterator[tuple[Record, Row]]:
    """Yield the usable rows of a file, and count and report the others."""
    for item in opened.rows():
        problem = item if isinstance(item, RowProblem) else check(*item)
        if problem is None and objective is not None and not isinstance(item, RowProblem):
            try:
                objective.check_labels(item[1], opened.held_out)
            except RowFault as fault:
                problem = opened.problem(item[0], fault)
        file.rows += 1
        file.rejected += problem is not None
        file.kept += problem is None
        if problem is not None:
            report.problems.append(problem)
            findings.count_refused(problem)
        elif isinstance(item, tuple):
            file.carriage_returns += has_carriage_returns(item[0].value)
            yield item


def _problem(
    record: Record,
    row: Row,
    renderer: Renderer | None,
    dropped: list[str],
    train_on: TrainOn | int,
    expand_turns: bool = False,
) -> RowProblem | None:
    """Return why the chat template refuses a row, else None. Texts that it drops are added to ``dropped``."""
    if isinstance(row, Answered):
        lost: list[str] = []
        problems = [_problem(record, chat, renderer, lost, len(row.prompt)) for chat in row.written()]
        dropped += dict.fromkeys(lost)  # the answers share their prompt
        return next((problem for problem in problems if problem is not None), None)
    asked = row.asked(renderer is not None) if isinstance(row, Prompt) else None
    row = asked or row
    if renderer is None or not isinstance(row, Chat):
        return None
    try:
        if asked is not None:
            render_prompt(asked, renderer)
        else:
            render(row, renderer, train_on, expand_turns)
    except SpanError as error:
        expected, got, fix = error.expected, error.got, error.fix
    except RENDER_ERRORS as error:
        expected, got = "a conversation that the chat template accepts", str(error)
        fix = "Change the row or the template."
    else:
        dropped += [f"{record.path}:{record.row}:{place}" for place in find_omitted_text(row, renderer)]
        return None
    return RowProblem(record.path, record.row, "row", expected, got, fix, record.line)
