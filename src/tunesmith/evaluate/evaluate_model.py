"""The figures of any model on any file, by the same data path and the same forward pass as training."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tunesmith import files
from tunesmith.data.formats.fields import Columns
from tunesmith.errors import UserError

MISTAKES = 50
"""Rows with the highest loss that a report shows."""


def evaluate(
    model: str | Path | tuple[Any, Any],
    data: str | Path,
    *,
    objective: str | None = None,
    format: str | None = None,
    columns: Columns | None = None,
    separator: str | None = None,
    prompt_template: str | None = None,
    template: str | None = None,
    max_length: int | None = None,
    overlong: str | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    limit: int | None = None,
    precision: str = "auto",
    batch_tokens: int = 2048,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Figures of ``model`` (a name, a folder, or a pair (model, tokenizer)) over the rows of ``data``.

    Returns eval_loss (mean per learnt unit), eval_loss_stderr (with two rows or more), perplexity of a language model, the
    figures of other heads (``objectives.md``) with ``details`` (by class, by entity type), rows, tokens, supervised_tokens,
    tokens_per_second and seconds.
    ``objective`` says what is learnt of a row; None = what the model was trained for, for a language model ``sft`` = the last
    answer (text rows whole); ``cpt`` = every token of a document, long ones in blocks; ``overlong`` is the policy for rows above
    ``max_length`` (default: the objective's own). ``batch_tokens`` bounds memory and never changes the figures.
    ``split``, ``name`` and ``streaming`` are those of a data set of the Hub (``data`` = "hub:OWNER/NAME"), as in a recipe;
    ``out``: a new folder for report.html, figures.json and the worst mistakes, of models that do not write.
    Raises UserError for a model or data that cannot be used.
    """
    from tunesmith.data.data_config import DataConfig, EvalConfig
    from tunesmith.data.store.prepare import prepare
    from tunesmith.evaluate import open_model
    from tunesmith.models.adapters import virtual_tokens
    from tunesmith.train import evaluation
    from tunesmith.train.meta_model import window_of

    source = open_model.source_of(
        data,
        format=format,
        columns=columns,
        separator=separator,
        prompt_template=prompt_template,
        limit=limit,
        split=split,
        name=name,
        streaming=streaming,
    )
    chosen = open_model.open_model(model, objective, overlong, max_length)
    if out is not None:
        _check_out(Path(out), chosen.objective.traits.head)
    config = DataConfig(train=[source], eval=EvalConfig(fraction=0.0), template=template, bad_rows=bad_rows)
    window = window_of(chosen.network.config, virtual_tokens.count(chosen.network))
    prepared = prepare(
        config, chosen.objective, chosen.tokenizer, max_length=max_length, window=window, seed=0
    )
    rows, left_out = prepared.train, sum(one.rows_rejected for one in prepared.report.sources)

    order = sorted(range(len(rows)), key=lambda row: rows.lengths[row])
    way = chosen.ready(precision, [rows[row] for row in order[:2]], rows.longest)
    started = time.perf_counter()
    records = evaluation.records(
        chosen.network, chosen.objective, rows, way.layout, batch_tokens, chosen.device
    )
    figures = chosen.objective.summarise(records)
    seconds = time.perf_counter() - started
    way.disable(chosen.network)
    found = {
        **figures,
        "objective": chosen.name,
        "rows": len(rows),
        **({"bad_rows": left_out} if left_out else {}),
        "tokens": int(rows.lengths.sum()),
        "supervised_tokens": int(rows.supervised.sum()),
        "tokens_per_second": float(rows.lengths.sum()) / seconds,
        "seconds": seconds,
    }
    if chosen.objective.traits.head == "lm":
        return found
    answers = chosen.objective.answers(records)
    found["details"] = chosen.objective.details(records)
    if out is not None:
        found["report"] = str(
            _report(
                Path(out), str(model) if chosen.own else "a model in memory", found, answers, source, chosen
            )
        )
    return found


def _check_out(folder: Path, head: str) -> None:
    if head == "lm":
        raise UserError(
            "--out makes a report of a model that classifies, tags or finds answers; this one writes text. Leave it out."
        )
    if folder.exists():
        raise UserError(f"{folder} exists already: name a new folder with --out, or remove it")
    files.make_folder(folder.parent)  # what cannot be written is said before the work


