"""The report of a run that samples has a plot of each figure of its iterations, and of the time of its phases."""

import io
import json

from rich.console import Console

from tunesmith.report import run_page
from tunesmith.runs.progress import Progress

TIMES = {
    "rollout_seconds": 3.0, "scoring_seconds": 0.1, "logps_seconds": 0.4,
    "rollout_tokens_per_second": 90.0, "scoring_tokens_per_second": 2700.0, "logps_tokens_per_second": 675.0,
}  # fmt: skip


def rollout(step, reward):
    known = {
        "kind": "rollout",
        "step": step,
        "epoch": 0.5,
        "iteration": step,
        "reward": reward,
        "reward/length": -2.0,
        "stopped": 0.5,
    }
    return {**known, **TIMES}


def update(step):
    figures = {"loss": 0.1, "ratio": 1.0, "clip_fraction": 0.0, "value_loss": 0.2, "approx_kl": 0.01}
    return {
        "kind": "train", "step": step, "epoch": 0.5, **figures, "update_seconds": 1.5, "update_tokens_per_second": 400.0,
    }  # fmt: skip


def plots(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return {plot.title: plot for plot in run_page.page_values(run_page._read(folder))["small_plots"]}


def test_each_figure_of_the_iterations_is_plotted_with_that_of_evaluations(tmp_path):
    evals = [{"kind": "eval", "step": 0, "eval_reward": -3.0}, {"kind": "eval", "step": 2, "eval_reward": -1.0}]
    found = plots(tmp_path, [evals[0], rollout(1, -3.5), update(1), rollout(2, -1.5), update(2), evals[1]])
    assert {"Reward", "Reward/length", "Stopped", "Ratio", "Clip fraction", "Value loss", "Seconds by phase"} <= found.keys()
    assert "Iteration" not in found and "Epoch" not in found and "Held-out figures" not in found
    assert found["Reward"].alt == "Reward by step: train from -3.5 to -1.5; eval from -3 to -1"
    assert "update from 400 to 400" in found["Tokens per second by phase"].alt
    assert found["Tokens per second by phase"].alt.count("from") == 4
    assert found["Seconds by phase"].alt.count("from") == 4 and "update from 1.5 s to 1.5 s" in found["Seconds by phase"].alt


def test_other_runs_have_none_of_them(tmp_path):
    assert not {"Reward", "Seconds by phase"} & plots(tmp_path, [{**update(1), "ratio": None}]).keys()


def test_the_terminal_names_the_iteration_and_its_figures():
    out = io.StringIO()
    progress = Progress(Console(file=out, width=200))
    progress.start(0, 4)
    progress.rollout(rollout(2, -1.5))
    assert out.getvalue() == "iteration 2  step 2/4  reward -1.5  reward/length -2  stopped 0.5  in 3.0 s\n"
