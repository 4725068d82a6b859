"""``tunesmith data preview | lint | build | pull``: look at rows, find bad ones, make some, download some."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from tunesmith.cli import options
from tunesmith.cli.output import console, print_result, print_stderr
from tunesmith.errors import ModelError, UserError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.check.lint import LintReport
    from tunesmith.data.check.near_duplicates import NearReport
    from tunesmith.data.check.preview import Preview
    from tunesmith.data.data_config import DataConfig, Source
    from tunesmith.objectives import Objective
    from tunesmith.synth.python.wording import Candidate

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command("preview")
def preview(
    target: Annotated[str, typer.Argument(metavar="FILE|RECIPE", help="A file, builtin:NAME, or a recipe.")],
    model: Annotated[str | None, typer.Option(help="Model of the tokenizer; a recipe names its own.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each source.")] = 3,
    train_on: Annotated[str | None, typer.Option(help="completion, assistant or all.")] = None,
    format: options.Format = None,
    column: options.Columns = None,
    template: options.Template = None,
    template_kwarg: options.TemplateKwargs = None,
    split: options.Split = "train",
    name: options.Name = None,
    streaming: options.Streaming = False,
    as_json: options.Json = False,
) -> int:
    """Show rows as the model will see them, supervised tokens in green, with the counts."""
    from tunesmith.data.check import preview as previews
    from tunesmith.data.rows import ROW_TYPES
    from tunesmith.models.find.locate import locate
    from tunesmith.models.load.load import load_tokenizer

    keys = _source_keys(format, column, split, name, streaming)
    sources, config, objective, named = _open_target(target, keys, train_on)
    if model is None and named is None:
        raise UserError("data preview needs a tokenizer. Name its model, such as --model smollm2-135m")
    tokenizer = load_tokenizer(locate(model or named or ""))
    chosen = template or (config.template if config else None)
    kwargs = (config.template_kwargs if config else {}) | options.parse_template_kwargs(template_kwarg)
    accepted = ROW_TYPES if config is None and train_on is None else ()
    shown = [
        previews.preview(
            source,
            objective,
            tokenizer,
            chosen,
            rows,
            accepted,
            kwargs,
            config.special_tokens if config else None,
        )
        for source in sources
    ]
    facts = {"sources": [item.as_dict() for item in shown]}
    print_result(facts, as_json, lambda _: _preview_lines(shown))
    return 0


@app.command("lint")
def lint(
    files: Annotated[list[str], typer.Argument(metavar="FILE|RECIPE...", help="Data files or a recipe.")],
    evaluation: Annotated[list[str] | None, typer.Option("--eval", help="Evaluation files.")] = None,
    format: options.Format = None,
    column: options.Columns = None,
    model: Annotated[str | None, typer.Option(help="Also render rows with this model's template.")] = None,
    template: options.Template = None,
    template_kwarg: options.TemplateKwargs = None,
    near_duplicates: Annotated[bool, typer.Option("--near-duplicates", help="Find near-duplicates.")] = False,
    threshold: Annotated[float | None, typer.Option(help="Jaccard, 0.5 to 1.", show_default="0.8")] = None,
    write: Annotated[str | None, typer.Option(help="New .jsonl file: FILE without near-duplicates.")] = None,
    split: options.Split = "train",
    name: options.Name = None,
    streaming: options.Streaming = False,
    as_json: options.Json = False,
) -> int:
    """List bad rows as file:row:field with what was expected, found and how to fix it; and duplicates."""
    from tunesmith.data.check import lint as linting
    from tunesmith.data.check import near_duplicates as near
    from tunesmith.data.encode import turn_tokens
    from tunesmith.data.read.source import eval_sources
    from tunesmith.data.rows import ROW_TYPES
    from tunesmith.data.store import row_writer

    if not near_duplicates and (threshold is not None or write is not None):
        raise UserError("--threshold and --write need --near-duplicates. Add it, or leave them out.")
    if write is not None:
        row_writer.check_free(Path(write), "--write")
    train: list[Source] = []
    keys = _source_keys(format, column, split, name, streaming)
    held_out = [source for path in evaluation or () for source in _open_target(path, keys, None)[0]]
    accepted: tuple[type, ...] = ROW_TYPES
    learns: Objective | None = None
    recipe_model: str | None = None
    kwargs, policy, turns_option = options.parse_template_kwargs(template_kwarg), None, {}
    for file in files:
        sources, config, objective, named = _open_target(file, keys, None)
        train += sources
        recipe_model = recipe_model or named
        if config is not None:
            accepted, learns = tuple(objective.traits.rows), objective
            template = template or config.template
            kwargs, policy = config.template_kwargs | kwargs, config.special_tokens
            turns_option = objective.config.model_dump(include={"train_on", "expand_turns"})
            held_out += eval_sources(config).values()
    tokenizer, remark = _rendering_tokenizer(model, recipe_model, template, kwargs)
    if tokenizer and policy:
        turn_tokens.set_policy(tokenizer, policy)
    report = linting.lint(train, held_out, accepted, tokenizer, learns, **turns_option)
    facts, lines = report.as_dict(), _lint_lines(report)
    if remark:
        lines.insert(0, f"remark: {remark}")
    if near_duplicates:
        found = _find_near_duplicates(train, held_out, threshold, accepted)
        facts["near_duplicates"] = found.as_dict()
        lines += found.lines()
        if write is not None:
            sha256 = row_writer.write(near.kept_rows(train, found, accepted), Path(write), "--write")
            counts = {"rows": found.learnt - len(found.surplus), "surplus": len(found.surplus)}
            counts["rejected"] = sum(file.rejected for file in report.files if file.role == "train")
            facts["written"] = {"path": write, **counts, "sha256": sha256}
            written, surplus, rejected = map(_count, counts.values(), ("row", "near-duplicate", "row"))
            left_out = f"{surplus}, {rejected} that cannot be used"
            lines.append(f"{write}: {written} written; left out: {left_out}")
    print_result(facts, as_json, lambda _: list(lines))
    return 0 if report.ok else UserError.exit_code


@app.command("build")
def build(
    kind: Annotated[
        str,
        typer.Argument(
            help="docstrings, instructions, summaries, translations, preferences, judged, classify, multilabel, tag, qa."
        ),
    ],
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other rows.")] = 0,
    lang: Annotated[str, typer.Option(help="Language of questions and label names: en, ko.")] = "en",
    split: Annotated[str | None, typer.Option(help="train or test.", show_default="all modules")] = None,
    no_answer: Annotated[
        float | None, typer.Option(min=0, max=1, help="qa: share without an answer.", show_default="0.2")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="New .jsonl file, or -.", show_default="KIND-LANG.jsonl")
    ] = None,
    as_json: options.Json = False,
) -> int:
    """Make rows of one kind from Python's standard library: real text, and answers known to be correct."""
    from tunesmith.data.store import row_writer
    from tunesmith.synth.python import KINDS, SPLITS, WORDING, draw

    _check_choice("KIND", kind, KINDS)
    _check_choice("--lang", lang, WORDING)
    _check_choice("--split", split, SPLITS)
    builder = KINDS[kind]
    if no_answer is not None and not builder.unanswerable:
        raise UserError(f"--no-answer is for the kind qa; all rows of {kind} have an answer. Leave it out.")
    if as_json and out == "-":
        raise UserError("--json and --out - both print to stdout. Leave one out, or name a file with --out.")
    path = None if out == "-" else Path(out or "-".join(filter(None, [kind, lang, split])) + ".jsonl")
    if path is not None:
        row_writer.check_free(path)
    share = (0.2 if no_answer is None else no_answer) if builder.unanswerable else 0.0
    modules = 0
    with console().status(f"{kind}: reading the library") as status:

        def on_progress(done: int, total: int) -> None:
            nonlocal modules
            modules = done
            status.update(f"{kind}: {done} of at most {total} modules read")

        drawn = draw(kind, rows, seed, lang, split, share, on_progress)
    new_rows = [candidate.row for candidate in drawn]
    sha256 = None
    if path is None:
        sys.stdout.writelines(line.decode() for line in row_writer.lines(new_rows))
    else:
        sha256 = row_writer.write(new_rows, path)
    labels = (builder.labels(one.row) if builder.labels else [one.group] for one in drawn)
    counts = Counter(label for of_row in labels for label in of_row)
    facts = {
        "kind": kind, "path": path, "rows": len(drawn), "counts": dict(sorted(counts.items())), "modules": modules,
        "seed": seed, "lang": lang, "split": split, "about": builder.about, "sha256": sha256,
    }  # fmt: skip
    print_stderr(*_build_lines(facts, drawn))
    if path is not None:
        print_result(facts, as_json, lambda _: f"{path}: {len(drawn)} rows, sha256 {sha256}")
    return 0


