"""The part of a model that a process holds; pipeline parallelism would divide a model into these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A contiguous range of a model's blocks. ``first``: the embedding is here, too; ``last``: norm and projection."""

    blocks: range
    first: bool = True
    last: bool = True
