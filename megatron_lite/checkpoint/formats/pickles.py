"""Reads pickled checkpoints of other programs without running anything.

A pickle names the functions to call. Here each name is one of the few that build tensors and containers, or is replaced
by an inert object (settings and enums of frameworks, which are not needed), or is refused; no foreign code is looked
up. Tensor data is stored uncompressed beside the pickle, and is read from there in parts.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.storage import open_regular
from megatron_lite.errors import CheckpointError

_INERT = ("megatron", "deepspeed", "argparse", "numpy", "types", "pathlib", "enum")  # packages of settings, not of data
_BUILTINS = {"set": set, "frozenset": frozenset, "slice": slice, "complex": complex, "bytearray": bytearray}
_STORAGES = {
    f"{kind}Storage": dtype
    for kind, dtype in {
        **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
        **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
        "Bool": torch.bool,
    }.items()
}


class Inert:
    """Stands for an object of a foreign class: holds its state as data, without behaviour."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Called for the items of a subclass of list; ignored."""

    def extend(self, values: Any) -> None:
        """Called for the items of a subclass of list; ignored."""


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file, ``start`` bytes from its beginning."""

    file: _Archive
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def read(self, first: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``first`` to ``stop``, flat; without arguments, all elements in the tensor's shape."""
        count = math.prod(self.shape)
        raw = self.file.pread(
            ((count if stop is None else stop) - first) * self.dtype.itemsize, self.start + first * self.dtype.itemsize
        )
        flat = torch.frombuffer(raw, dtype=self.dtype) if raw else torch.empty(0, dtype=self.dtype)
        return flat.view(self.shape) if stop is None and first == 0 else flat

    def fill(self, into: Tensor, first: int) -> None:
        """Read elements, beginning with ``first``, into a flat tensor in CPU memory."""
        if into.dtype != self.dtype:
            into.copy_(self.read(first, first + into.numel()))
        elif into.numel():
            self.file.fill(into.view(torch.uint8).numpy().data, self.start + first * self.dtype.itemsize)


class _Archive:
    """A file written by ``torch.save``: an uncompressed zip archive."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, open_regular(path)
        try:
            with zipfile.ZipFile(self._file) as archive:
                self.entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in self.entries.values()):
                    raise CheckpointError(f"{path}: compressed: not a file that torch.save wrote")
                size = self.entries["data.pkl"].file_size
                self.pickle = self.pread(size, self._start("data.pkl"))
        except (zipfile.BadZipFile, KeyError, NotImplementedError, ValueError, OSError) as error:
            raise CheckpointError(f"{path}: not a file that torch.save wrote: {error}") from None

    def _start(self, name: str) -> int:
        """The offset of an entry's data: after its local header and two fields of variable length."""
        entry = self.entries[name]
        local = self.pread(30, entry.header_offset)
        return (
            entry.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        )

    def pread(self, size: int, offset: int) -> bytearray:
        """Read bytes of the file: all of them, or raise an error."""
        if not 0 <= offset <= offset + size <= os.fstat(self._file.fileno()).st_size:
            raise CheckpointError(f"{self.path}: ends before byte {offset + size}")
        raw = bytearray(size)
        self.fill(memoryview(raw), offset)
        return raw

    def fill(self, rest: memoryview, offset: int) -> None:
        """Fill a buffer with bytes of the file completely, or raise an error."""
        while rest:
            count = os.preadv(self._file.fileno(), [rest[: 1 << 30]], offset)
            if count == 0:
                raise CheckpointError(f"{self.path}: ends before byte {offset + len(rest)}")
            rest, offset = rest[count:], offset + count

    def storage(self, key: str, dtype: torch.dtype) -> tuple[int, int]:
        """The offset of a storage, and its number of elements."""
        entry = self.entries.get(f"data/{key}")
        if entry is None:
            raise CheckpointError(f"{self.path}: storage {key!a} is missing")
        return self._start(f"data/{key}"), entry.file_size // dtype.itemsize


class SafeUnpickler(pickle.Unpickler):
    """Builds only objects named in ``allowed``, and refuses all others. ``where``: the file, for messages."""

    def __init__(self, raw: bytes | bytearray, allowed: Callable[[str, str], Any], where: Path) -> None:
        super().__init__(io.BytesIO(raw))
        self.allowed, self.where = allowed, where

    def find_class(self, module: str, name: str) -> Any:
        """Called for every name in a pickle."""
        found = self.allowed(module, name)
        if found is None:
            raise CheckpointError(f"unsafe pickle global {module}.{name} in {self.where}")
        return found

    def read(self) -> Any:
        """Load the pickle. Raises CheckpointError for any problem."""
        try:
            return self.load()
        except CheckpointError:
            raise
        except RecursionError:
            raise CheckpointError(f"{self.where}: nested too deeply") from None
        except Exception as error:  # a damaged pickle may raise anything
            raise CheckpointError(
                f"{self.where}: not a pickle that can be read: {' '.join(str(error).split())}"
            ) from None


def load_torch(path: Path) -> Any:
    """Load a file written by ``torch.save``, with tensors as ``StoredTensor``. Raises CheckpointError for anything but
    data."""
    archive = _Archive(path)

    def rebuild(storage: Any, offset: int, shape: Sequence[int], stride: Sequence[int], *_: Any) -> StoredTensor:
        dtype, start, length = storage
        wanted = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        strides = [(s, w) for s, w, n in zip(stride, wanted, shape, strict=True) if n > 1]
        if any(s != w for s, w in strides) or min([offset, *shape], default=0) < 0:
            raise CheckpointError(f"{path}: a tensor of shape {tuple(shape)} is not contiguous")
        if offset + math.prod(shape) > length:
            raise CheckpointError(f"{path}: a tensor of shape {tuple(shape)} is larger than its storage")
        return StoredTensor(archive, dtype, tuple(shape), start + offset * dtype.itemsize)

    def allowed(module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): rebuild,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda made, kind, args, state: made(*args),
            ("torch.nn.parameter", "Parameter"): Inert,
            ("torch", "Tensor"): Inert,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch", "device"): Inert,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("builtins", "__builtin__"):
            return _BUILTINS.get(name)
        return Inert if module.partition(".")[0] in _INERT else None

    unpickler = SafeUnpickler(archive.pickle, allowed, path)

    def persistent_load(saved: Any) -> Any:
        kind, dtype, key = saved[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{path}: storage of an unknown kind")
        return (dtype, *archive.storage(str(key), dtype))

    unpickler.persistent_load = persistent_load  # type: ignore[method-assign]
    return unpickler.read()
