"""The benchmark that needs a GPU runs here on a tiny model; the one that compares two versions finds what differs."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.matrix.cells import ADAPTATIONS, OBJECTIVES

FOLDER = Path(__file__).parent.parent / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu():
    return script("gpu")


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setenv("TUNESMITH_HOME", "")  # put back afterwards: the script sets its own
    return script("recorded")


def test_both_sides_learn_the_same_from_the_same_rows(gpu):
    about = gpu.main(["--tiny", "--adaptation", "full"])
    (result,) = about["results"]
    ours, theirs = result["runs"]
    assert (ours["who"], theirs["who"]) == ("tunesmith", "Trainer") and "failed" not in ours and "failed" not in theirs
    assert ours["tokens"] == theirs["tokens"]
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=0.01)  # rows of a step differ: Trainer groups by length
    assert ours["eval_loss"] < 6.24 < 6.3  # ln 512
    assert ours["route"]["attention"] == "segments"
    for run in (ours, theirs):
        assert run["tokens_per_second"] > 0 and run["peak_memory_bytes"] > 0 and run["share_of_product_rate"] > 0
    assert result["ratio"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])


def test_without_a_gpu_the_message_names_what_to_do(gpu, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here: --tiny"):
        gpu.main([])


def test_the_products_of_a_row_are_those_of_its_shape(gpu):
    """Two layers of width 64: 4 hidden^2 (half for grouped keys and values) and 3 hidden x 128, 6 operations a weight."""
    import argparse

    rows = [{"input_ids": [5] * 10, "supervised": [False] * 6 + [True] * 4}]
    options = argparse.Namespace(shape="tiny", adaptation="full")
    body, head, attention = 2 * (3 * 64 * 64 + 3 * 64 * 128), 64 * 512, 3 * 4 * 2 * 64 * 50
    assert gpu.products(options, rows) == pytest.approx((6 * (body * 10 + head * 4) + attention) / 10)


def test_compiling_doubles_the_sides(gpu):
    import argparse

    options = argparse.Namespace(compile=True, peer_batch=[8, 32], peer_attention="sdpa", micro_batch_tokens="auto")
    assert [side["compile"] for side in gpu.sides(options)] == [False] * 3 + [True] * 3


def test_every_objective_and_every_adaptation_is_recorded(recorded):
    assert {case[1]["type"] for case in recorded.CASES.values()} == set(OBJECTIVES)
    assert {case[2]["type"] for case in recorded.CASES.values()} == set(ADAPTATIONS)


def test_a_record_repeats_and_its_first_difference_is_named(recorded, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recorded, "CASES", {"tag-features": recorded.CASES["tag-features"]})
    for name in ("before", "after"):
        recorded.record(tmp_path / name)
    assert recorded.compare(tmp_path / "before", tmp_path / "after")
    assert capsys.readouterr().out == "tag-features: same\n"
    file = tmp_path / "after" / "tag-features.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    assert facts["interrupted"] == facts["straight"]
    loss = facts["interrupted"]["metrics"][2]["loss"]
    facts["interrupted"]["metrics"][2]["loss"] += 1e-12
    file.write_text(json.dumps(facts), encoding="utf-8")
    assert not recorded.compare(tmp_path / "before", tmp_path / "after")
    said = capsys.readouterr().out
    assert "keys differ, first interrupted.metrics.2.loss" in said and f"  {loss} -> " in said


def test_a_case_that_one_record_lacks_is_a_difference(recorded, tmp_path, capsys):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    recorded.write(tmp_path / "before" / "sft.json", {"straight": {"samples": []}})
    assert not recorded.compare(tmp_path / "before", tmp_path / "after")
    assert "sft: 1 of 1 keys differ, first straight.samples\n  [] -> absent" in capsys.readouterr().out


def test_a_record_goes_into_an_empty_folder(recorded, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="is not empty; expected a new folder"):
        recorded.record(tmp_path)
    with pytest.raises(SystemExit, match="no record in"):
        recorded.compare(tmp_path, tmp_path)


def test_the_flops_of_a_run_are_its_products_with_weights(tmp_path):
    """Forward and gradient of the input take the same; a full run adds the gradient of the weights, a reference one forward."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from tests.tiny import save_tiny

    folder, rates = save_tiny("llama", tmp_path / "model"), script("rates")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, 10, dtype=torch.int64), logits_to_keep=4)
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    forward = counts["aten.mm"]
    assert rates.training_flops(folder, 10, 4, full=False) == 2 * forward
    assert rates.training_flops(folder, 10, 4, full=True, reference=True) == 4 * forward
    measured = {"matmul_flops": 8.0 * forward}
    assert rates.share(measured, 2 * forward, seconds=0.5) == 0.5