@app.command("pull")
def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="A data set on the Hub.")],
    name: options.Name = None,
    split: options.Split = "train",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Record the commit for `streaming: true`; download nothing.")
    ] = False,
    commit: Annotated[str | None, typer.Option(help="Commit to pull.", show_default="the newest")] = None,
    as_json: options.Json = False,
) -> int:
    """Download a split of a data set from the Hub into the local store, or update it to the newest commit."""
    from tunesmith.data.data_config import HUB, HUB_NAME
    from tunesmith.data.read import hub_set
    from tunesmith.hub import local_store

    path = repo if repo.startswith(HUB) else f"{HUB}{repo}"
    if not HUB_NAME.fullmatch(path):
        raise UserError(
            f"data pull: {repo!r} is no name of a data set on the Hub: expected OWNER/NAME or OWNER/NAME@REVISION.\n"
            "  Type: tunesmith data pull OWNER/NAME (the last part of the address of its page)"
        )
    (source,) = _open_target(path, _source_keys(None, None, split, name, streaming), None)[0]
    folder = hub_set.pull(source, print_stderr, commit)
    manifest = local_store.manifest(folder) or {}
    total = sum(file["size"] for file in manifest["files"].values())
    facts = {**manifest["source"], "source": source.path, "path": folder, "bytes": total}
    print_result(facts, as_json, lambda _: f"{source.label} at {manifest['source']['revision']}: {folder}")
    return 0


