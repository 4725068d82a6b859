"""A long run takes no more memory than a short one."""

import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tunesmith
from tests import processes, runs
from tunesmith.runs import metrics_file

STEPS, SETTLED = 300, 50


@pytest.mark.long
def test_memory_stays_level_over_three_hundred_steps(tmp_path: Path) -> None:
    """Below 0.1 MB a step, by least squares after the caches are full. Each step has other rows, so another shape."""
    made = runs.recipe(tmp_path, adaptation="lora", count=301, max_steps=STEPS, logging_steps=1)
    (tmp_path / "recipe.json").write_text(json.dumps(made))
    code = f"import json, tunesmith; tunesmith.train(json.load(open('recipe.json')), out={str(tmp_path / 'run')!r})"
    done = processes.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    logs = [one for one in metrics_file.read(tmp_path / "run" / "metrics.jsonl") if one["kind"] == "train"]
    memory = [one["memory_bytes"] / 1e6 for one in logs]
    assert len(memory) == STEPS
    assert np.polyfit(range(SETTLED, STEPS), memory[SETTLED:], 1)[0] < 0.1


@pytest.mark.long
def test_a_step_leaves_no_tensor_in_a_cycle(tmp_path: Path) -> None:
    """The program looks for cycles rarely (``cli.garbage_collection``), so they must hold no memory."""
    found: list[list[tuple[int, ...]]] = []

    def collect(record: object) -> None:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.append([tuple(one.shape) for one in gc.garbage if isinstance(one, torch.Tensor)])
        gc.set_debug(0)
        gc.garbage.clear()
        gc.collect()  # what was listed is garbage still

    gc.disable()
    try:
        tunesmith.train(runs.recipe(tmp_path, adaptation="lora", logging_steps=1), out=tmp_path / "run", on_log=collect)
    finally:
        gc.enable()
    assert found[1:] == [[], [], []]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the high-water mark of the whole process")
def test_the_peak_of_a_run_is_its_own_whatever_the_process_held_before(tmp_path: Path) -> None:
    for name in ("imports", "measured"):
        np.ones(300_000_000, np.uint8)
        result = tunesmith.train(runs.recipe(tmp_path, adaptation="full", max_steps=1), out=tmp_path / name)
    needed = 4 * 4 * result["total_parameters"]  # weights, gradients and the two states of AdamW
    assert needed < result["peak_memory_bytes"] < 300_000_000
