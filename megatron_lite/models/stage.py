"""Which part of a model a process holds: the seam at which pipeline parallelism cuts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A contiguous range of a model's blocks. ``first``: the embedding is here, too; ``last``: norm and projection."""

    blocks: range
    first: bool = True
    last: bool = True
