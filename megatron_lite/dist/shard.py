"""``ShardSpec``: which part of a global parameter a rank holds.

A parameter at rest is an ordinary local tensor. The layer that owns it attaches a ``ShardSpec``; initialisation,
gradient norm, checkpoints and adapters all derive from it (docs/adr/0001). The idea of local tensors with shard
metadata is nanotron's; initialising by slicing one global tensor is picotron's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lite.dist.mesh import Axis


@dataclass(frozen=True)
class Box:
    """A rectangle of a global tensor: ``local`` are its slices in the local tensor, ``offset`` its global origin."""

    local: tuple[slice, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def place(self) -> tuple[slice, ...]:
        """Its slices in the global tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))


@dataclass(frozen=True)
class ShardSpec:
    """How one global parameter is split over the tensor-parallel axis.

    ``shape``: the global shape. ``dim``: the dim that is split, or None where every rank holds the whole.
    ``chunks``: sizes along ``dim`` that are split separately and whose parts are concatenated (fused q, k, v; gate
    and up); None for one chunk.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    chunks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert self.dim is None or 0 <= self.dim < len(self.shape)
        assert self.chunks is None or (self.dim is not None and sum(self.chunks) == self.shape[self.dim])

    @property
    def sections(self) -> tuple[int, ...]:
        """The chunk sizes along ``dim``; one section where the parameter is not fused."""
        return self.chunks or (self.shape[self.dim],) if self.dim is not None else ()

    def boxes(self, rank: int, size: int) -> list[Box]:
        """The rectangles of the global tensor that ``rank`` of ``size`` holds, in local order."""
        if self.dim is None:
            return [Box(tuple(slice(0, n) for n in self.shape), (0,) * len(self.shape), self.shape)]
        found, local_start, global_start = [], 0, 0
        for section in self.sections:
            assert section % size == 0, f"{size} ranks do not divide a section of {section}"
            part = section // size
            local = [slice(0, n) for n in self.shape]
            local[self.dim] = slice(local_start, local_start + part)
            offset = [0] * len(self.shape)
            offset[self.dim] = global_start + rank * part
            shape = list(self.shape)
            shape[self.dim] = part
            found.append(Box(tuple(local), tuple(offset), tuple(shape)))
            local_start, global_start = local_start + part, global_start + section
        return found

    def local_shape(self, size: int) -> tuple[int, ...]:
        """The shape of the tensor that each of ``size`` ranks holds."""
        shape = list(self.shape)
        if self.dim is not None:
            shape[self.dim] //= size
        return tuple(shape)

    def piece(self, local: Tensor, tp: Axis) -> Piece:
        """What ``local``, this rank's part along ``tp``, is of the global tensor."""
        return Piece(local, self.shape, self.boxes(tp.rank, tp.size))


@dataclass(frozen=True)
class Piece:
    """What this rank holds of one global tensor: ``data`` is local, ``shape`` global, ``boxes`` say what lies where."""

    data: Tensor
    shape: tuple[int, ...]
    boxes: Sequence[Box]

    @classmethod
    def whole(cls, data: Tensor) -> Piece:
        """A tensor of which every rank that names it holds all."""
        shape = tuple(data.shape)
        return cls(data, shape, [Box(tuple(slice(0, n) for n in shape), (0,) * len(shape), shape)])

    def rows(self, start: int, data: Tensor) -> Piece:
        """The piece whose local tensor is ``data``: those rows of this one that begin at ``start``."""
        stop, found = start + data.shape[0], []
        for box in self.boxes:
            first, last = max(start, box.local[0].start), min(stop, box.local[0].stop)
            if first < last:
                local = (slice(first - start, last - start), *box.local[1:])
                offset = (box.offset[0] + first - box.local[0].start, *box.offset[1:])
                found.append(Box(local, offset, (last - first, *box.shape[1:])))
        return Piece(data, self.shape, found)

    def boxes_with_content(self) -> Iterator[Box]:
        """The boxes with at least one element."""
        return (box for box in self.boxes if math.prod(box.shape))


