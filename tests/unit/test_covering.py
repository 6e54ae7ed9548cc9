"""A covering array has every pair that the product has, in fewer cases, and the same ones in every run."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from tests.kit.covering import pairs, pairwise


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_every_pair_is_tried_and_no_case_in_vain(sizes: list[int]) -> None:
    cases = {str(values): dict(zip("abcd", values, strict=False)) for values in product(*map(range, sizes))}
    chosen = pairwise(cases)
    covered = [pairs(cases[name]) for name in chosen]
    assert set().union(*covered) == set().union(*map(pairs, cases.values()))
    assert all(new - set().union(*covered[:i]) for i, new in enumerate(covered))
    assert chosen == pairwise(dict(cases))


def test_a_pair_that_no_case_has_is_not_asked_for() -> None:
    cases = {"a": {"tp": 1, "sp": False}, "b": {"tp": 2, "sp": True}, "c": {"tp": 2, "sp": False}}
    assert sorted(pairwise(cases)) == ["a", "b", "c"]


def test_it_is_much_smaller_than_the_product() -> None:
    cases = {
        str(values): dict(zip("abcd", values, strict=True)) for values in product(range(7), range(4), *[range(2)] * 2)
    }
    assert len(cases) == 112
    assert len(pairwise(cases)) == 28
