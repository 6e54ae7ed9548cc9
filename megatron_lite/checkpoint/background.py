"""Saving beside training: a step waits for a copy of what this rank writes, the disk is waited for in the background.

What is written is the copy, so a checkpoint never mixes steps; it is committed like any other, by ranks that agree over
a process group of their own. The idea is CheckFreq's (Mohan et al. 2021): snapshot, then persist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from megatron_lite.checkpoint import shards
from megatron_lite.checkpoint.commit import arrange, write
from megatron_lite.checkpoint.manifest import BoxEntry
from megatron_lite.dist.mesh import Axis
from megatron_lite.faults import Faults

Box = tuple[str, tuple[int, ...], tuple[int, ...]]


class BackgroundSaver:
    """One save at a time: a second one waits for the first. Making it is collective over ``world``.

    Memory: a copy, in (pinned) host buffers that every save uses again, of what this rank writes: with dp replicas of a
    tensor only one of them copies it.
    """

    def __init__(self, world: Axis) -> None:
        group = torch_dist.new_group(backend="gloo") if world.size > 1 else None
        self.world, self.axis = world, Axis("saving", world.rank, world.size, group)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: Future[None] | None = None
        self._buffers: dict[Box, Tensor] = {}

    @property
    def failed(self) -> bool:
        """Whether the save at work has failed on this rank; ``wait`` then raises why, on every rank."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """For the save at work, if there is one. Raises on every rank what any of them met."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def save(
        self,
        folder: Path,
        step: int,
        pieces: Mapping[str, shards.Piece],
        state: Mapping[str, Any],
        extras: Mapping[str, bytes],
        faults: Faults,
        then: Callable[[Path], None],
    ) -> None:
        """Like ``commit.save``, but back as soon as everything is copied. ``then`` is called, in the background, with
        the path of what was committed. Raises what the save before it met."""
        self.wait()
        faults.at("save", step)
        layout = arrange([shards.holdings(pieces)], self.world)
        copies = self._copy(pieces, [box for file in layout.own.values() for box in file.boxes])

        def read(name: str, entry: BoxEntry) -> Iterable[Any]:
            return [shards.buffer(copies[_box(name, entry)])]

        def persist() -> None:
            then(write(folder, step, layout, read, dict(state), extras, self.axis, faults))

        self._pending = self._thread.submit(persist)

    def _copy(self, pieces: Mapping[str, shards.Piece], boxes: Iterable[tuple[str, BoxEntry]]) -> dict[Box, Tensor]:
        fresh: dict[Box, Tensor] = {}
        for name, entry in boxes:
            tile = shards.tile_of(pieces[name], entry)
            box, source = _box(name, entry), tile.data.detach()
            buffer = self._buffers.get(box)
            if buffer is None or buffer.dtype != source.dtype:
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            fresh[box] = buffer.copy_(source, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._buffers = fresh
        return fresh


def _box(name: str, entry: BoxEntry) -> Box:
    return name, tuple(entry.offset), tuple(entry.shape)
