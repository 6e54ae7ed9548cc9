"""Tensors as boxes in safetensors files: which rank writes which box, and how any layout reads its parts.

The file format is safetensors; the writer here streams one box at a time instead of collecting all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_lite.checkpoint.manifest import BoxEntry, Manifest, TensorEntry, overlap
from megatron_lite.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, TensorFile, header
from megatron_lite.distributed.shard import Box, Piece, Tile
from megatron_lite.errors import CheckpointError

Reads = dict[str, list[tuple[str, BoxEntry, Tile]]]


class Holding(NamedTuple):
    """The description of a rank's piece that is sent to the other ranks: everything except the data."""

    dtype: str
    shape: tuple[int, ...]
    boxes: list[Box]


def holdings(pieces: Mapping[str, Piece]) -> dict[str, Holding]:
    """The description of ``pieces`` that ``plan`` is made from."""
    return {
        name: Holding(
            DTYPE_NAMES[piece.dtype],
            piece.shape,
            [tile.box for tile in piece.tiles if 0 not in tile.shape],
        )
        for name, piece in pieces.items()
    }


def plan(held: Sequence[Mapping[str, Holding]]) -> dict[str, TensorEntry]:
    """Decide which rank writes each box, from what every rank holds (in rank order).

    A box held by several ranks is written once, by the holder with the least to write so far. Every rank computes the
    same plan. Raises AssertionError if ranks contradict each other or the boxes do not tile their tensor, which would
    be a bug of ours.
    """
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    holders: dict[tuple[str, Box], list[int]] = defaultdict(list)
    for rank, pieces in enumerate(held):
        for name, holding in pieces.items():
            kind = kinds.setdefault(name, holding[:2])
            assert kind == holding[:2], f"{name} is {holding[:2]} on rank {rank}, {kind} elsewhere"
            for box in holding.boxes:
                holders[name, box].append(rank)
    tensors = {name: TensorEntry(dtype=d, shape=list(shape), boxes=[]) for name, (d, shape) in sorted(kinds.items())}
    load = [0] * len(held)
    sizes = {(name, box): math.prod(box[1]) * tensors[name].item_size for name, box in holders}
    for named in sorted(holders, key=lambda n: (-sizes[n], n)):
        name, (offset, shape) = named
        writer = min(holders[named], key=lambda rank: (load[rank], rank))
        load[writer] += sizes[named]
        tensors[name].boxes.append(BoxEntry(file=shard_name(writer), offset=list(offset), shape=list(shape)))
    for name, tensor in tensors.items():
        tensor.boxes.sort(key=lambda b: b.offset)
        assert not (problem := tensor.problem()), f"{name}: {problem}"
    return tensors


def shard_name(rank: int) -> str:
    """The file that ``rank`` writes."""
    return f"shard_{rank:05d}.safetensors"


@dataclass(frozen=True)
class ShardFile:
    """A file to be written: its header, its size in bytes, and the boxes in order."""

    header: bytes
    size: int
    boxes: list[tuple[str, BoxEntry]]

    def chunks(self, read: Callable[[str, BoxEntry], Iterable[Any]]) -> Iterator[Any]:
        """The file's content as buffers; ``read`` yields those of one box."""
        yield self.header
        for name, entry in self.boxes:
            yield from read(name, entry)


def reader(pieces: Mapping[str, Piece]) -> Callable[[str, BoxEntry], Iterable[Any]]:
    """The ``read`` argument of ``ShardFile.chunks``: boxes of ``pieces``, copied only if strided or on a device."""

    return lambda name, entry: [buffer(tile_of(pieces[name], entry).data)]


def tile_of(piece: Piece, entry: BoxEntry) -> Tile:
    """The tile that corresponds to a box."""
    return next(tile for tile in piece.tiles if tile.box == entry.box)


