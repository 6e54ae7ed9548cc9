"""ShardSpec: any number of ranks holds the same global tensor."""

import pytest
import torch

from megatron_lite.dist.mesh import Axis
from megatron_lite.dist.shard import Piece, ShardSpec, fill_normal

SPECS = [
    ShardSpec((16, 6), dim=0),
    ShardSpec((6, 16), dim=1),
    ShardSpec((32, 5), dim=0, chunks=(16, 8, 8)),
    ShardSpec((24,), dim=0, chunks=(8, 16)),
    ShardSpec((7, 3)),
]


def pieces(spec, size, dp):
    """The uninitialised pieces of every rank, tensor-parallel shards cut into rows for ``dp`` ranks each."""
    for rank in range(size):
        local = torch.empty(spec.local_shape(size))
        piece = spec.piece(local, Axis("tp", rank, size))
        step, rows = -(-local.shape[0] // dp), local.shape[0]
        for start in (min(rows, step * i) for i in range(dp)):
            yield piece.rows(start, local[start : min(rows, start + step)])


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dp", [1, 3])
def test_boxes_of_all_ranks_tile_the_tensor(spec, size, dp):
    count = torch.zeros(spec.shape)
    for piece in pieces(spec, size, dp):
        held = torch.zeros(piece.data.shape)
        for box in piece.boxes_with_content():
            held[box.local] += 1
            count[box.place] += 1
        assert (held == 1).all()
    assert (count == (1 if spec.dim is not None else size)).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dp", [1, 2, 3])
def test_initial_weights_are_parts_of_one_global_tensor(spec, size, dp, monkeypatch):
    monkeypatch.setattr("megatron_lite.dist.shard._INIT_BLOCK", 20)  # several blocks even for these small shapes
    whole = Piece.whole(torch.empty(spec.shape))
    fill_normal(whole, "blocks.0.weight", seed=3, std=0.5)
    for piece in pieces(spec, size, dp):
        fill_normal(piece, "blocks.0.weight", seed=3, std=0.5)
        for box in piece.boxes:
            assert torch.equal(piece.data[box.local], whole.data[box.place])


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
        ShardSpec((16, 6), dim=0).boxes(0, 3)
