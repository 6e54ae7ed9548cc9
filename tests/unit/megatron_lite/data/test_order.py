"""The order of samples: a permutation for every size and key, and blends that are exact at every prefix."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_lite.data.order import Blend, permute


@given(st.integers(1, 3000), st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_every_index_comes_up_exactly_once(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@given(st.integers(1, 2**45), st.integers(0, 2**62), st.data())
@settings(max_examples=60, deadline=None)
def test_an_index_goes_to_the_same_place_alone_and_among_others(size, key, data):
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8)), np.int64)
    together = permute(indices, size, key)
    assert ((together >= 0) & (together < size)).all()
    assert [int(permute(indices[i : i + 1], size, key)[0]) for i in range(len(indices))] == together.tolist()


def test_keys_give_different_orders():
    orders = {tuple(permute(np.arange(100), 100, key)) for key in range(200)}
    assert len(orders) == 200


def test_the_order_looks_shuffled():
    """Neighbours land as far apart as in a random order (mean n/3), and every tenth of the range as evenly."""
    n = 60_000
    order = permute(np.arange(n), n, 5)
    assert abs(np.abs(np.diff(order)).mean() / (n / 3) - 1) < 0.02
    counts = np.histogram2d(np.arange(n), order, bins=10)[0]
    chi_squared = ((counts - n / 100) ** 2 / (n / 100)).sum()
    assert chi_squared < 140  # 81 degrees of freedom: beyond 140 once in 20,000 random orders


WEIGHTS = st.lists(st.floats(0.001, 1000, allow_nan=False), min_size=1, max_size=7)


@given(WEIGHTS, st.integers(0, 2**46))
@example([1.0, 1.0, 1.0, 1.0, 13.0], 0)
@example([1000.0, 0.001], 2**46)
@settings(max_examples=100, deadline=None)
def test_every_prefix_of_a_blend_has_its_proportions(weights, start):
    blend = Blend.of(weights)
    which, count = blend.deal(np.arange(start, start + 500))
    bound = math.ceil(math.log2(len(weights))) / 2
    for source, weight in enumerate(blend.weights):
        rows = np.flatnonzero(which == source)
        taken = count[rows]
        assert (np.diff(taken) == 1).all()  # none left out, none twice
        for row, nth in zip(rows.tolist(), taken.tolist(), strict=True):
            exact = (start + row) * weight / sum(blend.weights)
            assert abs(nth - exact) <= bound + exact * 1e-12


@pytest.mark.parametrize(
    ("weights", "whole"), [([0.3, 0.7], (3, 7)), ([1, 1, 2], (1, 1, 2)), ([2.5], (5,)), ([1e-3, 1], (1, 1000))]
)
def test_weights_are_taken_as_written(weights, whole):
    assert Blend.of(weights).weights == whole


def test_weights_beyond_31_bits_are_rounded_and_none_disappears():
    blend = Blend.of([1e-12, 1.0, 3.0])
    assert min(blend.weights) == 1
    assert blend.weights[2] / blend.weights[1] == pytest.approx(3)
