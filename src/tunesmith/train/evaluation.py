"""The objective's figures over held-out rows, the same for any memory budget and any number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from tunesmith.data.batch.pack import Layout, to_device
from tunesmith.data.batch.step import Step
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.errors import RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.objectives import Objective, Session, TaskHead, Traits
from tunesmith.runs import assessment
from tunesmith.runs.figure_format import figure_names, lower_is_better
from tunesmith.suggestions import did_you_mean
from tunesmith.train import distributed, forward_batches
from tunesmith.train.held_out_answers import AnswerEvaluation
from tunesmith.train.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def deciding_figure(train: TrainConfig, traits: Traits) -> tuple[str, str]:
    """Return the figure that chooses the best model, and the direction of its better values: min or max."""
    name = train.best_figure
    return traits.best if name is None else (name, "min" if lower_is_better(name) else "max")


def check_reported(name: str, figures: Mapping[str, float]) -> None:
    """Raise RecipeError if an evaluation does not report the figure that the recipe names."""
    if name not in figures:
        wanted, *reported = (key.removeprefix("eval_") for key in (name, *figure_names([figures], ())))
        raise RecipeError(
            f"train.metric_for_best_model: these rows have no figure {wanted!r}. {did_you_mean(wanted, reported)}"
        )


def measure(
    model: PreTrainedModel,
    objective: Objective,
    data: Encoded,
    layout: Layout,
    budget: int,
    device: torch.device,
    sets: Sequence[str] = (),
    choose_threshold: bool = False,
    session: Session | None = None,
) -> tuple[dict[str, float], list[JsonObject]]:
    """Return the objective's figures over all of ``data``, and its records.

    ``sets``: names of the sources of ``data``. Each also gets its own figures (``eval_loss`` ->
    ``eval_NAME_loss``), equal to those of a run with this set alone, because its rows share no micro-batch
    with another set. ``choose_threshold``: let a task head choose its thresholds on these rows. ``session``:
    of the run, for an objective that samples answers.
    """
    parts = [np.flatnonzero(data.source == index) for index in range(len(sets))] or [np.arange(len(data))]
    by_part = [records(model, objective, data, layout, budget, device, rows, session) for rows in parts]
    everything = [record for part in by_part for record in part]
    if choose_threshold and isinstance(objective, TaskHead):
        objective.choose_threshold(everything)
    figures = objective.summarise(everything)
    for name, part in zip(sets, by_part):
        for key, value in objective.summarise(part).items():
            figures[f"eval_{name}_{key.removeprefix('eval_')}"] = value
    return figures, everything


def measured(
    objective: Objective,
    records: Sequence[JsonObject],
    data: Encoded,
    step: int | None = None,
    answers: AnswerEvaluation | None = None,
) -> JsonObject:
    """Return the facts of an evaluation of ``data`` that ``runs.assessment`` needs.

    ``records``: those of the evaluation. ``answers``: of a run with ``data.eval.generate``."""
    figures = objective.row_figures(records)
    baselines = {name: vars(one) for name, one in objective.baselines(records).items()}
    if answers is not None:
        figures, baselines = figures | answers.row_figures(), baselines | answers.baselines()
    return assessment.measured(step, figures, baselines, objective.remarks(records), data.groups())


def records(
    model: PreTrainedModel,
    objective: Objective,
    data: Encoded,
    layout: Layout,
    budget: int,
    device: torch.device,
    rows: np.ndarray | None = None,
    session: Session | None = None,
) -> list[JsonObject]:
    """Return the objective's record of each micro-batch of ``rows`` (default: all), from all processes.

    An objective that samples answers has a record for each row, and needs a ``session``."""
    model.eval()
    step = Step(0, data, np.arange(len(data)) if rows is None else rows, objective.collate)
    if session is not None and objective.traits.samples:
        return objective.sample_records(session, step)
    if objective.traits.shares_beginnings and layout.shared:
        step = step.sharing_beginnings()

    @torch.no_grad()
    def run(places: Sequence[int]) -> JsonObject:
        return objective.evaluate(model, to_device(step.collate(step.examples(places), layout), device))

    results = forward_batches.run_step(run, step, budget, layout, device, "evaluation")
    return distributed.gather([record for _, record in results])
