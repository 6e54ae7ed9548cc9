"""Which cases of a product to try, so that every two values meet at least once (pairwise testing)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations

import pytest

Values = Mapping[str, Hashable]


def pairs(values: Values) -> set[tuple[Hashable, ...]]:
    """Any two values of a case, by the names of what they are values of."""
    return set(combinations(sorted(values.items()), 2))


def pairwise(cases: Mapping[str, Values]) -> list[str]:
    """A few of ``cases`` in which all pairs of values are that any case has: greedily, the first of equals."""
    missing, chosen = set().union(*map(pairs, cases.values())), []
    while missing:
        name = max(cases, key=lambda name: len(pairs(cases[name]) & missing))
        missing -= pairs(cases[name])
        chosen.append(name)
    return chosen


def covering(names: Iterable[str], cases: Mapping[str, Values], slow: Sequence[str] = ()) -> list:
    """``names`` as parameters; of those that are ``cases`` of a product, what is not needed for all pairs is slow."""
    left = {*slow, *cases} - {*pairwise(cases)}
    return [pytest.param(name, marks=pytest.mark.slow) if name in left else name for name in names]
