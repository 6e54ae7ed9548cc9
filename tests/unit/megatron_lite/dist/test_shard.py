"""ShardSpec: any number of ranks holds the same global tensor."""

import pytest
import torch

from megatron_lite.dist.shard import ShardSpec, fill_normal

SPECS = [
    ShardSpec((16, 6), dim=0),
    ShardSpec((6, 16), dim=1),
    ShardSpec((32, 5), dim=0, chunks=(16, 8, 8)),
    ShardSpec((24,), dim=0, chunks=(8, 16)),
    ShardSpec((7, 3)),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_put_undoes_take(spec, size):
    whole = torch.randn(spec.shape)
    again = torch.full(spec.shape, float("nan"))
    for rank in range(size):
        local = spec.take(whole, rank, size)
        assert tuple(local.shape) == spec.local_shape(size)
        spec.put(local, rank, size, into=again)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_initial_weights_are_slices_of_one_global_tensor(spec, size, monkeypatch):
    monkeypatch.setattr("megatron_lite.dist.shard._INIT_BLOCK", 20)  # several blocks even for these small shapes
    whole = torch.empty(spec.shape)
    fill_normal(whole, "blocks.0.weight", spec, seed=3, std=0.5, rank=0, size=1)
    for rank in range(size):
        local = torch.empty(spec.local_shape(size))
        fill_normal(local, "blocks.0.weight", spec, seed=3, std=0.5, rank=rank, size=size)
        assert torch.equal(local, spec.take(whole, rank, size))


def test_initial_weights_depend_on_name_and_seed_and_have_the_wanted_spread():
    spec = ShardSpec((512, 256), dim=0)
    draws = {}
    for name, seed in [("a", 1), ("b", 1), ("a", 2)]:
        draws[name, seed] = torch.empty(spec.shape)
        fill_normal(draws[name, seed], name, spec, seed=seed, std=0.02, rank=0, size=1)
    assert not torch.equal(draws["a", 1], draws["b", 1])
    assert not torch.equal(draws["a", 1], draws["a", 2])
    assert draws["a", 1].std().item() == pytest.approx(0.02, rel=0.02)


def test_a_section_that_does_not_divide_is_our_own_bug():
    with pytest.raises(AssertionError, match="3 ranks do not divide a section of 16"):
        ShardSpec((16, 6), dim=0).boxes(0, 3)