def _rendering_tokenizer(
    model: str | None, recipe_model: str | None, template: str | None, kwargs: JsonObject
) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """Return the tokenizer of ``--model``, or of the recipe's model, to render rows; or None and a remark.

    An encoder renders no rows, because it has no chat template. A recipe's model that cannot be opened is
    reported in the remark, not raised, because the rows may still be good.
    """
    from tunesmith.data.encode.templates import apply_template
    from tunesmith.models.find.locate import locate
    from tunesmith.models.load.load import load_tokenizer

    name = model or recipe_model
    if name is None:
        return None, None
    try:
        tokenizer = load_tokenizer(locate(name))
    except ModelError as error:
        if model:
            raise
        return None, f"no row is rendered, because the recipe's model does not open: {error}"
    if template is None and tokenizer.chat_template is None and tokenizer.eos_token is None:
        return None, f"{name} has no chat template and no end token, so no row is rendered" if model else None
    return apply_template(tokenizer, template, kwargs)[0], None


def _find_near_duplicates(
    train: list[Source], held_out: list[Source], threshold: float | None, accepted: tuple[type, ...]
) -> NearReport:
    from tunesmith.data.check import near_duplicates as near

    chosen = near.THRESHOLD if threshold is None else threshold
    with console().status("near-duplicates: reading") as status:

        def show(phase: str) -> None:
            status.update(f"near-duplicates: {phase}")

        return near.near_duplicates(train, held_out, chosen, accepted, show)


