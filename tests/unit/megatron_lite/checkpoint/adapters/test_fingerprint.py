"""A fingerprint is of the weights: not of how they are cut, nor of the float type, and of every one of them."""

import pytest
import torch

from megatron_lite.checkpoint import fingerprint
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import Piece, ShardSpec, Tile
from tests.kit.pieces import SOLO, world_of
from tests.kit.world import run_ranks

SPECS = {"a": ShardSpec((24, 6), dim=0, chunks=(16, 4, 4)), "b": ShardSpec((6, 8), dim=1), "c": ShardSpec((7,))}


def whole(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(spec.shape, generator=generator).to(dtype) for name, spec in SPECS.items()}


def digest(tensors):
    return fingerprint({name: Piece.whole(tensor) for name, tensor in tensors.items()}, SOLO)


def over_ranks(rank, size, tp):
    """Cut over two of four ranks and held twice, or over all four."""
    axis, pieces = Axis("tp", rank % tp, tp), {}
    for name, spec in SPECS.items():
        pieces[name] = spec.piece(torch.empty(spec.local_shape(tp)), axis)
        for tile in pieces[name].tiles:
            tile.data.copy_(whole()[name][tile.place])
    return fingerprint(pieces, world_of(rank, size))


@pytest.mark.parametrize("tp", [2, 4])
def test_the_same_however_it_is_cut(tp):
    assert run_ranks(over_ranks, 4, tp, timeout=60) == [digest(whole())] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_same_in_every_float_type(dtype):
    assert digest(whole(dtype)) == digest(whole())


def test_padding_adds_nothing():
    tensors = whole()
    padded = {**tensors, "b": torch.cat((tensors["b"], torch.zeros(4, 8)))}
    assert digest(padded) == digest(tensors)


def test_every_element_and_its_place_count():
    tensors, found = whole(), {digest(whole())}
    for name, tensor in tensors.items():
        for index in range(tensor.numel()):
            changed = tensor.clone()
            changed.view(-1)[index] *= 1.01
            found.add(digest({**tensors, name: changed}))
    count = 1 + sum(tensor.numel() for tensor in tensors.values())
    assert len(found) == count
    swapped = tensors["a"].flip(0)
    assert digest({**tensors, "a": swapped}) not in found


def test_blocks_of_a_large_tensor_are_one_tensor():
    tensor = torch.randn(3000, 700, generator=torch.Generator().manual_seed(1))
    parts = [Tile(tensor[a:b], (a, 0)) for a, b in ((0, 1), (1, 2998), (2998, 3000))]
    assert fingerprint({"t": Piece((3000, 700), tensor.dtype, parts)}, SOLO) == digest({"t": tensor})
