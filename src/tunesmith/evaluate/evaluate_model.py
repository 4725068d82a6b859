"""The metrics of any model on any file, computed by the data path and the forward pass of training."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tunesmith import files
from tunesmith.data.data_config import DataConfig, EvalConfig, Source
from tunesmith.data.encode import turn_tokens
from tunesmith.data.formats.fields import Columns
from tunesmith.data.read import prompts
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.data.store.prepare import prepare
from tunesmith.errors import UserError
from tunesmith.evaluate import generated_figures, starting_policy
from tunesmith.evaluate.open_model import OpenedModel, open_model
from tunesmith.evaluate.prompt_answers import Advance
from tunesmith.evaluate.trained_reading import ModelArgument, make_source, source_as_trained
from tunesmith.json_types import JsonObject
from tunesmith.metrics import comparison, metric_names, tasks
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.generate.decode_step import DecodeWeights
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
    *,
    objective: str | None = None,
    format: str | None = None,
    columns: Columns | None = None,
    separator: str | None = None,
    prompt_template: str | None = None,
    template: str | None = None,
    template_kwargs: JsonObject | None = None,
    max_length: int | None = None,
    overlong: str | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    limit: int | None = None,
    precision: str = "auto",
    batch_tokens: int = 2048,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    reference: str | Path | None = None,
    generate: int = 0,
    task: tasks.Task | None = None,
    answer_metrics: Sequence[str] = (),
    max_new_tokens: int = 128,
    decode_weights: DecodeWeights = "stored",
    with_base: bool = True,
    engine: str | None = None,
    served_model: str | None = None,
    out: str | Path | None = None,
    on_answer: Advance = lambda count: None,
    on_precision: Callable[[ComputeDtype], None] = lambda chosen: None,
    on_measured: Callable[[Measured], None] = lambda measured: None,
) -> JsonObject:
    """Return the metrics of ``model`` (a name, a folder, or a pair (model, tokenizer)) over the rows of
    ``data``.

    Keys: eval_loss (mean per loss unit), eval_loss_stderr (two rows or more), perplexity of a language model,
    the metrics of other heads (``objectives.md``) with ``details`` (by class, by entity type), rows, tokens,
    supervised_tokens, tokens_per_second and seconds. ``assessment`` has the intervals and baselines of the
    metrics, and a verdict in words (``runs.assessment.assess``). ``precision`` has the compute dtype and why it
    was chosen; ``on_precision`` gets it before the first row is computed.

    ``objective`` decides which tokens are supervised. None = the objective that the model was trained for, or
    ``sft`` for a language model that records none (the last answer; text rows whole). ``cpt`` supervises
    every token of a document and splits long documents into blocks. Columns, template and the objective's
    keys default to those of the model's training.

    ``overlong``: the policy for rows above ``max_length`` (default: the objective's). ``batch_tokens`` bounds
    memory and never changes the metrics. ``split``, ``name`` and ``streaming``: keys of a Hub data set
    (``data`` = "hub:OWNER/NAME"), as in a recipe. ``reference``: the reference policy of dpo and kto
    (default: the model that training started from). ``generate``: prompts that a language model answers;
    their figures are ``generated`` (``metrics.answer_figures``): those named by ``answer_metrics`` (a name,
    or the import path of a Python function), else those of ``task`` or of the task of the training, else all.
    ``with_base``: the base model answers the same prompts, too. ``decode_weights``: of the answers, as in
    ``Engine``. ``engine`` and ``served_model``: vLLM gives the model's answers (as in
    ``models.generate.vllm_backend.open_vllm``). ``out``: a new folder for report.html, figures.json and the
    worst mistakes, for a model with a task head; with ``generate``, the folder of figures.json and the
    answers, from which an evaluation that was interrupted goes on. ``on_answer`` gets the number of answers
    that ended, ``on_measured`` the record of every batch. Raises UserError if model or data cannot be used.
    """
    reading = {
        "format": format,
        "columns": columns,
        "separator": separator,
        "prompt_template": prompt_template,
    }
    hub = {"split": split, "name": name, "streaming": streaming}
    make_source(data, limit=limit, **reading, **hub)  # report a wrong option before the model loads
    if not generate and (answer_metrics or task):
        raise UserError("--metric and --task choose figures of answers: add --generate 50")
    if decode_weights != "stored" and (engine or not generate):
        raise UserError(
            "--decode-weights is for answers of tunesmith's engine; other figures use the weights as stored.\n"
            "  Leave it out, or add --generate 50 without --engine."
        )
    vllm = _open_vllm(model, engine, served_model, precision, generate)
    metric_names.of_names(answer_metrics)  # report a wrong name before the model loads
    opened = open_model(model, objective, overlong, max_length)
    network, chosen = opened.network, opened.objective
    source = source_as_trained(opened.trained, data, chosen.traits.rows, reading, {"limit": limit, **hub})
    writes_text = chosen.traits.head == "lm"
    if generate and not writes_text:
        raise UserError(f"--generate: a model for {opened.name} writes no text. Leave it out.")
    if out is not None and not generate:
        _check_out(Path(out), chosen.traits.head)
    config = DataConfig(
        train=[source], eval=EvalConfig(fraction=0.0), template=template,
        template_kwargs=template_kwargs or {}, bad_rows=bad_rows,
        special_tokens=turn_tokens.policy_of(opened.tokenizer),
    )  # fmt: skip
    window = window_of(network.config, virtual_tokens.count(network) + first_position(base(network)))
    prepared = prepare(config, chosen, opened.tokenizer, max_length=opened.max_length, window=window, seed=0)
    rows, rejected = prepared.train, sum(report.rows_rejected for report in prepared.report.sources)
    if chosen.traits.needs_reference:
        rows = starting_policy.attach_reference(opened, rows, reference, precision, batch_tokens)

    shortest = sorted(range(len(rows)), key=lambda row: rows.lengths[row])[:2]
    route, chosen_dtype = opened.prepare(precision, [rows[row] for row in shortest], rows.longest)
    on_precision(chosen_dtype)
    check_decode_weights(base(network), decode_weights)
    started = time.perf_counter()
    session = opened.session(rows, route, batch_tokens)
    records = evaluation.records(
        network, chosen, rows, route.layout, batch_tokens, opened.device, session=session
    )
    metrics: JsonObject = {**chosen.summarise(records)}
    seconds = time.perf_counter() - started
    route.disable()
    metrics |= {
        "objective": opened.name,
        "rows": len(rows),
        **({"bad_rows": rejected} if rejected else {}),
        "tokens": int(rows.lengths.sum()),
        "supervised_tokens": int(rows.supervised.sum()),
        "tokens_per_second": float(rows.lengths.sum()) / seconds,
        "seconds": seconds,
        "precision": chosen_dtype.as_dict(),
    }
    on_measured(Measured(opened, source, rows, records))
    kept = evaluation.measured(chosen, records, rows)
    metrics["assessment"] = assessment.assess(kept, None, chosen.traits.best[0])
    if generate:
        named = answer_metrics or tasks.metrics_of(task or opened.trained.get("task"))
        asked = source_as_trained(
            opened.trained, data, prompts.ROWS, reading, {"limit": limit, **hub}, prompts=True
        )
        folder = None if out is None else Path(out)
        metrics["generated"] = generated_figures.generated_figures(
            model, (network, opened.tokenizer), opened.trained, asked, generate, metric_names.of_names(named),
            max_new_tokens=max_new_tokens, folder=folder, with_base=with_base, advance=on_answer, vllm=vllm,
            decode_weights=decode_weights,
        )  # fmt: skip
        if folder is not None:
            generated_figures.save(metrics, folder)
    if not isinstance(chosen, TaskHead):
        return metrics
    answers = chosen.answers(records)
    metrics["details"] = _with_intervals(chosen, records, rows)
    if out is not None:
        title = str(model) if opened.loaded_here else "a model in memory"
        metrics["report"] = str(_write_report(Path(out), title, metrics, answers, source, opened))
    return metrics


def _open_vllm(
    model: ModelArgument, engine: str | None, served: str | None, precision: str, generate: int
) -> Vllm | None:
    """Return the vLLM that answers the prompts; None without ``engine``. Raises UserError."""
    if engine is None and served is None:
        return None
    if engine is None or not generate or isinstance(model, tuple):
        raise UserError(
            "--engine and --served-model name the vLLM that answers prompts for a model with a name or a folder: add "
            "--generate 50 and --engine, or leave them out"
        )
    from tunesmith.models.generate.vllm_backend import HERE, open_vllm

    return open_vllm(engine, str(model), served, precision if engine == HERE else "auto")


def _with_intervals(objective: TaskHead, records: list[JsonObject], rows: Encoded) -> JsonObject:
    """Return the objective's ``details``; each class, type or group has the interval of its F1."""
    details = objective.details(records)
    groups = details.get("per_class") or details.get("by_type") or {}
    clusters = rows.groups()
    for name, figure in objective.group_figures(records).items():
        if name in groups and (found := comparison.of_figure(figure, clusters)):
            groups[name] |= {"f1_low": found.low, "f1_high": found.high}
    return details


def _check_out(folder: Path, head: str) -> None:
    if head == "lm":
        raise UserError(
            "--out writes a report of a model that classifies, tags, finds answers or gives rewards; this model writes "
            "text. Leave it out."
        )
    if folder.exists():
        raise UserError(f"{folder} exists already: name a new folder with --out, or remove it")
    files.make_folder(folder.parent)  # a folder that cannot be written fails before the evaluation


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