def _report(
    folder: Path,
    title: str,
    found: dict[str, Any],
    answers: Sequence[dict[str, Any]],
    source: Any,
    chosen: Any,
) -> Path:
    """report.html, figures.json and mistakes.jsonl in ``folder``."""
    from tunesmith.report import task_page

    worst = sorted((one for one in answers if one["loss"] is not None), key=lambda one: -one["loss"])
    wrong = [one for one in worst if not one.get("right", one["prediction"] == one["gold"])][:MISTAKES]
    texts = _rows_of(source, {one["row"][1] for one in wrong}, chosen.objective.traits.rows)
    mistakes = []
    for one in wrong:
        row = texts[one["row"][1]]
        shown = {**_words(row), **_places(row, one), **one, **_judged(row, one)}
        mistakes.append({"where": f"{source.label}:{one['row'][1]}", **shown})
    files.make_folder(folder)
    (folder / "figures.json").write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in mistakes)
    (folder / "mistakes.jsonl").write_text(lines, encoding="utf-8")
    facts = {
        "command": shlex.join(sys.argv),
        "notes": [
            *chosen.objective.notes,
            *([f"{bad} bad rows were left out"] if (bad := found.get("bad_rows")) else []),
        ],
        "data": source.label,
        "objective": chosen.name,
        **{key: found[key] for key in ("rows", "tokens", "tokens_per_second")},
    }
    measured = {**found["details"], "loss": found["eval_loss"]}
    return task_page.write(folder, title, measured, mistakes, facts)


def _rows_of(source: Any, numbers: set[int], accepted: tuple[type, ...]) -> dict[int, Any]:
    """The rows of a source with these numbers."""
    from tunesmith.data.read.source import open_source

    found: dict[int, Any] = {}
    for item in open_source(source, accepted).rows():
        if isinstance(item, tuple) and item[0].row in numbers:
            found[item[0].row] = item[1]
    return found


def _words(row: Any) -> dict[str, str]:
    """What a person reads of a row."""
    names = {"text": "text", "text_pair": "text_pair", "question": "question", "context": "text"}
    return {shown: value for name, shown in names.items() if (value := getattr(row, name, None)) is not None}


def _judged(row: Any, answer: dict[str, Any]) -> dict[str, Any]:
    """Of judged answers: the prompt, the best one as ``gold`` and the one with the highest reward as ``prediction``."""
    from tunesmith.data.rows import Ranking

    if not isinstance(row, Ranking):
        return {}
    rewards = answer["prediction"]
    best, said = row.ranks.index(min(row.ranks)), rewards.index(max(rewards))
    texts = [f"[{reward:.3f}] {_said(one)}" for reward, one in zip(rewards, row.answers, strict=True)]
    return {"text": _said(row.prompt), "gold": texts[best], "prediction": texts[said], "rewards": rewards}


def _said(turns: Any) -> str:
    """Turns as a person reads them: of several each under its role."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _places(row: Any, answer: dict[str, Any]) -> dict[str, Any]:
    """Where in the text the true and the predicted entities or answers are: ``gold_spans`` and ``predicted_spans``."""
    from tunesmith.data.rows import Question, Tagged
    from tunesmith.metrics import entities

    both = {
        "gold_spans": answer["gold"] or [],
        "predicted_spans": answer["prediction"],
    }  # gold is None where a word has no tag
    if isinstance(row, Tagged) and entities.scheme_of([tag for tags in both.values() for tag in tags]):
        return {
            name: [
                {"type": kind, "start": row.words[first][0], "end": row.words[end - 1][1]}
                for kind, first, end in entities.spans(tags)
            ]
            for name, tags in both.items()
        }
    if isinstance(row, Question):
        said = [] if answer["start"] is None else [{"start": answer["start"], "end": answer["end"]}]
        gold = [{"start": start, "end": start + len(text)} for text, start in row.answers or ()]
        return {"gold_spans": gold, "predicted_spans": said}
    return {}
