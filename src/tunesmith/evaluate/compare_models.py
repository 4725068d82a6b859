"""Compare models on the same rows: every metric with its difference, an interval, and a verdict in words.

The figures are those of ``evaluate``: the loss of language models, the figures of each head. Language models also
answer some of the prompts, and their answers are compared by ``metrics.answer_metrics``. Rows with the same prompt (or
the same context of questions) form a cluster. One figure decides: the one that chooses the best model in
training. p values are adjusted for the number of comparisons (Holm 1979): the deciding figure's for the number
of pairs, those of all other figures together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from tunesmith import files
from tunesmith.data.read import prompts
from tunesmith.data.read.source import open_source
from tunesmith.data.rows import row_text
from tunesmith.errors import UserError
from tunesmith.evaluate import evaluate_model
from tunesmith.evaluate.evaluate_model import Measured
from tunesmith.evaluate.open_model import assumed_objective, objective_of
from tunesmith.evaluate.prompt_answers import GreedyAnswers, chosen_prompts
from tunesmith.evaluate.trained_reading import source_as_trained, trained_with
from tunesmith.json_types import JsonObject
from tunesmith.metrics import comparison, metric_names, tasks
from tunesmith.metrics.answer_figures import AnswerTerms
from tunesmith.metrics.answer_metrics import Answered, AnswerMetric
from tunesmith.metrics.comparison import Difference
from tunesmith.metrics.sum_functions import FUNCTIONS, OfSums, ratio
from tunesmith.models.find.locate import locate
from tunesmith.models.load.compute_dtype import cast_and_move
from tunesmith.models.load.load import head_of, load
from tunesmith.runs.figure_format import interval_text, label, lower_is_better, number

SIGNIFICANT = 0.05
SHOWN_ROWS = 10
"""Rows that changed most, in each direction."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """A figure of one system. ``terms``: row -> terms that are added over rows."""

    terms: Mapping[int, Sequence[float]]
    better: bool | None
    """True: higher is better. None: neither is."""
    of_sums: OfSums = ratio
    columns: tuple[str, ...] = ()
    """Names of the terms, such as classes: two systems are compared only if theirs are equal."""


@dataclass
class System:
    """A model and its figures. ``answers``: row -> its generated answer."""

    name: str
    objective: str
    decides: str
    figures: dict[str, Figure]
    facts: JsonObject
    writes_text: bool
    clusters: dict[int, int]
    tokenizer: str
    task: tasks.Task | None = None
    answers: dict[int, Answered] = field(default_factory=dict)
    shown: dict[int, JsonObject] = field(default_factory=dict)


def compare(
    models: Sequence[str],
    data: str,
    *,
    generate: int = 50,
    max_new_tokens: int = 128,
    task: tasks.Task | None = None,
    metrics: Sequence[str] = (),
    limit: int | None = None,
    precision: str = "auto",
    size: float | None = None,
    out: str | Path | None = None,
    report: Report = lambda sentence: None,
) -> JsonObject:
    """Return the figures of each model, and for each pair the differences and a verdict.

    ``generate``: prompts that language models answer; 0 = none. Their answers have the figures ``metrics``, else
    those of ``task`` or of the task of a training, else all; the first metric of a task decides. ``size``: a
    difference of the deciding figure, for which the verdict says how many rows would show it. ``out``: a folder
    that keeps answers, so that a comparison that was interrupted goes on. Raises UserError for models of different
    kinds.
    """
    if len(models) < 2:
        raise UserError("compare needs two models or more. Type: tunesmith compare A B --data FILE")
    if len(set(models)) < len(models):
        raise UserError("a model is named twice. Name different models.")
    metric_names.of_names(metrics)
    objective = _common_objective(models)  # a model that cannot be compared costs no evaluation
    folder = None if out is None else Path(out)
    systems = []
    for name in models:
        report(f"evaluating {name}")
        systems.append(_measure(name, data, limit, precision, objective))
    if generate and all(system.writes_text for system in systems):
        task = task or next((system.task for system in systems if system.task), None)
        chosen = metric_names.of_names(metrics or tasks.metrics_of(task))
        for system in systems:
            report(f"answers of {system.name}")
            _add_answers(
                system,
                _answers(system.name, data, generate, max_new_tokens, limit, precision, folder),
                chosen,
            )
        _decide_by(systems, [f"answer_{name}" for name in chosen] if task else [])
    cautions = [*_drop_losses(systems), *_other_labels(systems)]
    pairs = [_pair(first, second) for first, second in combinations(systems, 2)]
    _adjust(pairs, systems[0].decides)
    for one in pairs:
        one["verdict"], one["better"] = _verdict(one, systems[0].decides, size)
    return {
        "data": data,
        "rows": len(systems[0].clusters),
        "prompts": len(set(systems[0].clusters.values())),
        "decides": systems[0].decides,
        "cautions": cautions,
        "systems": [{"name": one.name, **one.facts, "figures": _own_figures(one)} for one in systems],
        "pairs": pairs,
    }


def _common_objective(models: Sequence[str]) -> str:
    """Return the objective under which all models are evaluated. Raises UserError for models of different kinds.

    It is that of their training, or, for language models that were trained for different ones, the objective that
    is assumed for a language model that names none."""
    heads = [head_of(locate(name, checkpoints=True)) for name in models]
    names = [objective_of(name) for name in models]
    for name, head, objective in zip(models, heads, names, strict=True):
        if head != heads[0] or (objective != names[0] and head != "lm"):
            raise UserError(
                f"{name} is a model for {objective}, {models[0]} for {names[0]}: their figures cannot be compared.\n"
                "  Name models of the same kind."
            )
    return names[0] if len(set(names)) == 1 else assumed_objective("lm")


def _measure(name: str, data: str, limit: int | None, precision: str, objective: str) -> System:
    kept: list[Measured] = []
    metrics = evaluate_model.evaluate(
        name, data, objective=objective, limit=limit, precision=precision, on_measured=kept.append
    )
    measured, opened = kept[0], kept[0].opened
    chosen = opened.objective
    figures = {
        key: Figure(
            {row: terms for (_, row), terms in one.rows.items()},
            _is_higher_better(key),
            FUNCTIONS[one.function],
            one.columns,
        )
        for key, one in chosen.row_figures(measured.records).items()
    }
    if not figures:
        raise UserError(f"{name} has no figure by row on {data}: there is nothing to compare")
    decides = chosen.traits.best[0]
    rows = open_source(measured.source, chosen.traits.rows).rows()
    evaluated = set().union(*(figure.terms for figure in figures.values()))
    by_row = {item[0].row: item[1] for item in rows if isinstance(item, tuple) and item[0].row in evaluated}
    tokenizer = opened.tokenizer.backend_tokenizer.to_str() if opened.tokenizer.is_fast else name
    return System(
        name,
        opened.name,
        decides if decides in figures else next(iter(figures)),
        figures,
        {
            "parameters": sum(part.numel() for part in opened.network.parameters()),
            "tokens_per_second": metrics["tokens_per_second"],
            "bytes": sum(
                file.stat().st_size for file in locate(name, checkpoints=True).path.glob("*.safetensors")
            ),
            "precision": metrics["precision"]["compute"],
        },
        chosen.traits.head == "lm",
        {row: group for (_, row), group in measured.rows.groups().items() if row in by_row},
        hashlib.sha256(tokenizer.encode()).hexdigest(),
        task=opened.trained.get("task"),
        shown={row: {"text": row_text(value)[:2000]} for row, value in by_row.items()},
    )


def _is_higher_better(name: str) -> bool | None:
    lower = lower_is_better(name)
    return None if lower is None else not lower


def _answers(
    name: str,
    data: str,
    count: int,
    max_new_tokens: int,
    limit: int | None,
    precision: str,
    folder: Path | None,
) -> list[Answered]:
    """Return the answers of a model to ``count`` prompts of ``data``."""
    loaded = load(name)
    cast_and_move(loaded[0], precision)
    trained = trained_with(name)
    source = source_as_trained(trained, data, prompts.ROWS, {}, {"limit": limit}, prompts=True)
    answers = GreedyAnswers(loaded, chosen_prompts(source, trained, count), max_new_tokens, folder)
    answers.check()
    return [one for block in answers.blocks() for one in block]


def _add_answers(system: System, answers: Sequence[Answered], metrics: Mapping[str, AnswerMetric]) -> None:
    """Add the metrics of generated answers to the figures of a system; row by row, as for its loss."""
    measured = AnswerTerms(metrics)
    measured.add(answers)
    for name, metric in measured.measured.items():
        rows = measured.rows[measured.places(name)].tolist()
        terms = dict(zip(rows, map(tuple, measured.terms(name).tolist()), strict=True))
        better = {"higher": True, "lower": False, "neither": None}[metric.better]
        system.figures[f"answer_{name}"] = Figure(terms, better, metric.of_sums)
    system.answers = {one.row: one for one in answers}


def _decide_by(systems: Sequence[System], names: Sequence[str]) -> None:
    """Let the first of ``names`` that all systems have decide, if there is one."""
    common = [name for name in names if all(name in system.figures for system in systems)]
    for system in systems if common else ():
        system.decides = common[0]


def _drop_losses(systems: Sequence[System]) -> list[str]:
    """Leave out losses per token if the tokenizers differ; return the sentences that say so."""
    if len({system.tokenizer for system in systems}) == 1 or not systems[0].writes_text:
        return []
    for system in systems:
        for name in [name for name in system.figures if name.endswith(("loss", "perplexity"))]:
            del system.figures[name]
        if not system.figures:
            raise UserError(
                "the models have different tokenizers, so their losses per token cannot be compared.\n"
                "  Compare their answers: --generate 50"
            )
        if system.decides not in system.figures:
            system.decides = (
                "answer_rougeL" if "answer_rougeL" in system.figures else next(iter(system.figures))
            )
    return ["the tokenizers differ, so losses per token are left out"]


def _other_labels(systems: Sequence[System]) -> list[str]:
    """Return a sentence if figures are not compared because the systems have other labels."""
    first = systems[0].figures
    names = [
        name
        for name in first
        if any(one.figures.get(name, first[name]).columns != first[name].columns for one in systems)
    ]
    return (
        [f"the labels of the models differ, so {' and '.join(map(label, names))} is not compared"]
        if names
        else []
    )


def _own_figures(system: System) -> JsonObject:
    found = {}
    for name, figure in system.figures.items():
        terms = np.array(list(figure.terms.values()), np.float64)
        clusters = [system.clusters.get(row, row) for row in figure.terms]
        interval = comparison.interval(terms, clusters, figure.of_sums)
        found[name] = (
            asdict(interval) if interval else {"value": float(figure.of_sums(terms.sum(0)[None])[0])}
        )
    return found


def _pair(first: System, second: System) -> JsonObject:
    """Return the difference of every figure that both systems have, over the rows that both have."""
    differences: JsonObject = {}
    for name, after in second.figures.items():
        before = first.figures.get(name)
        rows = sorted(before.terms.keys() & after.terms.keys()) if before else []
        if before is None or len(rows) < 2 or before.columns != after.columns:
            continue
        arrays = tuple(
            np.array([figure.terms[row] for row in rows], np.float64) for figure in (before, after)
        )
        clusters = [first.clusters.get(row, row) for row in rows]
        found = comparison.difference(arrays[0], arrays[1], clusters, after.of_sums)
        if found is not None:
            values = [float(after.of_sums(terms.sum(axis=0)[None])[0]) for terms in arrays]
            differences[name] = {
                **asdict(found), "before": values[0], "after": values[1], "higher_is_better": after.better,
            }  # fmt: skip
    return {
        "first": first.name, "second": second.name, "figures": differences, **_changed_rows(first, second),
    }  # fmt: skip


def _changed_rows(first: System, second: System) -> JsonObject:
    """Return the rows where the deciding figure got better and worse most, with texts and answers."""
    before, after = first.figures.get(first.decides), second.figures.get(first.decides)
    if before is None or after is None:
        return {"better_rows": [], "worse_rows": []}
    rows = sorted(before.terms.keys() & after.terms.keys())
    values = [
        [float(figure.of_sums(np.array([figure.terms[row]], np.float64))[0]) for row in rows]
        for figure in (before, after)
    ]
    gains = np.nan_to_num(np.subtract(values[1], values[0]) * (1 if after.better else -1))
    order = np.argsort(-gains, kind="stable")

    def described(places: np.ndarray) -> list[JsonObject]:
        return [
            {
                "row": rows[place], "before": values[0][place], "after": values[1][place], **first.shown.get(rows[place], {}),
                **_answers_of(first, second, rows[place]),
            }
            for place in places
        ]  # fmt: skip

    return {
        "better_rows": described(order[:SHOWN_ROWS][gains[order[:SHOWN_ROWS]] > 0]),
        "worse_rows": described(order[::-1][:SHOWN_ROWS][gains[order[::-1][:SHOWN_ROWS]] < 0]),
        "rows_better": int((gains > 0).sum()),
        "rows_worse": int((gains < 0).sum()),
    }


def _answers_of(first: System, second: System, row: int) -> JsonObject:
    if row not in first.answers or row not in second.answers:
        return {}
    return {"answers": [first.answers[row].text, second.answers[row].text]}


def _adjust(pairs: Sequence[JsonObject], decides: str) -> None:
    """Adjust the p values in place: the deciding figure's over the pairs, all others together."""
    deciding = [one["figures"][decides] for one in pairs if decides in one["figures"]]
    others = [figure for one in pairs for name, figure in one["figures"].items() if name != decides]
    for family in (deciding, others):
        for figure, adjusted in zip(family, comparison.holm([figure["p"] for figure in family]), strict=True):
            figure["p"] = adjusted
            seen = adjusted < SIGNIFICANT and figure["higher_is_better"] is not None
            figure["better"] = (figure["value"] > 0) == figure["higher_is_better"] if seen else None


