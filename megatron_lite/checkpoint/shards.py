"""Tensors as boxes in safetensors files: who writes which, and how any layout finds its own parts again.

The file format is safetensors; the writer here streams one box at a time instead of collecting all of them, and the
library reads them back.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from megatron_lite.checkpoint.manifest import BoxEntry, Manifest, TensorEntry, overlap
from megatron_lite.dist.shard import Piece, Tile
from megatron_lite.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library reads no larger one


class Holding(NamedTuple):
    """What a rank tells the others about one of its pieces: all but the data."""

    dtype: str
    shape: tuple[int, ...]
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]  # offset, shape


def holdings(pieces: Mapping[str, Piece]) -> dict[str, Holding]:
    """The description of ``pieces`` that ``plan`` is made from."""
    return {
        name: Holding(
            _DTYPE_NAMES[piece.dtype],
            piece.shape,
            [(tile.offset, tile.shape) for tile in piece.tiles if 0 not in tile.shape],
        )
        for name, piece in pieces.items()
    }


def plan(held: Sequence[Mapping[str, Holding]]) -> dict[str, TensorEntry]:
    """Decide which rank writes each box, from what every rank holds (in rank order).

    A box held by several ranks is written once, by the holder with the least to write so far. Every rank comes to the
    same answer. Raises AssertionError when ranks contradict each other or the boxes do not tile their tensor: saving
    such pieces would be our bug.
    """
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    holders: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    for rank, pieces in enumerate(held):
        for name, holding in pieces.items():
            kind = kinds.setdefault(name, holding[:2])
            assert kind == holding[:2], f"{name} is {holding[:2]} on rank {rank}, {kind} elsewhere"
            for offset, shape in holding.boxes:
                holders[name, offset, shape].append(rank)
    tensors = {name: TensorEntry(dtype=d, shape=list(shape), boxes=[]) for name, (d, shape) in sorted(kinds.items())}
    load = [0] * len(held)
    sizes = {box: math.prod(box[2]) * tensors[box[0]].item_size for box in holders}
    for box in sorted(holders, key=lambda b: (-sizes[b], b)):
        name, offset, shape = box
        writer = min(holders[box], key=lambda rank: (load[rank], rank))
        load[writer] += sizes[box]
        tensors[name].boxes.append(BoxEntry(file=shard_name(writer), offset=list(offset), shape=list(shape)))
    for name, tensor in tensors.items():
        tensor.boxes.sort(key=lambda b: b.offset)
        assert not (problem := tensor.problem()), f"{name}: {problem}"
    return tensors


def shard_name(rank: int) -> str:
    """The file that ``rank`` writes."""
    return f"shard_{rank:05d}.safetensors"


@dataclass(frozen=True)
class Shard:
    """One file to be: its header, its size in bytes, and the boxes in the order they are written."""

    header: bytes
    size: int
    boxes: list[tuple[str, BoxEntry]]

    def chunks(self, pieces: Mapping[str, Piece]) -> Iterator[Any]:
        """The file as buffers, one box of ``pieces`` at a time: only a strided or device-resident box is copied."""
        yield self.header
        for name, entry in self.boxes:
            place = (tuple(entry.offset), tuple(entry.shape))
            tile = next(tile for tile in pieces[name].tiles if (tile.offset, tile.shape) == place)
            yield tile.data.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def shard(tensors: Mapping[str, TensorEntry], file: str) -> Shard | None:
    """The shard named ``file`` under a plan, or None if nothing is in it."""
    boxes = [(name, box) for name, tensor in tensors.items() for box in tensor.boxes if box.file == file]
    if not boxes:
        return None
    boxes.sort(key=lambda b: (-tensors[b[0]].item_size, b[0], b[1].offset))  # larger items first keeps all aligned
    header, end = {}, 0
    for name, box in boxes:
        tensor, start = tensors[name], end
        end += math.prod(box.shape) * tensor.item_size
        header[tensor.key(name, box)] = {"dtype": tensor.dtype, "shape": box.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= _MAX_HEADER_BYTES, f"{file}: {len(boxes)} boxes are too many for one file"
    return Shard(len(text).to_bytes(8, "little") + text, 8 + len(text) + end, boxes)


def check_pieces(manifest: Manifest, pieces: Mapping[str, Piece], partial: bool, where: Path) -> None:
    """Refuse a checkpoint whose tensors are not those of ``pieces``: names, shapes, kinds of number.

    ``partial`` allows tensors that nobody asks for. Raises CheckpointError naming the tensors.
    """
    missing = sorted(pieces.keys() - manifest.tensors.keys())
    unexpected = [] if partial else sorted(manifest.tensors.keys() - pieces.keys())
    for names, complaint in ((missing, "lacks"), (unexpected, "has unexpected")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{where} {complaint} {', '.join(names[:3])}{more}")
    for name, piece in pieces.items():
        tensor = manifest.tensors[name]
        if list(piece.shape) != tensor.shape:
            raise CheckpointError(f"{where}: {name} has shape {tuple(tensor.shape)}, wanted {tuple(piece.shape)}")
        stored = DTYPES[tensor.dtype]
        if stored != piece.dtype and not (stored.is_floating_point and piece.dtype.is_floating_point):
            raise CheckpointError(f"{where}: {name} has dtype {stored}, wanted {piece.dtype}")


def fill(folder: Path, manifest: Manifest, pieces: Mapping[str, Piece]) -> None:
    """Read this rank's boxes of every piece from whichever stored boxes they overlap, converting between float dtypes.

    Only overlapping parts are read. Raises CheckpointError where a file contradicts the manifest.
    """
    wanted: dict[str, list[tuple[str, BoxEntry, Tile]]] = defaultdict(list)
    for name, piece in pieces.items():
        for tile in piece.tiles:
            for entry in manifest.tensors[name].boxes:
                if overlap(entry, tile) is not None:
                    wanted[entry.file].append((name, entry, tile))
    for file, reads in sorted(wanted.items()):
        try:
            with safe_open(folder / file, framework="pt") as stored, torch.no_grad():
                for name, entry, tile in reads:
                    _copy(stored, manifest.tensors[name], name, entry, tile)
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{folder / file}: {error}") from None


def _copy(stored: Any, tensor: TensorEntry, name: str, entry: BoxEntry, tile: Tile) -> None:
    key = tensor.key(name, entry)
    part = stored.get_slice(key)
    if part.get_shape() != entry.shape or part.get_dtype() != tensor.dtype:
        raise ValueError(f"{key!a} is not what the manifest says")
    common = overlap(entry, tile)
    assert common is not None
    if list(tile.offset) == entry.offset and list(tile.shape) == entry.shape:
        tile.data.copy_(stored.get_tensor(key))
        return
    source, target = (
        tuple(slice(start - o, stop - o) for (start, stop), o in zip(common, offset, strict=True))
        for offset in (entry.offset, tile.offset)
    )
    tile.data[target].copy_(part[source])
