"""Memory of ``evaluate --generate`` does not depend on the number of rows.

Twenty rows fill 20 of the 64 slots of the engine's cache and no block of answers; more rows fill both, which is a few MB of the
allowance. What grew with the rows was the bootstrap of an interval, which held a hundred draws of all rows at once, and the n-grams of
the copied prompts, which no figure needs."""

from __future__ import annotations

import json
import sys

import pytest

from tests import processes
from tests.tiny import save_tiny

MEASURE = """
import json, sys, threading, time
import tunesmith
from tunesmith import machine
model, few, many, rows = sys.argv[1:]

def peak(data, count):
    most, done = [0], threading.Event()
    def watch():
        while not done.is_set():
            most[0] = max(most[0], machine.memory_bytes())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    tunesmith.evaluate(model, data, generate=count, max_new_tokens=2, precision="fp32", answer_metrics=["token_f1", "bleu", "length"])
    done.set()
    thread.join()
    return most[0]

peak(few, 20)  # what a library allocates once
print(json.dumps([peak(few, 20), peak(many, int(rows))]))
"""


def grows_by(tmp_path, count):
    """The share by which ``count`` prompts of 2,000 characters need more memory than 20."""
    model = save_tiny("llama", tmp_path / "model", max_position_embeddings=1024)
    for name, rows in (("few", 20), ("many", count)):
        lines = (
            json.dumps({"prompt": f"question {row}: " + "what is the " * 30, "completion": f"x {row}"}) for row in range(rows)
        )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    words = [str(model), str(tmp_path / "few.jsonl"), str(tmp_path / "many.jsonl"), str(count)]
    done = processes.run([sys.executable, "-c", MEASURE, *words], check=True)
    few, many = json.loads(done.stdout.splitlines()[-1])
    return many / few - 1


def test_six_hundred_rows_need_as_much_memory_as_twenty(tmp_path):
    assert grows_by(tmp_path, 600) < 0.05


@pytest.mark.long
def test_two_thousand_rows_need_as_much_memory_as_twenty(tmp_path):
    assert grows_by(tmp_path, 2000) < 0.05