def _check_choice(option: str, value: str | None, valid: Collection[str]) -> None:
    from tunesmith.suggestions import did_you_mean

    if value is not None and value not in valid:
        raise UserError(f"{option}: there is no {value!r}. {did_you_mean(value, valid)}")


def _build_lines(facts: JsonObject, drawn: list[Candidate]) -> list[str]:
    from tunesmith.data.store.row_writer import shorten_row

    counted = f"{_count(facts['rows'], 'row')} from {_count(facts['modules'], 'module')}"
    counts = ", ".join(f"{name} {count}" for name, count in facts["counts"].items())
    examples = (f"--- {number}\n{shorten_row(one.row)}" for number, one in enumerate(drawn[:3], 1))
    return [f"{facts['kind']}: {counted} of this Python's library", facts["about"], counts, *examples]


def _source_keys(
    format: str | None, column: list[str] | None, split: str, name: str | None, streaming: bool
) -> JsonObject:
    columns = options.parse_columns(column) or None
    return {"format": format, "columns": columns, "split": split, "name": name, "streaming": streaming}


def _open_target(
    target: str, keys: JsonObject, train_on: str | None
) -> tuple[list[Source], DataConfig | None, Objective, str | None]:
    """Return sources, data keys, objective and model of a recipe. A file is a source with ``keys``."""
    from tunesmith import objectives, recipe

    overrides = [f"objective.train_on={train_on}"] if train_on else []
    is_recipe = target.endswith((".yaml", ".yml"))
    if is_recipe:
        if given := [flag for flag, key in (("--format", "format"), ("--column", "columns")) if keys[key]]:
            raise UserError(
                f"{' and '.join(given)}: for data files; the sources of the recipe {target} name theirs (data.train.0.columns)."
            )
        loaded = recipe.load(target, overrides)
    else:
        raw = {
            "model": "-",
            "data": {"train": [{"path": target, **keys}]},
            "objective": recipe.DEFAULT_OBJECTIVE,
        }
        loaded = recipe.parse(raw, overrides, where="data")
    kind = objectives.module(objectives.name_of(loaded.objective))
    config, model = (loaded.data, loaded.model) if is_recipe else (None, None)
    return list(loaded.data.train), config, kind.Objective(loaded.objective), model


def _preview_lines(shown: list[Preview]) -> list[RenderableType]:
    from tunesmith.data.check import preview as previews

    lines: list[RenderableType] = []
    for item in shown:
        lines.append(f"{item.path}: {item.format}\ntemplate: {item.template}\norder: {previews.ORDER}")
        for row in item.rows:
            lines += [f"--- {row.head()}", row.styled_text()]
        lines += [f"bad row: {problem}" for problem in item.problems]
    return lines


def _lint_lines(report: LintReport) -> list[str]:
    from tunesmith.data.row_problems import describe_causes

    leaked, duplicates = report.leaked, report.duplicates
    lines = describe_causes(report.problems)
    lines += [f"{item.where}: also a training row, {item.same_as}. Remove one of them." for item in leaked]
    lines += [f"remark: {item.where} repeats {item.same_as}" for item in duplicates]
    lines += [f"remark: the chat template leaves out {place}" for place in report.left_out]
    lines += [f"remark: {line}" for item in report.in_turns for line in item.lines()]
    lines += [line for pairs in report.pairs for line in pairs.lines()]
    lines += [line for judgements in report.judged for line in judgements.lines()]
    lines += [f"warning: {text}" for text in report.warnings]
    for file in report.files:
        if file.carriage_returns:
            lines.append(
                f"remark: {file.path}: \\r\\n is read as \\n in {_count(file.carriage_returns, 'row')}"
            )
        rows = f"{_count(file.rows, 'row')} = {file.kept} kept + {file.rejected} rejected"
        lines.append(f"{file.path}: {file.format}; {rows}")
    bad = f"{_count(len(report.problems), 'problem')}, {_count(len(leaked), 'row')} in both train and eval"
    return [*lines, "no bad rows" if report.ok else bad]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
