"""A long run takes no more memory than a short one."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

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
