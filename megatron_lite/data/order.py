"""The order of samples, computed: which sample comes at position n, without a table of all samples.

Two functions of the position alone, both vectorised over positions: ``permute`` shuffles an epoch, ``Blend``
distributes positions over several datasets. So a run starts at once on any amount of data, resumes at any position in
O(1), and sees the same samples on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from megatron_lite.distributed.random import mix

_ROUNDS = 4
_LARGEST_WEIGHT = 1 << 31  # so that products of a weight and a remainder stay below 2**63


def _scramble(x: np.ndarray) -> np.ndarray:
    """A well-mixed 64-bit function of each element (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Apply a pseudorandom permutation of ``range(size)``, selected by ``key``, to each of the int64 ``indices``.

    A Feistel network (Luby and Rackoff 1988) permutes the next power of two. A result outside ``size`` is permuted
    again until it falls inside (cycle walking, Black and Rogaway 2002); this takes fewer than two rounds on average.
    """
    if size <= 1:
        return np.zeros_like(indices)
    bits = (size - 1).bit_length()
    shift = np.uint64(bits // 2)
    low = np.uint64((1 << (bits // 2)) - 1)
    high = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = [np.uint64(mix(key, i)) for i in range(2 * _ROUNDS)]
    x, outside = indices.astype(np.uint64), np.arange(len(indices))
    while len(outside):
        walking = x[outside]
        left, right = walking >> shift, walking & low
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left ^= _scramble(right + even) & high
            right ^= _scramble(left + odd) & low
        x[outside] = walking = (left << shift) | right
        outside = outside[walking >= size]
    return x.astype(np.int64)


@dataclass(frozen=True)
class Blend:
    """Distributes positions 0, 1, 2, … over datasets in proportion to their ``weights``, accurately at every prefix.

    A balanced tree of two-way splits; each sends n p of its first n positions, rounded, to the left. A split adds at
    most half a sample of error, so a dataset's share of any first n positions is exact to ``ceil(log2(datasets)) / 2``
    samples.
    """

    weights: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[float]) -> Blend:
        """From positive weights, taken as exact decimal fractions (0.3 is 3/10) and rounded only beyond 2**31 parts."""
        exact = [Fraction(str(weight)) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        if (total := sum(whole)) >= _LARGEST_WEIGHT:
            whole = [max(1, weight * (_LARGEST_WEIGHT // 2) // total) for weight in whole]
        return cls(tuple(whole))

    def deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The dataset of each of the int64 ``positions``, and its index within that dataset, counted from 0."""
        source = np.zeros_like(positions)
        count = positions.copy()
        self._split(0, len(self.weights), np.arange(len(positions)), source, count)
        return source, count

    def _split(self, first: int, last: int, rows: np.ndarray, source: np.ndarray, count: np.ndarray) -> None:
        if last - first == 1:
            source[rows] = first
            return
        middle = (first + last) // 2
        left, total = sum(self.weights[first:middle]), sum(self.weights[first:last])
        n = count[rows]
        # floor(n × left ÷ total + 1/2) without ever forming n × left, which could pass 2**63
        doubled = 2 * (n % total) * left + total
        before = n // total * left + doubled // (2 * total)
        goes_left = doubled % (2 * total) >= 2 * (total - left)
        count[rows] = np.where(goes_left, before, n - before)
        self._split(first, middle, rows[goes_left], source, count)
        self._split(middle, last, rows[~goes_left], source, count)
