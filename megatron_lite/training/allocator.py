"""Tunes glibc's malloc, which serves torch's CPU tensors: whether freed blocks go back to the system."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST = 32 << 20  # the largest value that glibc accepts for the latter


def keep_freed() -> None:
    """Keep freed blocks of up to 32 MiB in this process. Each training step allocates what the last one freed; returned
    to the system in between, every page would be mapped and zeroed again. Larger blocks are returned: kept, they would
    be split, and more of them would be needed."""
    _set(_M_MMAP_THRESHOLD, _LARGEST)
    _set(_M_TRIM_THRESHOLD, -1)


def return_freed(size: int) -> None:
    """Return freed blocks of ``size`` bytes and more to the system. By default glibc keeps ever larger blocks, and ever
    more of them, since few fit the next request."""
    _set(_M_MMAP_THRESHOLD, size)


def _set(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(option, value)
