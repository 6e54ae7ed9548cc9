"""The files of a dataset: memory-mapped without the risk of SIGBUS, and synced to disk when written."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron_lite.errors import DataError, StorageError

_HASHED_WHOLE = 32 << 20  # bytes; of a larger file, sample() yields blocks of this total size
_BLOCK = 64 << 10


class MappedFile:
    """One read-only file, memory-mapped as a whole.

    Touching a mapped page beyond the end of the file kills the process with SIGBUS. So ``check`` compares the size with
    the original one: call it before reading from a file that may be truncated while in use.

    Raises:
        DataError: the file is missing or unreadable; from ``check``, it has been truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    self.size = len(self._map)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from None

    def check(self) -> None:
        """Raise DataError if the file has been cut short since it was opened (one ``fstat``)."""
        if self.size and self._map.size() < self.size:
            raise DataError(f"{self.path}: truncated while in use, from {self.size} to {self._map.size()} bytes")

    def read(self, start: int, stop: int) -> bytes:
        """A copy of the bytes [start, stop)."""
        return self._map[start:stop] if self.size else b""

    def array(self, dtype: np.dtype, count: int, offset: int = 0) -> np.ndarray:
        """``count`` entries from byte ``offset`` on, as a read-only view of the mapping."""
        return np.frombuffer(self._map, dtype, count, offset) if count else np.empty(0, dtype)

    def sample(self) -> Iterator[bytes]:
        """The whole content of a file up to 32 MiB; of a larger one, that much in evenly spaced blocks, ends
        included."""
        starts = range(0, self.size, _BLOCK)
        if self.size > _HASHED_WHOLE:
            starts = np.linspace(0, self.size - _BLOCK, _HASHED_WHOLE // _BLOCK).astype(np.int64).tolist()
        for start in starts:
            self.check()
            yield self.read(start, start + _BLOCK)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about ``path`` into a StorageError: one line and exit code 7."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
            free = shutil.disk_usage(folder).free
            raise StorageError(f"{path}: disk full, {free:,} bytes left") from error
        raise StorageError(f"{error.filename or path}: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
