"""``tunesmith predict MODEL --data FILE [--out FILE]``: predictions for every row, one JSON object a line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tunesmith import files
from tunesmith.cli import garbage_collection, options
from tunesmith.cli.output import console, json_line, print_result, print_stderr
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from tunesmith.models.load.compute_dtype import ComputeDtype

SHOWN = 5
"""Predictions that are printed when all are written to a file."""


def predict(
    model: options.Model,
    data: Annotated[str, typer.Option(help="Rows, with or without labels: json, csv, txt, conll, ...")],
    out: options.Predictions = None,
    format: options.Format = None,
    column: options.Columns = None,
    limit: options.Limit = None,
    max_length: options.MaxLength = None,
    precision: options.Precision = "auto",
    batch_tokens: options.BatchTokens = 2048,
    split: options.Split = "train",
    name: options.Name = None,
    streaming: options.Streaming = False,
    as_json: options.Json = False,
) -> None:
    """Predict classes, entities or answers for every row. A row that cannot be read gets `error`."""
    write_predictions(
        model, data, out, "predicting", as_json, column, format=format, limit=limit, max_length=max_length, precision=precision,
        batch_tokens=batch_tokens, split=split, name=name, streaming=streaming,
    )  # fmt: skip


def write_predictions(
    model: str, data: str, out: Path | None, verb: str, as_json: bool, column: list[str] | None, **arguments: Any,
) -> None:  # fmt: skip
    """Write the predictions for every row of ``data`` to the new file ``out``; then print the first few.

    Without ``out`` the predictions go to stdout as they come, with ``as_json`` as ``answers`` of the one
    object. ``arguments`` are those of ``evaluate.predict.predict``.
    """
    columns = options.parse_columns(column) or None
    check_new_file(out)

    with garbage_collection.imports():
        from tunesmith.evaluate import predict as engine

    print_stderr(f"loading {model}")
    notes: list[str] = []
    precision: dict[str, str] = {}

    def on_precision(chosen: ComputeDtype) -> None:
        print_stderr(str(chosen))
        precision.update(chosen.as_dict())

    arguments |= {"columns": columns, "note": notes.append, "rewards": verb == "scoring"}
    arguments["on_precision"] = on_precision
    predictions = engine.predict(model, data, **arguments)
    kept: list[JsonObject] = []
    most_kept = SHOWN if out is not None else sys.maxsize if as_json else 0
    rows = errors = 0
    bar = (SpinnerColumn(), TextColumn(verb), MofNCompleteColumn(), TimeElapsedColumn())
    stdout = contextlib.nullcontext(None if as_json else sys.stdout)
    with (
        Progress(*bar, console=console(), transient=True) as progress,
        stdout if out is None else _new_text_file(out) as file,
    ):
        task = progress.add_task("", total=None)
        for prediction in predictions:
            if file is not None:
                file.write(json_line(prediction))
            rows, errors = rows + 1, errors + ("error" in prediction)
            kept += [prediction] if len(kept) < most_kept else []
            progress.advance(task)
    for line in notes:
        print_stderr(line)
    facts: JsonObject = {"model": model, "data": data, "rows": rows, "errors": errors, "notes": notes}
    facts["precision"] = precision or None  # no row could be read
    if out is not None:
        print_result({**facts, "out": str(out), "first": kept}, as_json, _first_lines)
    elif as_json:
        print_result({**facts, "answers": kept}, as_json)
    else:
        print_stderr(f"{rows:,} rows")


def check_new_file(out: Path | None) -> None:
    """Raise UserError if the file ``out`` exists."""
    if out is not None and out.exists():
        raise UserError(f"{out} exists already; name a new file with --out, or remove it")


@contextlib.contextmanager
def _new_text_file(out: Path) -> Iterator[TextIO]:
    """Yield a file that becomes ``out`` at the end, and is removed if the block fails. Raises UserError."""
    files.make_folder(out.parent)
    with files.publish_file(out) as temporary:
        try:
            file = temporary.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}. Choose another --out.") from None
        with file:
            yield file


def _first_lines(facts: JsonObject) -> str:
    lines = [_short_line(prediction) for prediction in facts["first"]]
    return "\n".join([*lines, f"{facts['rows']:,} rows written to {facts['out']}"])


def _short_line(prediction: JsonObject) -> str:
    left_out = ("row", "probabilities", "n_best", "tags")
    short = {name: value for name, value in prediction.items() if name not in left_out}
    text = json_line(short).strip()
    return f"{prediction['row']}: {text if len(text) <= 160 else text[:157] + '...'}"
