"""Reads parts of safetensors files without memory-mapping them.

The safetensors library checks the header. Data is read with ``pread``, directly into the tensor if the layouts match,
else through a bounded buffer. So the pages read do not count as this process's memory, and a truncated file is an error
instead of a SIGBUS.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lite.checkpoint.manifest import parse_json
from megatron_lite.checkpoint.storage import open_regular
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
BUFFER_BYTES = 16 << 20
HASHED_BYTES = 256 << 10  # read size while hashing: fits into a core's cache


class Digest(Protocol):
    """A hashlib digest."""

    def update(self, data: Any, /) -> None: ...


class Stored(NamedTuple):
    """A tensor in a file: dtype, shape, and where its bytes begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """An open safetensors file. Raises CheckpointError if it is not one."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, open_regular(path)
        self.tensors = self._header()

    def _header(self) -> dict[str, Stored]:
        size = int.from_bytes(self._pread(8, 0), "little")
        if size > min(MAX_HEADER_BYTES, os.fstat(self._file.fileno()).st_size):
            raise CheckpointError(f"{self.path}: a header of {size} bytes is not that of a safetensors file")
        tree = parse_json(self._pread(size, 8), self.path)
        try:
            with safe_open(self.path, framework="numpy"):  # checks sizes, offsets, bounds
                pass
            return {
                name: Stored(DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
                for name, entry in tree.items()
                if name != "__metadata__"
            }
        except (SafetensorError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        except KeyError as error:
            raise CheckpointError(f"{self.path}: unsupported dtype {error}") from None

    def close(self) -> None:
        """Close the descriptor."""
        self._file.close()

    def _pread(self, size: int, offset: int) -> bytes:
        raw = os.pread(self._file.fileno(), size, offset)
        if len(raw) < size:
            raise CheckpointError(f"{self.path}: ends before byte {offset + size}")
        return raw

    def _fill(self, target: Tensor, offset: int, digest: Digest | None) -> None:
        """Fill a contiguous tensor in CPU memory from the file, and hash the bytes while they are in the cache."""
        rest, most = target.view(-1).view(torch.uint8).numpy().data, HASHED_BYTES if digest else 1 << 30
        while rest:
            count = os.preadv(self._file.fileno(), [rest[:most]], offset)
            if count == 0:
                raise CheckpointError(f"{self.path}: ends before byte {offset + len(rest)}")
            if digest:
                digest.update(rest[:count])
            rest, offset = rest[count:], offset + count

    def read(self, name: str, place: Sequence[slice], into: Tensor) -> None:
        """Fill ``into`` with the rectangle ``place`` of a tensor, converting between float dtypes."""
        self._read(self.tensors[name], [(place, into)], None)

    def read_all(self, wanted: Mapping[str, Sequence[tuple[Sequence[slice], Tensor]]], digest: Digest) -> None:
        """Fill all ``wanted`` rectangles in one pass over the whole file, which also updates ``digest``."""
        size = os.fstat(self._file.fileno()).st_size
        # The library has checked that tensors follow each other without gaps, up to the end of the file.
        self._fill(
            torch.empty(min((t.start for t in self.tensors.values()), default=size), dtype=torch.uint8), 0, digest
        )
        for name, stored in sorted(self.tensors.items(), key=lambda item: item[1].start):
            self._read(stored, wanted.get(name, ()), digest)

    def _read(self, stored: Stored, wanted: Sequence[tuple[Sequence[slice], Tensor]], digest: Digest | None) -> None:
        """Fill rectangles of a tensor from the rows that contain them; with ``digest``, read all of its rows."""
        if not stored.shape:
            stored, wanted = stored._replace(shape=(1,)), [([slice(0, 1)], into.unsqueeze(0)) for _, into in wanted]
        wanted = [(place, into) for place, into in wanted if into.numel() > 0]
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        cuts = {row for place, _ in wanted for row in (place[0].start, place[0].stop)}
        for first, last in itertools.pairwise(sorted(cuts | ({0, stored.shape[0]} if digest else set()))):
            reads = [
                (p, into[first - p[0].start : last - p[0].start])
                for p, into in wanted
                if first in range(p[0].start, p[0].stop)
            ]
            if len(reads) == 1 and _lies_alike(stored, *reads[0]):
                self._fill(reads[0][1], stored.start + first * row_bytes, digest)
            elif reads or digest:
                step = max(1, BUFFER_BYTES // max(1, row_bytes))
                for row in range(first, last, step):
                    buffer = torch.empty((min(step, last - row), *stored.shape[1:]), dtype=stored.dtype)
                    self._fill(buffer, stored.start + row * row_bytes, digest)
                    for (_, *columns), into in reads:
                        into[row - first : row - first + len(buffer)].copy_(buffer[(slice(None), *columns)])


def _lies_alike(stored: Stored, place: Sequence[slice], into: Tensor) -> bool:
    """Whether ``into`` has the same bytes in memory as these rows have in the file."""
    whole = all((c.start, c.stop) == (0, n) for c, n in zip(place[1:], stored.shape[1:], strict=True))
    return whole and into.dtype == stored.dtype and into.is_contiguous() and into.device.type == "cpu"


def header(tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: dict[str, str] | None = None) -> bytes:
    """The header of a safetensors file that holds these tensors in order."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_HEADER_BYTES, f"{len(tensors)} tensors are too many for one file"
    return len(text).to_bytes(8, "little") + text


def row_blocks(shape: Sequence[int], item_size: int, limit: int) -> Iterator[tuple[slice, ...]]:
    """A tensor as consecutive blocks of whole rows of at most ``limit`` bytes (but at least one row)."""
    if not shape:
        yield ()
        return
    step = max(1, limit // max(1, math.prod(shape[1:]) * item_size))
    for first in range(0, shape[0], step):
        yield (slice(first, min(first + step, shape[0])), *(slice(0, n) for n in shape[1:]))
