"""Fingerprints of weights, independent of format, layout and float dtype."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.reading import Checkpoint
from megatron_lite.checkpoint.source import Source
from megatron_lite.checkpoint.storage import agree
from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import Piece, Tile
from megatron_lite.errors import CheckpointError

_BLOCK = 1 << 20  # elements at a time


def load_base(source: Source, pieces: Mapping[str, Piece], world: Axis) -> str:
    """Fill pieces from a base. Returns the fingerprint of the weights on disk, whatever dtype the pieces have.
    Collective over ``world``. Raises CheckpointError on every rank."""
    sums = dict.fromkeys(pieces, 0)

    def note(name: str, tile: Tile) -> None:
        sums[name] += weigh(tile, pieces[name].shape)

    agree(world, lambda: source.load(pieces, note), source.path)
    return fingerprint(pieces, world, sums)


@torch.no_grad()
def fingerprint(pieces: Mapping[str, Piece], world: Axis, sums: Mapping[str, int] | None = None) -> str:
    """A digest of global tensors, from all ranks' pieces of them. Collective over ``world``.

    Each element, rounded to bfloat16, is multiplied by a number that depends on its position, and the products are
    summed; a sum can be computed from parts in any order and on any rank. This detects mistakes, not forgeries: file
    digests are for those. Padding (zeros) adds nothing. ``sums``: the sums of this rank's pieces, if already known.
    """
    if sums is None:
        sums = {name: sum(weigh(tile, piece.shape) for tile in piece.tiles) for name, piece in pieces.items()}
    own = {
        name: (sums[name], sum(math.prod(t.shape) for t in piece.tiles), math.prod(piece.shape))
        for name, piece in pieces.items()
    }
    everyone = comm.gather_objects(own, world)
    whole = {}
    for name in set().union(*everyone):
        weights, held, sizes = zip(*(rank[name] for rank in everyone if name in rank), strict=True)
        # A part that several ranks hold is counted as often; Python's integers are exact.
        whole[name] = sum(weights) // (sum(held) // sizes[0])
    return digest(whole)


def digest(sums: Mapping[str, int]) -> str:
    """The fingerprint from the sums of all tensors."""
    lines = (f"{name} {sums[name]}\n".encode() for name in sorted(sums))
    return hashlib.sha256(b"".join(lines)).hexdigest()


def weigh(tile: Tile, shape: tuple[int, ...]) -> int:
    """A tile's contribution to the sum of its tensor: below 2**36 per element, so a block's sum fits in 63 bits."""
    total, columns = 0, math.prod(tile.shape[1:])
    rows = max(1, _BLOCK // max(1, columns))
    for start in range(0, tile.shape[0], rows):
        block = tile.data[start : start + rows]
        bits = block.to(torch.bfloat16).view(torch.int16).to(torch.int64) & 0xFFFF
        offset = (tile.offset[0] + start, *tile.offset[1:])
        total += int((bits * _weights(offset, tuple(block.shape), shape, block.device)).sum())
    return total


def _weights(offset: tuple[int, ...], size: tuple[int, ...], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A number from 1 to 2**20 for every position in a rectangle: a hash of its index in the whole tensor."""
    index = torch.zeros(size, dtype=torch.int64, device=device)
    for dim, (first, length) in enumerate(zip(offset, size, strict=True)):
        along = torch.arange(first, first + length, device=device) * math.prod(shape[dim + 1 :])
        index += along.view(-1, *(1 for _ in size[dim + 1 :]))
    mixed = (index + 1) * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return ((mixed >> 33) & 0xFFFFF) | 1


def check_base(adapter: Checkpoint, base: str, path: Path) -> None:
    """Refuse the base at ``path`` with this fingerprint if the adapter was trained on another base. Raises
    CheckpointError."""
    wanted = adapter.state().get("base")
    if wanted != base:
        raise CheckpointError(
            f"{adapter.path} was trained on a base of fingerprint {str(wanted)[:12]}, but {path} has {base[:12]}: "
            "give the base it belongs to"
        )


def fingerprint_of(source: Source) -> str:
    """The ``fingerprint`` of the model in ``source``, read a block of rows at a time."""
    sums = {}
    for name, info in source.tensors.items():
        if name.startswith("model."):
            sums[name] = sum(weigh(tile, info.shape) for tile in _row_blocks(source, name, source.true_shape(name)))
    return digest(sums)


def _row_blocks(source: Source, name: str, shape: tuple[int, ...]) -> Iterator[Tile]:
    rows = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        tile = Tile(torch.empty((min(rows, shape[0] - start), *shape[1:])), (start, *(0 for _ in shape[1:])))
        source.read(name, tile)
        yield tile
