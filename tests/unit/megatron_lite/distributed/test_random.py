"""Seeds and masks that depend on where they are used alone."""

import torch

from megatron_lite.distributed.random import dropout, mix


def test_seeds_are_63_bits_and_differ_wherever_the_place_does():
    places = [
        (seed, sample, site, rank) for seed in range(4) for sample in range(8) for site in range(8) for rank in range(4)
    ]
    seeds = {mix(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1)


def test_a_mask_belongs_to_its_seed():
    x = torch.ones(200, 100)
    first, again, other = dropout(x, 0.25, 1), dropout(x, 0.25, 1), dropout(x, 0.25, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((first == 0).float().mean().item() - 0.25) < 0.01
    both = ((first == 0) & (other == 0)).float().mean().item()
    assert abs(both - 0.25**2) < 0.01  # masks of two places are independent


def test_no_seed_is_evaluation():
    x = torch.randn(5)
    assert dropout(x, 0.9, None) is x
    assert dropout(x, 0.0, 7) is x
