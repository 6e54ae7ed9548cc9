"""What glibc's malloc, from which torch takes the memory of CPU tensors, does with what is freed."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST = 32 << 20  # the most that glibc takes for the latter


def keep_freed() -> None:
    """From now on this process keeps freed blocks of up to 32 MiB. A training step frees the tensors that the next one
    makes again; where they go back to the system in between, every page of theirs is mapped and zeroed anew. Larger
    blocks do go back: kept, they would be cut up, and more of them be needed."""
    _set(_M_MMAP_THRESHOLD, _LARGEST)
    _set(_M_TRIM_THRESHOLD, -1)


def return_freed(size: int) -> None:
    """From now on freed blocks of ``size`` bytes and more go back to the system. Left alone, glibc keeps ever larger
    ones, and ever more, as few fit what comes next."""
    _set(_M_MMAP_THRESHOLD, size)


def _set(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(option, value)