def buffer(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor; not copied if it is contiguous and in CPU memory."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def shard_file(tensors: Mapping[str, TensorEntry], file: str) -> ShardFile | None:
    """The file named ``file`` in a plan, or None if it would be empty."""
    boxes = [(name, box) for name, tensor in tensors.items() for box in tensor.boxes if box.file == file]
    if not boxes:
        return None
    boxes.sort(key=lambda b: (-tensors[b[0]].item_size, b[0], b[1].offset))  # larger items first keeps all aligned
    start = header([(tensors[n].key(n, box), DTYPES[tensors[n].dtype], box.shape) for n, box in boxes])
    size = sum(math.prod(box.shape) * tensors[name].item_size for name, box in boxes)
    return ShardFile(start, len(start) + size, boxes)


def check_pieces(manifest: Manifest, pieces: Mapping[str, Piece], names: Collection[str] | None, where: Path) -> None:
    """Refuse a checkpoint whose tensors differ from ``pieces`` in name, shape or kind of dtype.

    ``names``: those that some rank has, besides which there may be none; None allows any. Raises CheckpointError
    naming the tensors.
    """
    missing = sorted(pieces.keys() - manifest.tensors.keys())
    unexpected = [] if names is None else sorted(manifest.tensors.keys() - set(names))
    for tensors, complaint in ((missing, "lacks"), (unexpected, "has unexpected")):
        if tensors:
            more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
            raise CheckpointError(f"{where} {complaint} {', '.join(tensors[:3])}{more}")
    for name, piece in pieces.items():
        tensor = manifest.tensors[name]
        if list(piece.shape) != tensor.shape:
            raise CheckpointError(f"{where}: {name} has shape {tuple(tensor.shape)}, wanted {tuple(piece.shape)}")
        stored = DTYPES[tensor.dtype]
        if stored != piece.dtype and not (stored.is_floating_point and piece.dtype.is_floating_point):
            raise CheckpointError(f"{where}: {name} has dtype {stored}, wanted {piece.dtype}")


def reads(manifest: Manifest, pieces: Mapping[str, Piece]) -> Reads:
    """The stored boxes that overlap the tiles of ``pieces``, by file."""
    wanted: Reads = defaultdict(list)
    for name, piece in pieces.items():
        for tile in piece.tiles:
            for entry in manifest.tensors[name].boxes:
                if overlap(entry, tile) is not None:
                    wanted[entry.file].append((name, entry, tile))
    return wanted


@torch.no_grad()
def fill(folder: Path, manifest: Manifest, wanted: Reads, hashed: Collection[str] = ()) -> list[str]:
    """Read the intersections of tiles and stored boxes, converting between float dtypes. The files in ``hashed`` are
    read completely; returns those whose digest is wrong. Of other files only the needed parts are read.

    Raises CheckpointError if a file contradicts the manifest.
    """
    damaged = []
    for file in sorted(wanted.keys() | set(hashed)):
        with contextlib.closing(TensorFile(folder / file)) as stored:
            rectangles: dict[str, list[Any]] = defaultdict(list)
            for name, entry, tile in wanted.get(file, ()):
                key, source, target = common(stored, manifest.tensors[name], name, entry, tile)
                rectangles[key].append((source, target))
            if file in hashed:
                digest = hashlib.sha256()
                stored.read_all(rectangles, digest)
                if digest.hexdigest() != manifest.files[file].sha256:
                    damaged.append(file)
            else:
                for key, some in rectangles.items():
                    for source, target in some:
                        stored.read(key, source, target)
    return damaged


def common(
    stored: TensorFile, tensor: TensorEntry, name: str, entry: BoxEntry, tile: Tile
) -> tuple[str, tuple[slice, ...], torch.Tensor]:
    """The intersection of a stored box and a tile: the box's key, and the rectangle in the box and in the tile."""
    key = tensor.key(name, entry)
    found = stored.tensors.get(key)
    if found is None or list(found.shape) != entry.shape or found.dtype != DTYPES[tensor.dtype]:
        raise CheckpointError(f"{stored.path}: {key!a} is not what the manifest says")
    shared = overlap(entry, tile)
    assert shared is not None
    source, target = (
        tuple(slice(start - o, stop - o) for (start, stop), o in zip(shared, offset, strict=True))
        for offset in (entry.offset, tile.offset)
    )
    return key, source, tile.data[target]


def copy_box(stored: TensorFile, tensor: TensorEntry, name: str, entry: BoxEntry, tile: Tile) -> None:
    """Read the intersection of a stored box and a tile."""
    stored.read(*common(stored, tensor, name, entry, tile))
