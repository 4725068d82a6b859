"""Work of several threads: in order, each thread on its own cores, errors after all have ended."""

import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.train.test_forward_batches import refused
from tunesmith.data.batch.pack import PACKED
from tunesmith.data.batch.shared_prompts import Sizes
from tunesmith.models import forward_groups, lanes


@pytest.fixture(autouse=True)
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_run_at_the_same_time_on_one_core_each():
    meeting = threading.Barrier(2, timeout=30)

    def work(index):
        meeting.wait()  # breaks unless both are here
        return index, torch.get_num_threads()

    assert lanes.run(work, [9, 8], 20, 2) == [(0, 1), (1, 1)]
    assert torch.get_num_threads() == 2


def test_those_above_the_budget_run_alone_on_all_cores():
    here = threading.get_ident()
    found = lanes.run(lambda index: (threading.get_ident() == here, torch.get_num_threads()), [15, 9, 8], 20, 2)
    assert found == [(True, 2), (False, 1), (False, 1)]


def test_a_lane_that_is_free_takes_the_next():
    ended, others = [], threading.Event()

    def work(index):
        if index == 0:
            return others.wait(timeout=30)
        ended.append(index)
        if len(ended) == 3:
            others.set()
        return True

    assert all(lanes.run(work, [9, 9, 9, 9], 20, 2))


def test_an_error_is_raised_when_all_have_ended():
    ended = []

    def work(index):
        if index == 0:
            raise ValueError("the first one")
        ended.append(index)

    with pytest.raises(ValueError, match="the first one"):
        lanes.run(work, [9, 8, 7], 20, 2)
    assert 1 in ended


def test_a_forked_process_has_threads_of_its_own():
    lanes.run(lambda index: None, [9, 8], 20, 2)
    child = os.fork()
    if child == 0:
        found = lanes.run(lambda index: index, [9, 8], 20, 2)
        os._exit(0 if found == [0, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_forward_passes_that_do_not_fit_at_the_same_time_run_alone():
    sizes, refusals, meeting = np.array([10, 9, 8, 7]), [], threading.Barrier(2, timeout=30)

    def run(places):
        if threading.current_thread() is not threading.main_thread():
            meeting.wait()
            refusals.append(places)
            raise refused()
        return places

    layout = replace(PACKED, lanes=2)
    found = forward_groups.run_groups(run, Sizes(sizes, np.ones_like(sizes)), 40, layout, torch.device("cpu"), str)
    assert sorted(place for places, _ in found for place in places) == [0, 1, 2, 3]
    assert refusals
