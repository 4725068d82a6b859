"""The benchmark that needs a GPU: that both sides of it run here on a tiny model, from the same rows to like losses."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmark_gpu", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_without_a_gpu_it_says_what_to_do(gpu, monkeypatch):
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
