"""Rewrites a checkpoint in our format, and compares two: streamed, in bounded memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_lite.checkpoint.commit import arrange, prepare, write
from megatron_lite.checkpoint.manifest import BoxEntry
from megatron_lite.checkpoint.shards import Holding, buffer
from megatron_lite.checkpoint.source import Source
from megatron_lite.checkpoint.tensor_file import DTYPE_NAMES, row_blocks
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import Tile
from megatron_lite.training.faults import Faults

Advance = Callable[[int], None]  # bytes done


def rewrite(
    source: Source,
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    extras: Mapping[str, bytes],
    *,
    files: int,
    block_bytes: int,
    advance: Advance,
) -> Path:
    """Commit a checkpoint of ours in ``folder`` with all tensors of ``source``, in ``files`` files of similar size.

    Memory: one block of rows, about ``block_bytes``. Raises StorageError or CheckpointError and leaves nothing behind.
    """
    total = sum(math.prod(info.shape) * info.dtype.itemsize for info in source.tensors.values())
    largest = max(1, total // (4 * files))  # small enough to balance the files
    held = {
        name: Holding(
            DTYPE_NAMES[info.dtype],
            info.shape,
            [
                (tuple(s.start for s in place), tuple(s.stop - s.start for s in place))
                for place in row_blocks(info.shape, info.dtype.itemsize, largest if files > 1 else total + 1)
            ],
        )
        for name, info in source.tensors.items()
    }

    def read(name: str, box: BoxEntry) -> Iterator[Any]:
        dtype = source.tensors[name].dtype
        for place in row_blocks(box.shape, dtype.itemsize, block_bytes):
            block = torch.empty([s.stop - s.start for s in place], dtype=dtype)
            source.read(name, Tile(block, tuple(o + s.start for o, s in zip(box.offset, place, strict=True))))
            yield buffer(block)
            advance(block.numel() * dtype.itemsize)

    world, was_there = Axis("world"), folder.exists()
    prepare(folder, world)
    try:
        return write(folder, step, arrange([held] * files, world), read, state, extras, world, Faults.none())
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):  # another process is using the folder
                folder.rmdir()
        raise


class Difference(NamedTuple):
    """How one tensor differs: the largest absolute difference, the same relative to the largest element, and the number
    of unequal elements."""

    name: str
    absolute: float
    relative: float
    elements: int


def diff(a: Source, b: Source, block_bytes: int, advance: Advance) -> tuple[list[str], list[Difference]]:
    """Names that exist in only one source or with different shapes, and the tensors whose values differ. Padding of the
    vocabulary is ignored."""
    odd = [f"only in {a.path}: {name}" for name in sorted(a.tensors.keys() - b.tensors.keys())]
    odd += [f"only in {b.path}: {name}" for name in sorted(b.tensors.keys() - a.tensors.keys())]
    differences = []
    for name in (name for name in a.tensors if name in b.tensors):
        ours, theirs = a.tensors[name], b.tensors[name]
        shape = a.true_shape(name)
        if shape != b.true_shape(name):
            odd.append(f"{name}: shape {shape} in {a.path}, {b.true_shape(name)} in {b.path}")
            continue
        absolute = peak = 0.0
        count = 0
        dtype = torch.promote_types(ours.dtype, theirs.dtype)
        for place in row_blocks(shape, dtype.itemsize, block_bytes):
            sizes, offset = [s.stop - s.start for s in place], tuple(s.start for s in place)
            left, right = torch.empty(sizes, dtype=dtype), torch.empty(sizes, dtype=dtype)
            a.read(name, Tile(left, offset))
            b.read(name, Tile(right, offset))
            advance(2 * left.numel() * dtype.itemsize)
            unequal = left.ne(right) & ~(left.isnan() & right.isnan())
            if unequal.any():
                gap = (left.double() - right.double()).abs().nan_to_num(nan=math.inf)
                absolute, count = max(absolute, float(gap.max())), count + int(unequal.sum())
            peak = max(peak, float(left.abs().max().nan_to_num()) if left.numel() else 0.0)
        if count:
            differences.append(Difference(name, absolute, absolute / peak if peak else math.inf, count))
    return odd, differences
