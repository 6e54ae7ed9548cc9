"""Which kind of checkpoint a path leads to."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.checkpoint.hf import HuggingFaceSource, is_hugging_face
from megatron_lite.checkpoint.reading import open_checkpoint
from megatron_lite.checkpoint.retention import find
from megatron_lite.checkpoint.source import CheckpointSource, Source
from megatron_lite.dist.mesh import Axis


def open_source(
    path: Path, world: Axis | None = None, *, trust: bool = False, vocab_multiple: int | None = None
) -> Source:
    """A checkpoint of ours (or a run, or its ``checkpoints``: the latest) or a Hugging Face folder, checked.

    Collective over ``world``, which shares the hashing. ``trust``: nothing is hashed. ``vocab_multiple``: what a
    vocabulary that was never padded is padded to. Raises CheckpointError.
    """
    if is_hugging_face(path):
        return HuggingFaceSource(path, vocab_multiple)
    return CheckpointSource(open_checkpoint(find(path), world, trust=trust))
