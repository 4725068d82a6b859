"""The metrics of any model on any file, computed by the data path and the forward pass of training."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import files
from tunesmith.data.data_config import DataConfig, EvalConfig, Source
from tunesmith.data.encode import turn_tokens
from tunesmith.data.read import prompts
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.data.store.prepare import prepare
from tunesmith.errors import UserError
from tunesmith.evaluate import generated_figures, starting_policy
from tunesmith.evaluate.evaluate_options import EvaluateOptions
from tunesmith.evaluate.open_model import OpenedModel, open_model
from tunesmith.evaluate.prompt_answers import Advance
from tunesmith.evaluate.trained_reading import ModelArgument, source_as_trained
from tunesmith.json_types import JsonObject
from tunesmith.metrics import comparison, metric_names, tasks
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.generate.engine import check_decode_weights
from tunesmith.models.load.compute_dtype import ComputeDtype
from tunesmith.models.network import base, first_position
from tunesmith.objectives import TaskHead
from tunesmith.report import task_page
from tunesmith.runs import assessment
from tunesmith.train import evaluation, examples
from tunesmith.train.meta_model import window_of

if TYPE_CHECKING:
    from tunesmith.models.generate.vllm_backend import Vllm

MISTAKES = 50
"""Rows in the report: the wrong ones with the highest loss."""


@dataclass(frozen=True)
class Measured:
    """``records``: what the objective recorded of each batch of ``rows``, with the places of its rows in ``source``."""

    opened: OpenedModel
    source: Source
    rows: Encoded
    records: list[JsonObject]


def evaluate(
    model: ModelArgument,
    data: str | Path,
    options: EvaluateOptions | None = None,
    *,
    on_answer: Advance = lambda count: None,
    on_precision: Callable[[ComputeDtype], None] = lambda chosen: None,
    on_measured: Callable[[Measured], None] = lambda measured: None,
    **keys: Any,
) -> JsonObject:
    """Return the metrics of ``model`` (a name, a folder, or a pair (model, tokenizer)) over the rows of
    ``data``.

    ``keys``: fields of ``EvaluateOptions``, such as ``generate=50``, which replace those of ``options``.

    Keys of the result: eval_loss (mean per loss unit), eval_loss_stderr (two rows or more), perplexity of a language
    model, the metrics of other heads (``objectives.md``) with ``details`` (by class, by entity type), rows, tokens,
    supervised_tokens, tokens_per_second and seconds. ``assessment`` has the intervals and baselines of the
    metrics, and a verdict in words (``runs.assessment.assess``). ``precision`` has the compute dtype and why it
    was chosen. ``generated`` has the figures of answers (``metrics.answer_figures``).

    ``on_precision`` gets the compute dtype before the first row is computed, ``on_answer`` the number of answers
    that ended, ``on_measured`` the record of every batch. Raises UserError if model or data cannot be used.
    """
    options = replace(options or EvaluateOptions(), **keys)
    options.check(data)
    vllm = _open_vllm(model, options)
    opened = open_model(model, options.objective, options.overlong, options.max_length)
    _check_head(opened, options)
    chosen = opened.objective
    source = source_as_trained(opened.trained, data, chosen.traits.rows, options.reading, options.rows)
    rows, rejected = _read_rows(opened, source, options)
    metrics, records = _measure(opened, rows, options, on_precision)
    if rejected:
        metrics["bad_rows"] = rejected
    on_measured(Measured(opened, source, rows, records))
    kept = evaluation.measured(chosen, records, rows)
    metrics["assessment"] = assessment.assess(kept, None, chosen.traits.best[0])
    if options.generate:
        metrics["generated"] = _figures_of_answers(model, opened, data, options, on_answer, vllm)
        if options.folder is not None:
            generated_figures.save(metrics, options.folder)
    if not isinstance(chosen, TaskHead):
        return metrics
    metrics["details"] = _with_intervals(chosen, records, rows)
    if options.folder is not None:
        title = str(model) if opened.loaded_here else "a model in memory"
        report = _write_report(options.folder, title, metrics, chosen.answers(records), source, opened)
        metrics["report"] = str(report)
    return metrics


def _open_vllm(model: ModelArgument, options: EvaluateOptions) -> Vllm | None:
    """Return the vLLM that answers the prompts; None without ``engine``. Raises UserError."""
    engine, served = options.engine, options.served_model
    if engine is None and served is None:
        return None
    if engine is None or not options.generate or isinstance(model, tuple):
        raise UserError(
            "--engine and --served-model name the vLLM that answers prompts for a model with a name or a folder: add "
            "--generate 50 and --engine, or leave them out"
        )
    from tunesmith.models.generate.vllm_backend import HERE, open_vllm

    return open_vllm(engine, str(model), served, options.precision if engine == HERE else "auto")


def _check_head(opened: OpenedModel, options: EvaluateOptions) -> None:
    """Raise UserError for options that do nothing for this model, or a folder that cannot be written."""
    head, folder = opened.objective.traits.head, options.folder
    if options.generate and head != "lm":
        raise UserError(f"--generate: a model for {opened.name} writes no text. Leave it out.")
    if folder is None or options.generate:
        return
    if head == "lm":
        raise UserError(
            "--out writes a report of a model that classifies, tags, finds answers or gives rewards; this model writes "
            "text. Leave it out."
        )
    if folder.exists():
        raise UserError(f"{folder} exists already: name a new folder with --out, or remove it")
    files.make_folder(folder.parent)


def _read_rows(opened: OpenedModel, source: Source, options: EvaluateOptions) -> tuple[Encoded, int]:
    """Return the encoded rows of ``source``, and the number of rows that were left out."""
    config = DataConfig(
        train=[source], eval=EvalConfig(fraction=0.0), template=options.template,
        template_kwargs=options.template_kwargs or {}, bad_rows=options.bad_rows,
        special_tokens=turn_tokens.policy_of(opened.tokenizer),
    )  # fmt: skip
    network, chosen = opened.network, opened.objective
    window = window_of(network.config, virtual_tokens.count(network) + first_position(base(network)))
    prepared = prepare(config, chosen, opened.tokenizer, max_length=opened.max_length, window=window, seed=0)
    rows, rejected = prepared.train, sum(report.rows_rejected for report in prepared.report.sources)
    if chosen.traits.needs_reference:
        rows = starting_policy.attach_reference(
            opened, rows, options.reference, options.precision, options.batch_tokens
        )
    return rows, rejected


def _measure(
    opened: OpenedModel,
    rows: Encoded,
    options: EvaluateOptions,
    on_precision: Callable[[ComputeDtype], None],
) -> tuple[JsonObject, list[JsonObject]]:
    """Return the objective's metrics over ``rows`` with the speed, and its record of every batch."""
    chosen, budget = opened.objective, options.batch_tokens
    shortest = sorted(range(len(rows)), key=lambda row: rows.lengths[row])[:2]
    route, dtype = opened.prepare(options.precision, [rows[row] for row in shortest], rows.longest)
    on_precision(dtype)
    check_decode_weights(base(opened.network), options.decode_weights)
    started = time.perf_counter()
    session = opened.session(rows, route, budget)
    records = evaluation.records(
        opened.network, chosen, rows, route.layout, budget, opened.device, session=session
    )
    metrics: JsonObject = {**chosen.summarise(records)}
    seconds = time.perf_counter() - started
    route.disable()
    tokens = int(rows.lengths.sum())
    metrics |= {
        "objective": opened.name, "rows": len(rows), "tokens": tokens, "supervised_tokens": int(rows.supervised.sum()),
        "tokens_per_second": tokens / seconds, "seconds": seconds, "precision": dtype.as_dict(),
    }  # fmt: skip
    return metrics, records


