"""``tunesmith data preview | lint | build | pull``: look at rows as the model sees them, find bad ones, make some, fetch some."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import output

if TYPE_CHECKING:
    from tunesmith.data.check.lint import LintReport
    from tunesmith.data.data_config import DataConfig, Source
    from tunesmith.synth.python.wording import Candidate

app = typer.Typer(add_completion=False, no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Format = Annotated[str | None, typer.Option("--format", help="Name the format instead of detecting it.")]
Split = Annotated[str, typer.Option("--split", help="Of a data set of the Hub.")]
Name = Annotated[
    str | None,
    typer.Option(
        "--name", help="Of a data set of the Hub with several configurations: which.", show_default=False
    ),
]
Streaming = Annotated[
    bool, typer.Option("--streaming", help="Of a data set of the Hub: rows over the network, no file.")
]
Template = Annotated[
    str | None, typer.Option("--template", help="alpaca, chatml, roles, korean, or a Jinja string.")
]


@app.command("preview")
def preview(
    target: Annotated[
        str,
        typer.Argument(metavar="FILE|RECIPE", help="A data file, builtin:docstrings, or a recipe (.yaml)."),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Whose tokenizer; a recipe names its own.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of each source.")] = 3,
    train_on: Annotated[str | None, typer.Option("--train-on", help="completion, assistant or all.")] = None,
    format: Format = None,
    template: Template = None,
    split: Split = "train",
    name: Name = None,
    streaming: Streaming = False,
    json: Json = False,
) -> int:
    """Show rows as the model will see them, what is learnt in green, with the counts."""
    from tunesmith.data.check import preview as previews
    from tunesmith.data.rows import ROW_TYPES
    from tunesmith.errors import UserError
    from tunesmith.models.find.locate import locate
    from tunesmith.models.load.load import load_tokenizer

    keys = _keys(format, split, name, streaming)
    sources, config, objective, named = _target(target, keys, train_on)
    if model is None and named is None:
        raise UserError("data preview needs a tokenizer. Say whose: --model smollm2-135m, or a model folder")
    tokenizer = load_tokenizer(locate(model or named or ""))
    chosen = template or (config.template if config else None)
    accepted = ROW_TYPES if config is None and train_on is None else ()
    shown = [previews.preview(source, objective, tokenizer, chosen, rows, accepted) for source in sources]
    output.result(
        {"sources": [item.as_dict() for item in shown]}, json, human=lambda _: _preview_lines(shown)
    )
    return 0


@app.command("lint")
def lint(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE|RECIPE...", help="Data files, or one recipe (.yaml).")
    ],
    evaluation: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out files: compared with FILE for duplicates.")
    ] = None,
    format: Format = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Render each row with this model's template, too.")
    ] = None,
    template: Template = None,
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates", help="Find rows that are nearly the same, too.")
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="How much alike, 0.5 to 1 (Jaccard).", show_default="0.8"),
    ] = None,
    write: Annotated[
        str | None,
        typer.Option(
            "--write",
            help="A new .jsonl file: FILE's rows without near-duplicates of --eval's and of earlier ones.",
        ),
    ] = None,
    split: Split = "train",
    name: Name = None,
    streaming: Streaming = False,
    json: Json = False,
) -> int:
    """List every bad row as file:row:field, what was expected, what is there and how to mend it; and duplicates."""
    from tunesmith.data.check import lint as linting
    from tunesmith.data.check import near_duplicates as near
    from tunesmith.data.encode.templates import apply_template
    from tunesmith.data.read.source import eval_sources
    from tunesmith.data.rows import ROW_TYPES
    from tunesmith.data.store import row_writer as writing
    from tunesmith.errors import UserError
    from tunesmith.models.find.locate import locate
    from tunesmith.models.load.load import load_tokenizer

    if not near_duplicates and (threshold is not None or write is not None):
        raise UserError("--threshold and --write go with --near-duplicates. Add it, or leave them out.")
    if write is not None:
        writing.check_free(Path(write), "--write")
    train: list[Source] = []
    keys = _keys(format, split, name, streaming)
    held = [source for path in evaluation or () for source in _target(path, keys, None)[0]]
    accepted: tuple[type, ...] = ROW_TYPES
    for file in files:
        sources, config, objective, _ = _target(file, keys, None)
        train += sources
        if config is not None:
            accepted = tuple(objective.traits.rows)
            template = template or config.template
            held += eval_sources(config).values()
    tokenizer = apply_template(load_tokenizer(locate(model)), template)[0] if model else None
    report = linting.lint(train, held, accepted, tokenizer)
    said, lines = report.as_dict(), _lint_lines(report)
    if near_duplicates:
        with output.console().status("near-duplicates: reading") as status:
            found = near.near_duplicates(
                train, held, near.THRESHOLD if threshold is None else threshold, accepted,
                lambda doing: status.update(f"near-duplicates: {doing}"),
            )  # fmt: skip
        said["near_duplicates"] = found.as_dict()
        lines += found.lines()
        if write is not None:
            sha256 = writing.write(near.kept_rows(train, found, accepted), Path(write), "--write")
            counts = {"rows": found.learnt - len(found.surplus), "surplus": len(found.surplus)}
            counts["rejected"] = sum(file.rejected for file in report.files if file.role == "train")
            said["written"] = {"path": write, **counts, "sha256": sha256}
            lines.append(
                f"{write}: {_counted(counts['rows'], 'row')} written; left out: {_counted(counts['surplus'], 'near-duplicate')}, "
                f"{_counted(counts['rejected'], 'row')} that cannot be used"
            )
    output.result(said, json, human=lambda _: lines)
    return 0 if report.ok else 2


@app.command("build")
def build(
    kind: Annotated[
        str,
        typer.Argument(
            help="docstrings, instructions, preferences, judged, classify, multilabel, tag or qa.",
            show_default=False,
        ),
    ],
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed, other rows.")] = 0,
    lang: Annotated[
        str, typer.Option("--lang", help="Language of questions, sentences and label names: en, ko.")
    ] = "en",
    split: Annotated[
        str | None,
        typer.Option("--split", help="train or test: rows of different modules.", show_default="all modules"),
    ] = None,
    no_answer: Annotated[
        float | None,
        typer.Option(
            "--no-answer", min=0, max=1, help="qa: share of questions without an answer.", show_default="0.2"
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", help="A new .jsonl file, or - for stdout.", show_default="KIND-LANG.jsonl here"
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Make rows of one kind from the library of the Python that runs: real text, and answers that are known to be true."""
    from tunesmith.data.store import row_writer
    from tunesmith.errors import UserError
    from tunesmith.suggestions import did_you_mean
    from tunesmith.synth.python import KINDS, SPLITS, WORDING, draw

    for option, value, valid in (
        ("KIND", kind, KINDS),
        ("--lang", lang, WORDING),
        ("--split", split, SPLITS),
    ):
        if value is not None and value not in valid:
            raise UserError(f"{option}: there is no {value!r}. {did_you_mean(value, valid)}")
    if no_answer is not None and not KINDS[kind].unanswerable:
        raise UserError(
            f"--no-answer is for the kind qa; the rows of {kind} all have an answer. Leave it out."
        )
    if json and out == "-":
        raise UserError(
            "--json and --out - both print to stdout. Leave one of them out, or name a file with --out."
        )
    path = None if out == "-" else Path(out or "-".join(filter(None, [kind, lang, split])) + ".jsonl")
    if path is not None:
        row_writer.check_free(path)
    share = (0.2 if no_answer is None else no_answer) if KINDS[kind].unanswerable else 0.0
    read = 0
    with output.console().status(f"{kind}: reading the library") as status:

        def on_progress(done: int, total: int) -> None:
            nonlocal read
            read = done
            status.update(f"{kind}: {done} of at most {total} modules read")

        drawn = draw(kind, rows, seed, lang, split, share, on_progress)
    if path is None:
        sys.stdout.writelines(line.decode() for line in row_writer.lines(one.row for one in drawn))
    sha256 = row_writer.write((one.row for one in drawn), path) if path else None
    made = KINDS[kind]
    counts = Counter(
        label for one in drawn for label in (made.labels(one.row) if made.labels else [one.group])
    )
    facts = {
        "kind": kind,
        "path": path,
        "rows": len(drawn),
        "counts": dict(sorted(counts.items())),
        "modules": read,
    }
    facts |= {"seed": seed, "lang": lang, "split": split, "about": made.about, "sha256": sha256}
    output.say(*_built_lines(facts, drawn))
    if path is not None:
        output.result(facts, json, human=lambda _: f"{path}: {len(drawn)} rows, sha256 {sha256}")
    return 0


