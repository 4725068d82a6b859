"""Memory of preparation: a few dozen bytes a row, whatever the rows hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FEW, MANY = 5_000, 50_000

BOUND = 100
"""Bytes of peak memory a row: about 60 of numbers that stay or pass, the rest is what the allocator rounds up."""

PROGRAM = """
import json, re, sys
from pathlib import Path
from tests.tiny import tiny_tokenizer
from tests.data.test_prepare import run
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
def write(path, rows):
    with open(path, "w") as file:
        for n in range(rows):
            text = f"line {n // 250} and {n % 250} of the quick brown fox " + "again " * (n % 10)
            file.write(json.dumps({"text": text}) + "\\n")
folder, rows = Path(sys.argv[1]), int(sys.argv[2])
write(folder / "warm.jsonl", 2000)
write(folder / "rows.jsonl", rows)
run(folder / "warm.jsonl")
before = peak()
prepared = run(folder / "rows.jsonl", eval={"fraction": 0.01})
assert len(prepared.train) + len(prepared.eval) == rows
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_grows_by_a_few_dozen_bytes_a_row(tmp_path):
    def growth(rows):
        folder = tmp_path / str(rows)
        folder.mkdir()
        env = os.environ | {"TUNESMITH_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(folder), str(rows)], cwd=root, env=env, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    few, many = growth(FEW), growth(MANY)
    assert many - few < BOUND * (MANY - FEW)