def _verdict(pair: JsonObject, decides: str, size: float | None) -> tuple[str, str | None]:
    """Return a sentence on a pair, and the name of the better model if there is one."""
    figure = pair["figures"].get(decides)
    if figure is None:
        return f"{pair['first']} and {pair['second']} have no row in common", None
    change = (
        f"{label(decides)} {number(figure['before'])} -> {number(figure['after'])}, a difference of "
        f"{number(figure['value'])} ({interval_text(figure)}), p = {figure['p']:.2g}, over "
        f"{figure['rows']:,} rows"
    )
    if figure["clusters"] != figure["rows"]:
        change += f" with {figure['clusters']:,} prompts"
    if figure["better"] is None:
        known = Difference(**{key: figure[key] for key in Difference.__dataclass_fields__})
        wanted = size or figure["detectable"] / 2
        needed = (
            f"about {known.rows_for(wanted):,} rows would show a difference of {number(wanted)}"
            if wanted
            else ""
        )
        tail = f"; {needed}" if needed else ""
        return f"no difference between {pair['first']} and {pair['second']} was seen: {change}{tail}", None
    names = pair["second"], pair["first"]
    winner, loser = names if figure["better"] else names[::-1]
    return f"{winner} is better than {loser}: {change}", winner


def save(result: JsonObject, folder: Path) -> Path:
    """Write the result to figures.json in ``folder``; return its path."""
    files.make_folder(folder)
    path = folder / "figures.json"
    files.replace_file(path, json.dumps(result, ensure_ascii=False, indent=1).encode())
    return path