@app.command("pull")
def pull(
    repo: Annotated[
        str,
        typer.Argument(metavar="OWNER/NAME[@REVISION]", help="A data set of the Hub.", show_default=False),
    ],
    name: Name = None,
    split: Split = "train",
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming", help="Note the commit for sources with streaming: true; download nothing."
        ),
    ] = False,
    commit: Annotated[
        str | None,
        typer.Option("--commit", help="Take this commit, as an earlier run did.", show_default="the newest"),
    ] = None,
    json: Json = False,
) -> int:
    """Download a split of a data set of the Hub into the local store, or bring it to the newest commit there."""
    from tunesmith.data.data_config import HUB, HUB_NAME
    from tunesmith.data.read import hub_set
    from tunesmith.errors import UserError
    from tunesmith.hub import local_store

    path = repo if repo.startswith(HUB) else f"{HUB}{repo}"
    if not HUB_NAME.fullmatch(path):
        raise UserError(
            f"data pull: {repo!r} is no name of a data set of the Hub: expected OWNER/NAME or OWNER/NAME@REVISION.\n"
            "  Type: tunesmith data pull OWNER/NAME (the address of its page ends with it)"
        )
    (source,) = _target(path, _keys(None, split, name, streaming), None)[0]
    folder = hub_set.pull(source, output.say, commit)
    listed = local_store.manifest(folder) or {}
    facts = {
        **listed["source"],
        "source": source.path,
        "path": folder,
        "bytes": sum(one["size"] for one in listed["files"].values()),
    }
    output.result(facts, json, human=lambda _: f"{source.label} at {listed['source']['revision']}: {folder}")
    return 0


