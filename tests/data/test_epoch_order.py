"""The order of an epoch is a pure function of seed and epoch."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.store.epoch_order import epoch_order

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@given(SIZES, st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_every_example_once_when_weights_are_one(sizes, seed, epoch):
    source = np.repeat(np.arange(len(sizes)), sizes)
    order = epoch_order(source, np.ones(len(sizes)), seed, epoch)
    assert sorted(order) == list(range(len(source)))
    assert (order == epoch_order(source, np.ones(len(sizes)), seed, epoch)).all()


@given(SIZES, st.data(), st.booleans())
def test_weights_set_how_often_a_row_comes(sizes, data, shuffle):
    weights = np.array([data.draw(st.sampled_from([0.25, 0.5, 1, 1.5, 2, 3])) for _ in sizes])
    source = np.repeat(np.arange(len(sizes)), sizes)
    order = epoch_order(source, weights, 7, 1, shuffle)
    times = np.bincount(order, minlength=len(source))
    for index, (size, weight) in enumerate(zip(sizes, weights)):
        mine = times[source == index]
        whole = int(weight)
        expected = whole * size + round((weight - whole) * size)
        assert mine.sum() == (max(expected, 1) if size else 0)
        assert set(mine) <= {whole, whole + 1}


def test_epochs_and_seeds_differ_and_lengths_do_not():
    source = np.repeat([0, 1], [40, 20])
    weights = np.array([0.5, 2.0])
    orders = [epoch_order(source, weights, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert {len(order) for order in orders} == {60}
    assert len({order.tobytes() for order in orders}) == 4
    drawn = [frozenset(order[order < 40]) for order in orders]
    assert len(set(drawn)) == 4 and all(len(part) == 20 for part in drawn)


def test_each_epoch_shuffles_anew():
    source = np.zeros(40, np.int64)
    assert len({epoch_order(source, np.ones(1), 0, epoch).tobytes() for epoch in range(5)}) == 5


def test_in_order_means_in_order():
    source = np.array([0, 0, 1])
    assert epoch_order(source, np.ones(2), 0, 3, shuffle=False).tolist() == [0, 1, 2]
    assert epoch_order(source, np.array([1, 2.0]), 0, 3, shuffle=False).tolist() == [0, 1, 2, 2]
