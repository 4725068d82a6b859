"""Forward passes at the same time on one CPU, each on its own cores.

Between two products all cores wait for the slowest, and passes over few numbers do not become faster with more cores. Where
each core has tokens of its own, none waits: SmolLM2-135M with LoRA learns a quarter to a third more tokens a second from two
micro-batches of 512 tokens at the same time, on one core each, than from one of 1,024 on both.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from tunesmith.data.batch import lane_groups

Result = TypeVar("Result")

LANES = 2
"""Most passes at the same time: more would have too few tokens each for products at the full rate."""
LEAST_TOKENS, LEAST_WORK = 64, 10**9
"""Smallest share of a pass: tokens, and tokens times weights. Below, Python between the products takes most of the time, and two
threads share it."""


def number(device: torch.device) -> int:
    """Return how many passes may run at the same time."""
    return min(LANES, torch.get_num_threads()) if device.type == "cpu" else 1


def least_tokens(weights: int) -> int:
    """Return the fewest tokens that are worth a pass of their own, in a network of that many weights."""
    return max(LEAST_TOKENS, -(-LEAST_WORK // weights))


def run(work: Callable[[int, int], Result], tokens: Sequence[int], budget: int, number: int) -> list[Result]:
    """Return ``work(index, lane)`` of each micro-batch; at most ``number`` run at the same time.

    ``tokens`` of each, in descending order where ``number`` is above 1. Micro-batches that have more than ``budget`` tokens
    together with those after them run alone, on all cores and lane 0. The lane of each depends on the tokens alone. Raises the
    first error, when all lanes have ended.
    """
    alone = lane_groups.count_alone(tokens, budget, number)
    results = {index: work(index, 0) for index in range(alone)}
    if alone < len(tokens):
        threads = _threads(os.getpid(), number, torch.get_num_threads())
        shares = lane_groups.shared_out(tokens[alone:], number)

        def run_lane(lane: int) -> None:
            for index in shares[lane]:
                results[alone + index] = work(alone + index, lane)

        lanes = [threads.submit(run_lane, lane) for lane in range(number)]
        wait(lanes)
        for lane in lanes:
            lane.result()
    return [results[index] for index in range(len(tokens))]


@functools.lru_cache(maxsize=1)
def _threads(process: int, number: int, cores: int) -> ThreadPoolExecutor:
    """Return ``number`` threads with ``cores`` together. A forked ``process`` has none of its parent's."""
    return ThreadPoolExecutor(number, "lane", _use_cores, (max(1, cores // number),))


def _use_cores(cores: int) -> None:
    torch.get_num_threads()  # torch initialises the number of a thread at its first use
    torch.set_num_threads(cores)