def _figures_of_answers(
    model: ModelArgument,
    opened: OpenedModel,
    data: str | Path,
    options: EvaluateOptions,
    on_answer: Advance,
    vllm: Vllm | None,
) -> JsonObject:
    """Let the model, and its base model, answer prompts of ``data``; return the figures of the answers."""
    trained = opened.trained
    names = options.answer_metrics or tasks.metrics_of(options.task or trained.get("task"))
    asked = source_as_trained(trained, data, prompts.ROWS, options.reading, options.rows, prompts=True)
    return generated_figures.generated_figures(
        model, (opened.network, opened.tokenizer), trained, asked, options.generate, metric_names.of_names(names),
        max_new_tokens=options.max_new_tokens, folder=options.folder, with_base=options.with_base, advance=on_answer,
        vllm=vllm, decode_weights=options.decode_weights,
    )  # fmt: skip


def _with_intervals(objective: TaskHead, records: list[JsonObject], rows: Encoded) -> JsonObject:
    """Return the objective's ``details``; each class, type or group has the interval of its F1."""
    details = objective.details(records)
    groups = details.get("per_class") or details.get("by_type") or {}
    clusters = rows.groups()
    for name, figure in objective.group_figures(records).items():
        if name in groups and (found := comparison.of_figure(figure, clusters)):
            groups[name] |= {"f1_low": found.low, "f1_high": found.high}
    return details


def _write_report(
    folder: Path,
    title: str,
    metrics: JsonObject,
    answers: Sequence[JsonObject],
    source: Source,
    opened: OpenedModel,
) -> Path:
    """Write report.html, figures.json and mistakes.jsonl into ``folder``; return the report's path."""
    chosen = examples.select(answers, MISTAKES)["wrong"]
    mistakes = examples.with_rows(chosen, [source], opened.objective.traits.rows)
    lines = "".join(json.dumps(mistake, ensure_ascii=False) + "\n" for mistake in mistakes)
    notes = [*opened.objective.notes]
    if rejected := metrics.get("bad_rows"):
        notes.append(f"{rejected} bad rows were left out")
    facts = {"command": shlex.join(sys.argv), "notes": notes, "data": source.label, "objective": opened.name}
    facts |= {key: metrics[key] for key in ("rows", "tokens", "tokens_per_second")}
    figures = {**metrics["details"], "loss": metrics["eval_loss"]}
    with files.new_folder(folder) as made:
        content = json.dumps(metrics, ensure_ascii=False, indent=1)
        (made / "figures.json").write_text(content, encoding="utf-8")
        (made / "mistakes.jsonl").write_text(lines, encoding="utf-8")
        page = task_page.write(made, title, figures, mistakes, facts, metrics["assessment"])
    return folder / page.name
