"""Ranks of which none has every tensor, as the stages of a pipeline: saved, loaded, told apart and compared whole."""

import pytest
import torch

from megatron_lite import checkpoint
from megatron_lite.checkpoint import fingerprint
from megatron_lite.distributed.comm import gather_names
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import Piece, ShardSpec
from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.errors import CheckpointError
from megatron_lite.proof.record import gathered
from megatron_lite.training.faults import Faults
from tests.kit.pieces import SOLO, world_of

SPECS = {"embedding": ShardSpec((6, 4), dim=0), "blocks.0": ShardSpec((4,)), "blocks.1": ShardSpec((4, 8), dim=1)}
STAGES = (("embedding", "blocks.0"), ("blocks.0", "blocks.1"))  # the second has a copy of what the first has


def numbers(name):
    shape = SPECS[name].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))


def stage(rank, *, filled):
    """What a rank has: a stage of two, split over two ranks."""
    pieces = {}
    for name in STAGES[rank // 2]:
        local = torch.zeros(SPECS[name].local_shape(2))
        pieces[name] = SPECS[name].piece(local, Axis("tp", rank % 2, 2))
        for tile in pieces[name].tiles if filled else ():
            tile.put(0, numbers(name)[tile.place])
    return pieces


def whole():
    return {name: Piece.whole(numbers(name)) for name in SPECS}


def saved_and_loaded(rank, size, folder):
    world, pieces = world_of(rank, size), stage(rank, filled=True)
    checkpoint.prepare(folder, world)
    path = checkpoint.save(folder, 1, pieces, {}, {}, world, Faults.none())
    read = stage(rank, filled=False)
    found = checkpoint.open_checkpoint(path, world)
    found.load(read, world)
    same = all(torch.equal(a.data, b.data) for n in read for a, b in zip(read[n].tiles, pieces[n].tiles, strict=True))
    fewer = {name: piece for name, piece in read.items() if name != "blocks.1"}
    with pytest.raises(CheckpointError, match=r"has unexpected blocks\.1"):
        found.check(fewer, world)
    return same, fingerprint(read, world), list(gathered(gather_names(read, world), read, world))


def test_no_rank_has_every_tensor(tmp_path):
    for same, digest, tensors in run_ranks(saved_and_loaded, 4, tmp_path / "checkpoints", timeout=60):
        assert same
        assert digest == fingerprint(whole(), SOLO)
        assert [name for name, _ in tensors] == list(SPECS)
        assert all(torch.equal(tensor, numbers(name)) for name, tensor in tensors)
