"""Plots of a run that learns from sampled answers: the figures of its iterations and the time of each phase."""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.json_types import JsonObject
from tunesmith.report.curves import Curve, Plot, Points, plot
from tunesmith.report.language import t
from tunesmith.report.pages import duration, heading
from tunesmith.runs import figure_format
from tunesmith.runs.figure_format import is_number
from tunesmith.runs.metrics_file import TIMING_KEYS

UPDATE = "update"
PHASES = {"rollout": "sampling", "scoring": "scoring", "logps": "log-probabilities", UPDATE: "update"}
"""``NAME_seconds`` of a record -> the name of the phase."""

NOT_FIGURES = {"kind", "step", "epoch", "iteration"}
OF_UPDATES = ("kl", "approx_kl", "ratio", "clip_fraction", "policy_loss", "value_loss")
"""Figures of optimiser steps, where a run has them."""


def rollout_plots(
    rollouts: list[JsonObject],
    train: list[JsonObject],
    evals: list[JsonObject],
    points: Callable[[list[JsonObject], str], Points],
) -> list[Plot | None]:
    """Return a plot of each figure of the iterations, with the same figure of evaluations; none without
    ``rollouts``. ``points``: the (step, value) of a figure in records."""
    if not rollouts:
        return []
    logged = dict.fromkeys(name for record in rollouts for name in record if is_number(record[name]))
    names = [name for name in logged if name not in NOT_FIGURES | TIMING_KEYS]

    def by_phase(unit: str) -> list[Curve]:
        return [
            Curve.of_set(t(label), points(train if phase == UPDATE else rollouts, f"{phase}_{unit}"), number)
            for number, (phase, label) in enumerate(PHASES.items())
        ]

    return [
        *(
            plot(
                heading(name),
                [
                    Curve(t("train"), points(rollouts, name), "train"),
                    Curve(t("eval"), points(evals, f"eval_{name}"), "eval"),
                ],
            )
            for name in names
        ),
        *(plot(heading(name), [Curve(t("train"), points(train, name), "train")]) for name in OF_UPDATES),
        plot(t("Seconds by phase"), by_phase("seconds"), duration, from_zero=True, is_smoothed=False),
        plot(
            t("Tokens per second by phase"),
            by_phase("tokens_per_second"),
            figure_format.count,
            is_smoothed=False,
            is_log=True,
        ),
    ]
