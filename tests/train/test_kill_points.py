"""A process is killed at every kind of operation on its run folder. The resumed run equals the undisturbed one bit for bit."""

import os
import random
import shutil
import signal

import pytest
import torch

from tests import kill_points
from tunesmith.train import checkpoint


@pytest.mark.parametrize("number", [8, pytest.param(300, marks=pytest.mark.long)])
def test_killed_at_any_point_and_resumed(number, tmp_path):
    found = kill_points.run(number, tmp_path)
    assert found["lost"] == []
    assert found["exact"] + found["refused"] == number and found["refused"] <= max(1, number / 10)
    kinds = {"open", "fsync", "rename"} if number > 8 else {"open"}
    assert sum(found["killed_before"].values()) == number and kinds < set(found["killed_before"])


def test_points_are_at_even_distances_and_some_cut_a_write():
    points = kill_points.points(600, 300)
    assert [point.number for point in points] == list(range(1, 601, 2))
    assert sum(point.limit is not None for point in points) == 60


def test_a_fork_reports_how_it_ended():
    assert kill_points.in_fork(lambda: {"a": 1}) == (0, {"a": 1})
    assert kill_points.in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL)) == (-signal.SIGKILL, None)
    assert kill_points.in_fork(lambda: [][0]) == (1, "IndexError: list index out of range")


def test_a_run_that_differs_is_found(tmp_path):
    made = kill_points.recipe(tmp_path)
    _, operations = kill_points.in_fork(lambda: kill_points.train(made, tmp_path / "a" / "run"))
    straight = kill_points.summary(tmp_path / "a" / "run")
    straight["records"][-1]["loss"] = 0.0
    assert (
        kill_points.outcome(made, straight, tmp_path / "b" / "run", kill_points.Point(len(operations) // 2))
        == "lost: records differ"
    )


@pytest.mark.parametrize("number", [48, pytest.param(500, marks=pytest.mark.long)])
def test_every_flipped_bit_of_a_checkpoint_is_found_or_harmless(number, tmp_path):
    """Harmless: the checkpoint verifies, and what is loaded from it is the same."""
    tensors = {"master.w": torch.randn(40, 30), "random.cpu": torch.get_rng_state()}
    state = {"progression": {"step": 5}, "learning_rates": [0.1], "base": {"template": "{{ x }}\n"}}
    good = checkpoint.save(tmp_path, 5, tensors, state)
    drawn = random.Random(number)
    found = harmless = 0
    for _ in range(number):
        name = drawn.choice([*checkpoint.FILES, "manifest.json"])
        content = bytearray((good / name).read_bytes())
        place = drawn.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        flipped = tmp_path / "flipped" / "step-5"
        shutil.copytree(good, flipped)
        (flipped / name).write_bytes(content)
        step, damaged = checkpoint.newest(flipped.parent)
        if step is None:
            assert list(damaged) == [5] and damaged[5]
            found += 1
        else:
            loaded, loaded_state = checkpoint.load(flipped.parent, step)
            assert name == "manifest.json" and loaded_state == state and all(loaded[key].equal(tensors[key]) for key in tensors)
            harmless += 1
        shutil.rmtree(flipped)
    assert found + harmless == number and found > 0.8 * number
