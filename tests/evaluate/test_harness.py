"""Tasks of lm-evaluation-harness on a loaded model, offline, by task files."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import tunesmith
from tests.runs import recipe
from tunesmith.cli.main import main
from tunesmith.errors import MissingExtra

CHOICES = ["Paris", "a lazy dog", "0123"]
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


def test_without_the_package_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", "any", "--harness", "hellaswag"]) == 2
    assert "pip install 'tunesmith[harness]'" in capsys.readouterr().err
    assert MissingExtra("a", "b", "c").exit_code == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["--harness", "arc", "--data", "rows.json"], "--data does nothing with --harness"),
        ([], "there is nothing to evaluate on"),
        (["--harness-folder", "x", "--data", "rows.json"], "--harness-folder needs --harness TASK"),
    ],
)
def test_options_that_do_nothing_are_refused(words, message, capsys):
    assert main(["evaluate", "any", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A LoRA on a tiny model, and a task file with its rows."""
    folder = tmp_path_factory.mktemp("harness")
    tunesmith.train(recipe(folder, adaptation={"type": "lora", "r": 4}, count=12, max_steps=6), out=folder / "run")
    rows = [{"question": f"question {number}:", "choices": CHOICES, "gold": number % 3} for number in range(12)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(TASK.format(rows=folder / "mine.jsonl"))
    return folder, rows


def test_a_task_file_measures_an_adapter_without_a_second_base(adapted, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    from tunesmith.evaluate import harness
    from tunesmith.models.generate.engine import fingerprint

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    folder, rows = adapted
    network, tokenizer = tunesmith.load(folder / "run", dtype=torch.float32)
    before = fingerprint(network)
    opened, open_it = [], harness._open
    monkeypatch.setattr(harness, "_open", lambda *given: opened.append(open_it(*given)) or opened[0])
    found = harness.evaluate_harness((network, tokenizer), [str(folder / "mine.yaml")])["tasks"]["mine"]
    assert opened[0].model is network and fingerprint(network) == before
    right = 0
    for row in rows:
        sums = []
        for choice in row["choices"]:
            ids = tokenizer(row["question"] + " " + choice)["input_ids"]
            start = len(tokenizer(row["question"])["input_ids"])
            logps = network(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids))))
        right += max(range(3), key=sums.__getitem__) == row["gold"]
    assert found["rows"] == 12 and found["figures"]["acc"]["value"] == pytest.approx(right / 12)


def test_what_the_harness_does_not_have_is_refused(adapted, capsys):
    pytest.importorskip("lm_eval")
    run = str(adapted[0] / "run")
    for name, words in [("hellaswga", "Did you mean `hellaswag`"), ("no.yaml", "there is no such file")]:
        assert main(["evaluate", run, "--harness", name]) == 2
        assert words in capsys.readouterr().err
