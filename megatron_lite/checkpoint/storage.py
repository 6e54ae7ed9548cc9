"""Durable file operations whose failures are one line, and agreement of all ranks on the outcome."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megatron_lite.checkpoint.manifest import FileEntry
from megatron_lite.distributed.comm import gather_objects
from megatron_lite.distributed.mesh import Axis
from megatron_lite.errors import CheckpointError, MegatronLiteError, StorageError
from megatron_lite.training.faults import Faults

Result = TypeVar("Result")
_STRETCH = 32 << 20  # bytes
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def agree(world: Axis, action: Callable[[], Result], path: Path, need: int = 0) -> list[Result]:
    """Run ``action`` on every rank. Returns the results in rank order, or raises the first rank's error on every rank.

    An ``OSError`` becomes a StorageError about ``path`` (see ``storage_errors``). One gather over ``world``, so that no
    rank waits for one that has failed.
    """
    value: Any = None
    error: MegatronLiteError | None = None
    try:
        with storage_errors(path, need):
            value = action()
    except MegatronLiteError as caught:
        error = caught
    outcomes = gather_objects((value, error), world)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise failure if world.size == 1 else type(failure)(f"{failure} (rank {rank})")
    return [value for value, _ in outcomes]


@contextlib.contextmanager
def storage_errors(path: Path, need: int = 0) -> Iterator[None]:
    """Turn an ``OSError`` about ``path`` into a StorageError. ``need``: the number of bytes to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(path, need) from error
        raise StorageError(
            f"{error.filename2 or error.filename or path}: {(error.strerror or str(error)).lower()}"
        ) from error


def disk_full(folder: Path, need: int) -> StorageError:
    """The error for a disk without ``need`` free bytes."""
    return StorageError(f"disk full: need {amount(need)}, have {amount(free_space(folder))} at {folder}")


def free_space(folder: Path) -> int:
    """Free bytes for an ordinary user in ``folder``; 0 if it does not exist."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def amount(size: float) -> str:
    """A number of bytes in readable units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def write_file(path: Path, chunks: Iterable[Any], faults: Faults) -> FileEntry:
    """Write buffers to a new file and fsync it. Hashing runs in parallel with writing.

    Write-back is started after every stretch, not at the final fsync, so that it overlaps with hashing.
    """
    digest, size, hashed = hashlib.sha256(), 0, None
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        for chunk in chunks:
            faults.file_operation(f"write {path.name}")
            rest = memoryview(chunk).cast("B")
            if hashed:
                hashed.result()
            hashed = beside.submit(digest.update, rest)
            while rest:
                written = file.write(rest[:_STRETCH])
                os.posix_fadvise(file.fileno(), size, written, os.POSIX_FADV_DONTNEED)  # starts writing dirty pages
                rest, size = rest[written:], size + written
        faults.file_operation(f"fsync {path.name}")
        os.fsync(file.fileno())
    return FileEntry(size=size, sha256=digest.hexdigest())


def sync_folder(folder: Path, faults: Faults) -> None:
    """Make the entries of ``folder`` durable."""
    faults.file_operation(f"fsync {folder.name}/")
    with open_folder(folder) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def open_folder(folder: Path, lock: bool = False) -> Iterator[int]:
    """A descriptor of ``folder``; with ``lock``, locked, which tells other processes that it is in use.

    Raises BlockingIOError if another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if lock:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:
                pass  # a file system without locks, such as many Lustre mounts
        yield descriptor
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; links, pipes and devices are refused without opening them."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return io.BufferedReader(io.FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)))


def rename(source: Path, target: Path, faults: Faults) -> None:
    """Rename within one file system."""
    faults.file_operation(f"rename {source.name} {target.name}")
    source.rename(target)


def replace_file(path: Path, content: bytes, faults: Faults) -> None:
    """Replace a small file atomically."""
    temporary = path.with_name(f".{path.name}.{nonce()}")
    try:
        write_file(temporary, [content], faults)
        faults.file_operation(f"replace {path.name}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent, faults)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``folder`` when the ``with`` block succeeds, and removed otherwise.

    Raises StorageError if ``folder`` exists already or cannot be created.
    """
    if folder.exists():
        raise StorageError(f"{folder} is there already")
    with storage_errors(folder):
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.absolute().with_name(f".{folder.name}.{nonce()}")
        temporary.mkdir()
        try:
            yield temporary
            sync_folder(temporary, Faults.none())
            temporary.rename(folder)
            sync_folder(folder.absolute().parent, Faults.none())
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def nonce() -> str:
    """A unique name."""
    return uuid.uuid4().hex[:12]
