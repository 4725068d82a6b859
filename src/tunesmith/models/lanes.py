"""Forward passes at the same time on one CPU, each on its own cores.

Between two products all cores wait for the slowest, and passes over few numbers do not become faster with more cores. Where
each core has tokens of its own, none waits. SmolLM2-135M learns a fifth more tokens a second in fp32 from two micro-batches at
the same time, on one core each, than from one micro-batch on both cores.
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
MOST_TRAINED = 250_000_000
"""Most trained weights. Lanes keep no sums of gradients of their own, but larger networks have not been measured."""
LEAST_TOKENS, LEAST_WORK = 64, 10**9
"""Smallest share of a pass: tokens, and tokens times weights. Below, Python between the products takes most of the time, and two
threads share it."""


def number(device: torch.device, trained: int) -> int:
    """Return how many passes may run at the same time, in a network of so many ``trained`` weights."""
    return min(LANES, torch.get_num_threads()) if device.type == "cpu" and trained <= MOST_TRAINED else 1


def least_tokens(weights: int) -> int:
    """Return the fewest tokens that are worth a pass of their own, in a network of that many weights."""
    return max(LEAST_TOKENS, -(-LEAST_WORK // weights))


def in_threads(work: Callable[[int], Result], number: int) -> list[Result]:
    """Return ``work(lane)`` of each of ``number`` lanes, which run at the same time and share the cores.

    Raises the error of the first lane that failed, when all have ended.
    """
    threads = _threads(os.getpid(), number, torch.get_num_threads())
    lanes = [threads.submit(work, lane) for lane in range(number)]
    wait(lanes)
    return [lane.result() for lane in lanes]


def run(work: Callable[[int], Result], tokens: Sequence[int], budget: int, number: int) -> list[Result]:
    """Return ``work(index)`` of each micro-batch; at most ``number`` run at the same time.

    ``tokens`` of each, in descending order where ``number`` is above 1. Micro-batches that have more than ``budget`` tokens
    together with those after them run alone, on all cores.
    """
    alone = lane_groups.count_alone(tokens, budget, number)
    results = {index: work(index) for index in range(alone)}
    if alone < len(tokens):
        # a lane that is free takes the next one: cores are not equally fast
        waiting = iter(range(alone, len(tokens)))
        for found in in_threads(lambda lane: {index: work(index) for index in waiting}, number):
            results |= found
    return [results[index] for index in range(len(tokens))]


@functools.lru_cache(maxsize=1)
def _threads(process: int, number: int, cores: int) -> ThreadPoolExecutor:
    """Return ``number`` threads with ``cores`` together. A forked ``process`` has none of its parent's."""
    return ThreadPoolExecutor(number, "lane", _use_cores, (max(1, cores // number),))


def _use_cores(cores: int) -> None:
    torch.get_num_threads()  # torch initialises the number of a thread at its first use
    torch.set_num_threads(cores)
