"""ShardSpec: any number of ranks holds the same global tensor."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import Piece, ShardSpec, fill_normal, rectangles

SPECS = [
    ShardSpec((16, 6), dim=0),
    ShardSpec((6, 16), dim=1),
    ShardSpec((32, 5), dim=0, chunks=(16, 8, 8)),
    ShardSpec((24,), dim=0, chunks=(8, 16)),
    ShardSpec((7, 3)),
]


def pieces(spec, size, dp):
    """The uninitialised pieces of every rank: tensor-parallel shards, each cut into ``dp`` stretches of elements."""
    for rank in range(size):
        local = torch.full(spec.local_shape(size), float("nan"))
        for start, stop in itertools.pairwise(i * local.numel() // dp for i in range(dp + 1)):
            yield spec.piece(local.view(-1)[start:stop], Axis("tp", rank, size), start)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dp", [1, 3, 5])
def test_tiles_of_all_ranks_cover_the_tensor(spec, size, dp):
    count = torch.zeros(spec.shape)
    for piece in pieces(spec, size, dp):
        assert piece.shape == spec.shape
        for tile in piece.tiles:
            count[tile.place] += 1
    assert (count == (1 if spec.dim is not None else size)).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_fused_parameter_holds_its_part_of_every_section(spec):
    """What a layer takes for its q, k and v is what the spec says."""
    whole = torch.arange(math.prod(spec.shape)).view(spec.shape)
    for rank in range(4 if spec.dim is not None else 0):
        local = torch.empty(spec.local_shape(4), dtype=torch.int64)
        for tile in spec.piece(local, Axis("tp", rank, 4)).tiles:
            tile.data.copy_(whole[tile.place])
        sections = whole.split(spec.chunks or spec.shape[spec.dim], spec.dim)
        assert torch.equal(local, torch.cat([section.chunk(4, spec.dim)[rank] for section in sections], spec.dim))


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
def test_a_stretch_of_elements_is_a_few_rectangles(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    elements = torch.arange(numel).view(shape)
    found = list(rectangles(shape, start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    order = [elements[tuple(slice(o, o + n) for o, n in zip(origin, size, strict=True))] for _, origin, size in found]
    assert [int(part.reshape(-1)[0]) for part in order] == [first for first, _, _ in found]
    assert [n for part in order for n in part.reshape(-1).tolist()] == list(range(start, stop))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dp", [1, 2, 3])
def test_initial_weights_are_parts_of_one_global_tensor(spec, size, dp, monkeypatch):
    monkeypatch.setattr("megatron_lite.distributed.shard._INIT_BLOCK", 20)  # several blocks even for these small shapes
    whole = torch.empty(spec.shape)
    fill_normal(Piece.whole(whole), "blocks.0.weight", seed=3, std=0.5)
    for piece in pieces(spec, size, dp):
        fill_normal(piece, "blocks.0.weight", seed=3, std=0.5)
        for tile in piece.tiles:
            assert torch.equal(tile.data, whole[tile.place])


def test_initial_weights_depend_on_name_and_seed_and_have_the_wanted_spread():
    draws = {}
    for name, seed in [("a", 1), ("b", 1), ("a", 2)]:
        draws[name, seed] = torch.empty(512, 256)
        fill_normal(Piece.whole(draws[name, seed]), name, seed=seed, std=0.02)
    assert not torch.equal(draws["a", 1], draws["b", 1])
    assert not torch.equal(draws["a", 1], draws["a", 2])
    assert draws["a", 1].std().item() == pytest.approx(0.02, rel=0.02)


def test_a_section_that_does_not_divide_is_our_own_bug():
    with pytest.raises(AssertionError, match="3 ranks do not divide a section of 16"):
        ShardSpec((16, 6), dim=0).sections(0, 3)
