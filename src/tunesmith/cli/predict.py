"""``tunesmith predict MODEL --data FILE [--out FILE]``: what a model says of every row, as one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from tunesmith import files
from tunesmith.cli.evaluate import columns_of
from tunesmith.cli.options import (
    BatchTokens,
    Format,
    Json,
    Limit,
    MaxLength,
    Name,
    Precision,
    Predictions,
    Split,
    Streaming,
)
from tunesmith.cli.output import console, plain, result, say
from tunesmith.errors import UserError

SHOWN = 5
"""Rows that a person sees of what was written."""


def predict(
    model: Annotated[
        str, typer.Argument(help="Catalog name, model, adapter or run folder.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Rows, with or without labels: json, jsonl, csv, tsv, txt, parquet, conll.",
            show_default=False,
        ),
    ],
    out: Predictions = None,
    format: Format = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="FIELD=COLUMN, such as text=review; may be repeated, labels= too, for columns of 0 and 1.",
            show_default=False,
        ),
    ] = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    precision: Precision = "auto",
    batch_tokens: BatchTokens = 2048,
    split: Split = "train",
    name: Name = None,
    streaming: Streaming = False,
    as_json: Json = False,
) -> None:
    """Classes, entities or answers for every row of a file. A row that cannot be read gets `error` and costs no other row."""
    predict_into(
        model, data, out, "predicting", as_json, column, format=format, limit=limit, max_length=max_length, precision=precision,
        batch_tokens=batch_tokens, split=split, name=name, streaming=streaming,
    )  # fmt: skip


def predict_into(
    model: str,
    data: str,
    out: Path | None,
    doing: str,
    as_json: bool,
    column: list[str] | None,
    **asked: Any,
) -> None:
    """What ``model`` says of every row of ``data`` into the new file ``out``, with progress; then the first few of them.

    ``asked``: keywords of ``evaluate.predict.predict``.
    Without a file the rows go to stdout as they come; with ``as_json`` as ``answers`` of the one object.
    """
    columns = columns_of(column or [])
    if out is not None and out.exists():
        raise UserError(f"{out} exists already; name a new file with --out, or remove it")

    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from tunesmith.evaluate import predict as engine

    say(f"loading {model}")
    notes: list[str] = []
    said = engine.predict(
        model, data, columns=columns, note=notes.append, rewards=doing == "scoring", **asked
    )
    kept: list[dict[str, Any]] = []
    shown = SHOWN if out is not None else None if as_json else 0
    rows = errors = 0
    show = Progress(
        SpinnerColumn(),
        TextColumn(doing),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console(),
        transient=True,
    )
    with (
        show,
        _appearing(out)
        if out is not None
        else contextlib.nullcontext(None if as_json else sys.stdout) as file,
    ):
        task = show.add_task("", total=None)
        for answer in said:
            if file is not None:
                file.write(json.dumps(plain(answer), ensure_ascii=False) + "\n")
            rows, errors = rows + 1, errors + ("error" in answer)
            kept += [answer] if shown is None or len(kept) < shown else []
            show.advance(task)
    for line in notes:
        say(line)
    found: dict[str, Any] = {"model": model, "data": data, "rows": rows, "errors": errors, "notes": notes}
    if out is not None:
        result({**found, "out": str(out), "first": kept}, as_json, _shown)
    elif as_json:
        result({**found, "answers": kept}, as_json, _shown)
    else:
        say(f"{rows:,} rows")


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[TextIO]:
    """A file that becomes ``out`` when the block ends, and is gone when it fails. Raises UserError where none can be written."""
    files.make_folder(out.parent)
    with files.publish_file(out) as temporary:
        try:
            file = temporary.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{out} cannot be written: {error.strerror}. Name another file with --out."
            ) from None
        with file:
            yield file


def _shown(found: Any) -> str:
    lines = [_line(answer) for answer in found["first"]]
    return "\n".join([*lines, f"{found['rows']:,} rows written to {found['out']}"])


def _line(answer: dict[str, Any]) -> str:
    said = {
        name: value
        for name, value in answer.items()
        if name not in ("row", "probabilities", "n_best", "tags")
    }
    text = json.dumps(plain(said), ensure_ascii=False)
    return f"{answer['row']}: {text if len(text) <= 160 else text[:157] + '...'}"
