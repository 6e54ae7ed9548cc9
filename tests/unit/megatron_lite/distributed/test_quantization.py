"""Packed weights: the numbers of the library that made the formats, near what they stand for, wherever they are cut."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config import PACKED_BLOCK, PACKED_BYTES
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.quantization import NF4, pack, unpack
from megatron_lite.distributed.shard import Piece, ShardSpec, Tile, fill_normal

# The largest error in parts of a block's largest number: half of the widest gap between levels.
ERROR = {"int8": 0.5 / 127, "nf4": max(b - a for a, b in itertools.pairwise(NF4)) / 2}
both = pytest.mark.parametrize("packing", PACKED_BYTES)


def drawn(rows, blocks, seed, std=0.02):
    return torch.empty(rows, blocks * PACKED_BLOCK).normal_(0, std, generator=torch.Generator().manual_seed(seed))


def scales(weight):
    return weight.unflatten(1, (-1, PACKED_BLOCK)).abs().amax(2, keepdim=True)


@both
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([1e-6, 0.02, 30.0]))
def test_what_comes_back_is_as_near_as_the_format_allows(packing, rows, blocks, seed, std):
    weight = drawn(rows, blocks, seed, std)
    packed = pack(weight, packing)
    assert packed.shape == (rows, blocks, PACKED_BYTES[packing]) and packed.dtype == torch.uint8
    found = unpack(packed, packing, torch.float32)
    off = (found - weight).unflatten(1, (-1, PACKED_BLOCK)).abs() / scales(weight)
    assert off.max() <= ERROR[packing] * (1 + 1e-5)
    assert torch.equal(scales(found), scales(weight)) or packing == "int8"
    assert torch.equal(unpack(packed, packing, torch.float64), found.double())
    assert torch.equal(unpack(packed, packing, torch.bfloat16), found.bfloat16())


@both
def test_what_it_can_hold_it_holds_and_zeros_are_zeros(packing):
    weight = torch.zeros(4, 2 * PACKED_BLOCK)
    weight[1, 3], weight[2, :PACKED_BLOCK] = -7.5, 0.25
    assert torch.equal(unpack(pack(weight, packing), packing, torch.float32), weight)


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(packing, bad):
    weight = drawn(2, 2, 0)
    weight[1, 5] = bad
    found = unpack(pack(weight, packing), packing, torch.float32)
    assert not found[1, :PACKED_BLOCK].isfinite().any() or not found[1, 5].isfinite()
    assert found[0].isfinite().all() and found[1, PACKED_BLOCK:].isfinite().all()


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**31))
def test_nf4_is_bitsandbytes(rows, blocks, seed):
    theirs = pytest.importorskip("bitsandbytes.functional")
    weight = drawn(rows, blocks, seed)
    codes, state = theirs.quantize_4bit(weight, blocksize=PACKED_BLOCK, quant_type="nf4", compress_statistics=False)
    packed = pack(weight, "nf4")
    assert torch.equal(packed[..., :-4].reshape(-1), codes.view(-1))
    assert torch.equal(packed[..., -4:].contiguous().view(torch.float32).view(-1), state.absmax)
    torch.testing.assert_close(
        unpack(packed, "nf4", torch.float32), theirs.dequantize_4bit(codes, state), rtol=0, atol=1e-6
    )


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**31))
def test_int8_is_bitsandbytes_whose_rows_are_our_blocks(rows, blocks, seed):
    theirs = pytest.importorskip("bitsandbytes.functional")
    weight = drawn(rows, blocks, seed)
    codes, largest, _ = theirs.int8_vectorwise_quant(weight.view(-1, PACKED_BLOCK))
    packed = pack(weight, "int8")
    assert torch.equal(packed[..., :-4].reshape(codes.shape).view(torch.int8), codes)
    back = theirs.int8_vectorwise_dequant(codes, largest).view(weight.shape)
    torch.testing.assert_close(unpack(packed, "int8", torch.float32), back, rtol=0, atol=1e-6)


SPECS = [ShardSpec((16, 128), dim=0), ShardSpec((6, 512), dim=1), ShardSpec((32, 64), dim=0, chunks=(16, 8, 8))]


@both
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("size", "dp"), [(1, 1), (1, 4), (2, 3), (4, 2)])
def test_every_layout_holds_the_same_bytes(packing, spec, size, dp):
    """Filled from disk or drawn: split over tensor-parallel ranks, and then between any blocks, as DeepSpeed may."""
    whole = ShardSpec(spec.shape, spec.dim, spec.chunks, packing)
    drawn = torch.empty(spec.shape)
    fill_normal(Piece.whole(drawn), "t", 3, 0.5)
    want, found = unpack(pack(drawn, packing), packing, torch.float32), [torch.empty(spec.shape) for _ in range(2)]
    for rank in range(size):
        memory = torch.empty(whole.stored.local_shape(size), dtype=torch.uint8)
        for start, stop in itertools.pairwise(i * memory[..., 0].numel() // dp for i in range(dp + 1)):
            flat = memory.view(-1)[start * PACKED_BYTES[packing] : stop * PACKED_BYTES[packing]]
            piece = whole.piece(flat, Axis("tp", rank, size), start * PACKED_BYTES[packing])
            for target, write in zip(found, (lambda p: fill_normal(p, "t", 3, 0.5), read_from(drawn)), strict=True):
                flat.zero_()
                write(piece)
                for tile in piece.tiles:
                    target[tile.place] = tile.numbers
    assert all(torch.equal(target, want) for target in found)


def test_a_large_matrix_is_written_a_few_rows_at_a_time():
    spec = ShardSpec((70_000, 64), packing="nf4")
    (tile,) = spec.piece(torch.empty(spec.stored.shape, dtype=torch.uint8), Axis("tp")).tiles
    parts = [part.shape for part in tile.writable()]
    assert len(parts) == 2 and sum(rows for rows, _ in parts) == 70_000


def read_from(whole):
    def write(piece):
        for tile in piece.tiles:
            for part in tile.writable():
                assert type(part) is Tile
                part.data.copy_(whole[part.place])

    return write