def _built_lines(facts: dict[str, Any], drawn: list[Candidate]) -> list[str]:
    from tunesmith.data.store.row_writer import shorten_row

    lines = [
        f"{facts['kind']}: {_counted(facts['rows'], 'row')} from {_counted(facts['modules'], 'module')} of this Python's library",
        facts["about"],
        ", ".join(f"{name} {count}" for name, count in facts["counts"].items()),
    ]
    return [*lines, *(f"--- {number}\n{shorten_row(one.row)}" for number, one in enumerate(drawn[:3], 1))]


def _keys(format: str | None, split: str, name: str | None, streaming: bool) -> dict[str, Any]:
    """The keys of a source that the command line gives."""
    return {"format": format, "split": split, "name": name, "streaming": streaming}


def _target(
    target: str, keys: dict[str, Any], train_on: str | None
) -> tuple[list[Source], DataConfig | None, Any, str | None]:  # fmt: skip
    """(sources, the recipe's data keys, the objective, the recipe's model) of a recipe, or of one source with ``keys``."""
    from tunesmith import objectives, recipe

    overrides = [f"objective.train_on={train_on}"] if train_on else []
    if target.endswith((".yaml", ".yml")):
        loaded = recipe.load(target, overrides)
        kind = objectives.module(objectives.name_of(loaded.objective))
        return list(loaded.data.train), loaded.data, kind.Objective(loaded.objective), loaded.model
    raw = {"model": "-", "data": {"train": [{"path": target, **keys}]}, "objective": recipe.DEFAULT_OBJECTIVE}
    checked = recipe.parse(raw, overrides, where="data")
    kind = objectives.module(recipe.DEFAULT_OBJECTIVE)
    return list(checked.data.train), None, kind.Objective(checked.objective), None


def _preview_lines(shown: list[Any]) -> list[Any]:
    lines: list[Any] = []
    for item in shown:
        lines.append(f"{item.path}: {item.format}\ntemplate: {item.template}")
        for row in item.rows:
            lines += [f"--- {row.head()}", row.styled_text()]
        lines += [f"bad row: {problem}" for problem in item.problems]
    return lines


def _lint_lines(report: LintReport) -> list[str]:
    lines = [str(problem) for problem in report.problems]
    lines += [
        f"{item.where}: also a training row, {item.same_as}. Remove one of them." for item in report.leaked
    ]
    lines += [f"remark: {item.where} repeats {item.same_as}" for item in report.duplicates]
    lines += [f"remark: {place} is left out by the chat template" for place in report.left_out]
    lines += [line for item in report.pairs for line in item.lines()]
    lines += [line for item in report.judged for line in item.lines()]
    lines += [f"warning: {text}" for text in report.warnings]
    for file in report.files:
        lines.append(
            f"{file.path}: {file.format}; {_counted(file.rows, 'row')} = {file.kept} kept + {file.rejected} rejected"
        )
    found = f"{_counted(len(report.problems), 'problem')}, {_counted(len(report.leaked), 'row')} in both train and eval"
    return [*lines, "no bad rows" if report.ok else found]


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
