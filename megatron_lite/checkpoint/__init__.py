"""Layout-independent checkpoints: boxes of global tensors, verified before use, committed atomically.

Call ``prepare`` at the start of a run, ``newest`` or ``open_checkpoint`` to resume, ``save`` and ``prune`` during it.
"""

from megatron_lite.checkpoint.adapters.fingerprint import check_base, fingerprint, load_base
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.commit import committed, prepare, save
from megatron_lite.checkpoint.opening import open_adapter, open_source
from megatron_lite.checkpoint.reading import Checkpoint, open_checkpoint
from megatron_lite.checkpoint.retention import find, newest, prune
from megatron_lite.checkpoint.source import CheckpointSource, Source
from megatron_lite.checkpoint.storage import agree
from megatron_lite.distributed.shard import Piece

__all__ = [
    "BackgroundSaver",
    "Checkpoint",
    "CheckpointSource",
    "Piece",
    "Source",
    "agree",
    "check_base",
    "committed",
    "find",
    "fingerprint",
    "load_base",
    "newest",
    "open_adapter",
    "open_checkpoint",
    "open_source",
    "prepare",
    "prune",
    "save",
]