def attach(parameter: nn.Parameter, spec: ShardSpec, init: float | str) -> nn.Parameter:
    """Attach to a parameter its ``spec`` and how it starts: "ones", or the standard deviation of a normal (0: zeros).

    ``tensor_model_parallel`` is the mark that DeepSpeed's clipping looks for.
    """
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    parameter.init = init  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = spec.dim is not None  # type: ignore[attr-defined]
    return parameter


def spec_of(parameter: Tensor) -> ShardSpec:
    """The ``ShardSpec`` that the owning layer attached."""
    return parameter.shard_spec  # type: ignore[attr-defined,no-any-return]


def inits_of(model: nn.Module) -> dict[str, float | str]:
    """How each parameter starts, by its layout-free name; a tied parameter appears once, under its first name."""
    return {name: parameter.init for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]


def pieces_of(model: nn.Module, tp: Axis) -> dict[str, Piece]:
    """A model's parameters, split over ``tp`` alone, by name."""
    return {name: spec_of(p).piece(p.detach(), tp) for name, p in model.named_parameters()}


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give the parameters of a model on the meta device memory on ``device``, uninitialised; their marks stay."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            real = nn.Parameter(torch.empty_like(parameter, device=device))
            setattr(module, name, attach(real, spec_of(parameter), parameter.init))  # type: ignore[attr-defined]


def check_model(model: nn.Module, size: int) -> None:
    """Refuse a model with a parameter that carries no spec or whose local shape contradicts it."""
    for name, parameter in model.named_parameters():
        spec = getattr(parameter, "shard_spec", None)
        assert spec is not None, f"parameter {name} has no ShardSpec; the layer that owns it must attach one"
        want = spec.local_shape(size)
        assert tuple(parameter.shape) == want, f"parameter {name} is {tuple(parameter.shape)}, its spec says {want}"


_INIT_BLOCK = 1 << 20  # elements drawn at a time; the numbers depend on it, so it never changes


def fill_normal(piece: Piece, name: str, seed: int, std: float) -> None:
    """Fill a piece with its part of one global N(0, std²) tensor that depends on (seed, name, shape) alone.

    The global tensor is drawn in blocks of whole rows, each from its own generator, so that a rank never holds more
    than one block of it and skips the blocks it has no part in. Draws are float32 on the CPU whatever the device.
    """
    rows, columns = piece.shape[0], math.prod(piece.shape[1:])
    block_rows = max(1, _INIT_BLOCK // max(1, columns))
    generator = torch.Generator()
    for start in range(0, rows, block_rows):
        stop = min(rows, start + block_rows)
        parts = [b for b in piece.boxes if b.offset[0] < stop and b.offset[0] + b.shape[0] > start]
        if not parts:
            continue
        key = hashlib.sha256(f"{seed}/{name}/{start}".encode()).digest()
        generator.manual_seed(int.from_bytes(key[:8], "little") >> 1)
        block = torch.empty((stop - start, *piece.shape[1:]), device="cpu").normal_(0.0, std, generator=generator)
        for box in parts:
            first, last = max(start, box.offset[0]), min(stop, box.offset[0] + box.shape[0])
            local_row = box.local[0].start + first - box.offset[0]
            into = piece.data[(slice(local_row, local_row + last - first), *box.local[1:])]
            into.copy_(block[(slice(first - start, last - start), *box.place[1:])])


@torch.no_grad()
def initialize(pieces: Mapping[str, Piece], inits: Mapping[str, float | str], seed: int) -> None:
    """Give every parameter its first value: the same global tensors at every layout. No communication."""
    for name, piece in pieces.items():
        init = inits[name]
        if init == "ones":
            piece.data.fill_(1.0)
        elif init == 0.0:
            piece.data.zero_()
        else:
            fill_normal(piece, name, seed, float(init))
