"""Memory of preparation: a few dozen bytes a row, whatever the rows hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WARM, FEW, MANY = 2_000, 5_000, 50_000

BOUND = 110
"""Bytes of peak memory a row: about 70 of numbers that stay or pass, the rest is what the allocator rounds up."""

PROGRAM = """
import json, re, sys
from pathlib import Path
from tests.tiny import tiny_tokenizer
from tests.data.test_prepare import run
def peak(folder, rows):
    path = folder / f"{rows}.jsonl"
    with open(path, "w") as file:
        for n in range(rows):
            file.write(json.dumps({"text": f"{n // 250} {n % 250} fox " + "again " * (n % 3)}) + "\\n")
    prepared = run(path, eval={"fraction": 0.01})
    assert len(prepared.train) + len(prepared.eval) == rows
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(*(peak(Path(sys.argv[1]), int(rows)) for rows in sys.argv[2:]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_grows_by_a_few_dozen_bytes_a_row(tmp_path):
    """One process prepares a few rows, then many: the peak grows by less than ``BOUND`` for each further row."""
    env = os.environ | {"TUNESMITH_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *map(str, (WARM, FEW, MANY))]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    _, few, many = map(int, done.stdout.split())
    assert many - few < BOUND * (MANY - FEW)
