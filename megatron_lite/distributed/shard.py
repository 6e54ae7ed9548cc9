"""``ShardSpec``: which part of a global parameter a rank holds.

A parameter at rest is an ordinary local tensor. The layer that owns it attaches a ``ShardSpec``; initialisation,
gradient norm, checkpoints and adapters all derive from it (docs/adr/0001). The idea of local tensors with shard
metadata is nanotron's; initialising by slicing one global tensor is picotron's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_lite.config import PACKED_BLOCK, PACKED_BYTES
from megatron_lite.distributed.mesh import Axis, Mesh
from megatron_lite.distributed.quantization import pack, unpack

Box = tuple[tuple[int, ...], tuple[int, ...]]  # a rectangle of a tensor: its offset and its shape


@dataclass(frozen=True)
class ShardSpec:
    """How one global parameter is split over an axis of the mesh.

    ``shape``: the global shape. ``dim``: the dim that is split, or None if every rank holds the whole tensor.
    ``chunks``: sizes along ``dim`` that are split separately and whose parts are concatenated (fused q, k, v; gate and
    up); None for one chunk. ``packing``: the format of a frozen, quantized matrix (``quantization.py``), or None.
    ``axis``: the name of the mesh axis over which it is split.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    chunks: tuple[int, ...] | None = None
    packing: str | None = None
    axis: str = "tp"

    def __post_init__(self) -> None:
        assert self.dim is None or 0 <= self.dim < len(self.shape)
        assert self.chunks is None or (self.dim is not None and sum(self.chunks) == self.shape[self.dim])

    @property
    def stored(self) -> ShardSpec:
        """The spec of the stored tensor: for a packed matrix, bytes [rows, blocks, bytes of a block]."""
        if self.packing is None:
            return self
        rows, columns = self.shape
        shape = (rows, columns // PACKED_BLOCK, PACKED_BYTES[self.packing])
        return replace(self, shape=shape, packing=None)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """The shape of the tensor that each of ``size`` ranks holds."""
        shape = list(self.shape)
        if self.dim is not None:
            shape[self.dim] //= size
        return tuple(shape)

    def sections(self, rank: int, size: int) -> list[tuple[int, int, int]]:
        """(local start, global start, length) along ``dim`` of each stretch that ``rank`` of ``size`` holds."""
        assert self.dim is not None
        found, local, whole = [], 0, 0
        for chunk in self.chunks or (self.shape[self.dim],):
            assert chunk % size == 0, f"{size} ranks do not divide a section of {chunk}"
            part = chunk // size
            found.append((local, whole + rank * part, part))
            local, whole = local + part, whole + chunk
        return found

    def piece(self, local: Tensor, axis: Axis, start: int = 0) -> Piece:
        """The place of ``local`` in the global tensor: this rank's part along ``axis`` or, if that part is divided
        further, a contiguous range of its elements beginning with ``start`` (in any shape)."""
        assert axis.name == self.axis, f"split over {self.axis}, not {axis.name}"
        if self.packing is not None:
            stored = self.stored.piece(local, axis, start).tiles
            packed = [PackedTile(t.data, (t.offset[0], t.offset[1] * PACKED_BLOCK), self.packing) for t in stored]
            return Piece(self.shape, torch.float32, packed)
        assert local.is_contiguous(), "tiles have to be views"
        shape, flat = self.local_shape(axis.size), local.view(-1)
        tiles: list[Tile] = []
        for first, origin, size in rectangles(shape, start, start + flat.numel()):
            block = flat[first - start : first - start + math.prod(size)].view(size)
            tiles += [Tile(block, origin)] if self.dim is None else self._tiles(block, origin, self.dim, axis)
        return Piece(self.shape, local.dtype, tiles)

    def _tiles(self, block: Tensor, origin: tuple[int, ...], dim: int, axis: Axis) -> Iterator[Tile]:
        """A rectangle at ``origin`` of the local tensor, as rectangles of the global tensor."""
        for local, whole, length in self.sections(axis.rank, axis.size):
            first, stop = max(local, origin[dim]), min(local + length, origin[dim] + block.shape[dim])
            if first < stop:
                offset = (*origin[:dim], whole + first - local, *origin[dim + 1 :])
                yield Tile(block.narrow(dim, first - origin[dim], stop - first), offset)


@dataclass(frozen=True)
class Tile:
    """A rectangle of a global tensor. ``data``: a view of local memory; ``offset``: its position in the global
    tensor."""

    data: Tensor
    offset: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dim."""
        return tuple(self.data.shape)

    @property
    def box(self) -> Box:
        """The rectangle, without the data."""
        return self.offset, self.shape

    @property
    def place(self) -> tuple[slice, ...]:
        """Its position in the global tensor, as slices."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    @property
    def numbers(self) -> Tensor:
        """Its elements, for reading."""
        return self.data

    def put(self, first: int, numbers: Tensor) -> None:
        """Write rows, beginning with row ``first``."""
        self.data[first : first + len(numbers)].copy_(numbers)

    def writable(self) -> Iterator[Tile]:
        """Tiles to write in place; each must be written before the next is requested."""
        yield self


@dataclass(frozen=True)
class PackedTile(Tile):
    """A rectangle of a packed matrix. ``data``: its bytes, [rows, blocks, bytes of a block]; the other fields refer to
    the unpacked numbers."""

    packing: str

    @property
    def shape(self) -> tuple[int, ...]:
        rows, blocks, _ = self.data.shape
        return rows, blocks * PACKED_BLOCK

    @property
    def numbers(self) -> Tensor:
        return unpack(self.data, self.packing, torch.float32)

    def put(self, first: int, numbers: Tensor) -> None:
        self.data[first : first + len(numbers)].copy_(pack(numbers, self.packing))

    def writable(self) -> Iterator[Tile]:
        """Tiles of a few rows, packed when the next one is requested, so that never all numbers are in memory."""
        (rows, columns), (row, column) = self.shape, self.offset
        step = max(1, _WRITABLE // max(1, columns))
        for first in range(0, rows, step):
            part = torch.empty(min(step, rows - first), columns, device=self.data.device)
            yield Tile(part, (row + first, column))
            self.put(first, part)


_WRITABLE = 1 << 22  # numbers in memory at a time


@dataclass(frozen=True)
class Piece:
    """This rank's part of one global tensor of ``shape``: zero, one or several tiles."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    tiles: Sequence[Tile]

    @classmethod
    def whole(cls, data: Tensor) -> Piece:
        """The piece of a tensor that a rank holds completely."""
        return cls(tuple(data.shape), data.dtype, [Tile(data, (0,) * data.dim())])


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Elements ``start`` to ``stop`` of a contiguous tensor as rectangles, at most two for each dim but one:
    (first element, origin, size) of each, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield start, (start,)[: len(shape)], (stop - start,)[: len(shape)]
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the complete rows
    if start < first * row:
        yield from _in_row(shape, first - 1, start, min(stop, first * row))
    if first < last:
        yield first * row, (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last >= first and last * row < stop:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    before = row * math.prod(shape[1:])
    for first, origin, size in rectangles(shape[1:], start - before, stop - before):
        yield before + first, (row, *origin), (1, *size)


def attach(parameter: nn.Parameter, spec: ShardSpec, init: float | str) -> nn.Parameter:
    """Attach a ``spec`` and an initialisation to a parameter: "ones", or the std of a normal distribution (0: zeros).

    ``tensor_model_parallel`` is the attribute that DeepSpeed's clipping looks for.
    """
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    parameter.init = init  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = spec.dim is not None and spec.axis == "tp"  # type: ignore[attr-defined]
    return parameter


def spec_of(parameter: Tensor) -> ShardSpec:
    """The ``ShardSpec`` that the owning layer attached."""
    return parameter.shard_spec  # type: ignore[attr-defined,no-any-return]


def inits_of(model: nn.Module) -> dict[str, float | str]:
    """The initialisation of each parameter by layout-free name; a tied parameter appears once, under its first name."""
    return {name: parameter.init for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]


def pieces_of(model: nn.Module, tp: Axis) -> dict[str, Piece]:
    """A model's parameters as pieces by name, split over ``tp`` only."""
    return {name: spec_of(p).piece(p.detach(), tp) for name, p in model.named_parameters()}


def materialize(model: nn.Module, device: torch.device, shared: Mapping[str, nn.Parameter] | None = None) -> None:
    """Allocate the parameters of a model on the meta device on ``device``, uninitialised; their specs stay. Parameters
    in ``shared`` belong to another model and are shared with this one."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if shared is not None and name in shared:
                setattr(module, name.rpartition(".")[2], shared[name])
                continue
            real = nn.Parameter(
                torch.empty(parameter.shape, dtype=parameter.dtype, device=device), parameter.requires_grad
            )
            setattr(module, name.rpartition(".")[2], attach(real, spec_of(parameter), parameter.init))  # type: ignore[attr-defined]


def check_model(model: nn.Module, mesh: Mesh) -> None:
    """Refuse a model with a parameter that carries no spec or whose local shape contradicts it."""
    for name, parameter in model.named_parameters():
        spec = getattr(parameter, "shard_spec", None)
        assert spec is not None, f"parameter {name} has no ShardSpec; the layer that owns it must attach one"
        want = spec.stored.local_shape(mesh.axis(spec.axis).size)
        assert tuple(parameter.shape) == want, f"parameter {name} is {tuple(parameter.shape)}, its spec says {want}"


_INIT_BLOCK = 1 << 20  # elements drawn at a time; it determines the numbers, so it must never change


def fill_normal(piece: Piece, name: str, seed: int, std: float) -> None:
    """Fill a piece with its part of one global N(0, std²) tensor that depends on (seed, name, shape) alone.

    The global tensor is drawn in blocks of whole rows, each from its own generator, so that a rank never holds more
    than one block of it and skips blocks outside of its part. Draws are float32 on the CPU for every device.
    """
    rows, columns = piece.shape[0], math.prod(piece.shape[1:])
    block_rows = max(1, _INIT_BLOCK // max(1, columns))
    generator = torch.Generator()
    for start in range(0, rows, block_rows):
        stop = min(rows, start + block_rows)
        parts = [tile for tile in piece.tiles if tile.offset[0] < stop and tile.offset[0] + tile.shape[0] > start]
        if not parts:
            continue
        key = hashlib.sha256(f"{seed}/{name}/{start}".encode()).digest()
        generator.manual_seed(int.from_bytes(key[:8], "little") >> 1)
        block = torch.empty((stop - start, *piece.shape[1:]), device="cpu").normal_(0.0, std, generator=generator)
        for tile in parts:
            first, last = max(start, tile.offset[0]), min(stop, tile.offset[0] + tile.shape[0])
            tile.put(first - tile.offset[0], block[(slice(first - start, last - start), *tile.place[1:])])


@torch.no_grad()
def initialize(pieces: Mapping[str, Piece], inits: Mapping[str, float | str], seed: int) -> None:
    """Initialise every parameter, with the same global tensors at every layout. No communication."""
    for name, piece in pieces.items():
        init = inits[name]
        if init not in ("ones", 0.0):
            fill_normal(piece, name, seed, float(init))
            continue
        for tile in piece.tiles:
            tile.data.fill_(1.0 if init == "ones" else 0.0)
