"""``ShardSpec``: which part of a global parameter a rank holds.

A parameter at rest is an ordinary local tensor. The layer that owns it attaches a ``ShardSpec``; initialisation,
gradient norm, checkpoints and adapters all derive from it (docs/adr/0001). The idea of local tensors with shard
metadata is nanotron's; initialising by slicing one global tensor is picotron's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
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

    def take(self, tensor: Tensor, rank: int, size: int) -> Tensor:
        """The local tensor of ``rank``, copied out of the global ``tensor``."""
        local = tensor.new_empty(self.local_shape(size))
        for box in self.boxes(rank, size):
            local[box.local] = tensor[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
        return local

    def put(self, local: Tensor, rank: int, size: int, into: Tensor) -> None:
        """Write the ``local`` tensor of ``rank`` at its place in the global tensor ``into``."""
        for box in self.boxes(rank, size):
            into[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] = local[box.local]


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


def named_shards(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ShardSpec]]:
    """Every parameter with its layout-free name and its spec; a tied parameter appears once, under its first name."""
    for name, parameter in model.named_parameters():
        yield name, parameter, spec_of(parameter)


def check_model(model: nn.Module, size: int) -> None:
    """Refuse a model with a parameter that carries no spec or whose local shape contradicts it."""
    for name, parameter in model.named_parameters():
        spec = getattr(parameter, "shard_spec", None)
        assert spec is not None, f"parameter {name} has no ShardSpec; the layer that owns it must attach one"
        want = spec.local_shape(size)
        assert tuple(parameter.shape) == want, f"parameter {name} is {tuple(parameter.shape)}, its spec says {want}"


_INIT_BLOCK = 1 << 20  # elements drawn at a time; the numbers depend on it, so it never changes


def fill_normal(parameter: Tensor, name: str, spec: ShardSpec, seed: int, std: float, rank: int, size: int) -> None:
    """Fill a local shard with its slice of one global N(0, std²) tensor that depends on (seed, name, shape) alone.

    The global tensor is drawn in blocks of whole rows, each from its own generator, so that a rank never holds more
    than one block of it and skips the blocks it has no part in. Draws are float32 on the CPU whatever the device.
    """
    columns = math.prod(spec.shape[1:])
    block_rows = max(1, _INIT_BLOCK // max(1, columns))
    generator = torch.Generator()
    boxes = spec.boxes(rank, size)
    with torch.no_grad():
        for start in range(0, spec.shape[0], block_rows):
            rows = min(block_rows, spec.shape[0] - start)
            parts = [b for b in boxes if b.offset[0] < start + rows and b.offset[0] + b.shape[0] > start]
            if not parts:
                continue
            key = hashlib.sha256(f"{seed}/{name}/{start}".encode()).digest()
            generator.manual_seed(int.from_bytes(key[:8], "little") >> 1)
            block = torch.empty((rows, *spec.shape[1:])).normal_(0.0, std, generator=generator)
            for box in parts:
                first, last = max(start, box.offset[0]), min(start + rows, box.offset[0] + box.shape[0])
                local_row = box.local[0].start + first - box.offset[0]
                into = parameter[(slice(local_row, local_row + last - first), *box.local[1:])]
                others = (slice(o, o + n) for o, n in zip(box.offset[1:], box.shape[1:], strict=True))
                into.copy_(block[(slice(first - start, last - start), *others)])


def initialize(model: nn.Module, seed: int, tp: Axis) -> None:
    """Give every parameter its first value: the same global tensors at every layout. No communication."""
    for name, parameter, spec in named_shards(model):
        init: float | str = parameter.init  # type: ignore[attr-defined]
        with torch.no_grad():
            if init == "ones":
                parameter.fill_(1.0)
            elif init == 0.0:
                parameter.zero_()
            else:
                fill_normal(parameter, name, spec, seed, float(init), tp.rank, tp.size)
