"""Asynchronous saving: a rank's state is copied while the next step computes, and written in the background.

Only an update changes weights and optimizer state, so the next update waits for the copy, and a checkpoint never mixes
steps. It is committed like any other checkpoint; the ranks agree over a process group of their own. "Snapshot, then
persist" is from CheckFreq (Mohan et al. 2021); copying during forward and backward, which do not change the state, is
from DataStates-LLM (Maurya et al. 2024).
"""

from __future__ import annotations

import contextlib
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
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import Box
from megatron_lite.training.faults import Faults


class BackgroundSaver:
    """Runs one save at a time; a second one waits for the first. Its construction is collective over ``world``.

    Memory: one copy of what this rank writes, in (pinned) host buffers that are reused by every save. If dp replicas
    hold the same tensor, only one of them copies it.
    """

    def __init__(self, world: Axis, device: torch.device) -> None:
        self.device = device
        group = torch_dist.new_group(backend="gloo") if world.size > 1 else None
        self.world, self.axis = world, Axis("saving", world.rank, world.size, group)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._copied: Future[None] | None = None
        self._pending: Future[None] | None = None
        self._buffers: dict[tuple[str, Box], Tensor] = {}

    @property
    def failed(self) -> bool:
        """Whether the running save has failed on this rank; ``wait`` then raises the reason, on every rank."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait_for_copy(self) -> None:
        """Wait until the state is copied; call it before the state changes. Raises errors on this rank only."""
        copied, self._copied = self._copied, None
        if copied is not None:
            copied.result()

    def wait(self) -> None:
        """Wait for the running save, if any. An error on any rank is raised on every rank."""
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
        """Like ``commit.save``, but returns once it is decided which rank writes what. Call ``wait_for_copy`` before
        the pieces change. ``then`` is called in the background with the path of the committed checkpoint. Raises
        errors of the previous save."""
        self.wait()
        faults.at("save", step)
        layout = arrange([shards.holdings(pieces)], self.world)
        sources = {
            (name, entry.box): shards.tile_of(pieces[name], entry).data.detach()
            for file in layout.own.values()
            for name, entry in file.boxes
        }
        copies = self._buffers = {named: self._buffer(named, source) for named, source in sources.items()}
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))

        def copy() -> None:
            faults.at("copy", step)
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                for named, source in sources.items():
                    copies[named].copy_(source, non_blocking=True)
            if stream is not None:
                stream.synchronize()

        def read(name: str, entry: BoxEntry) -> Iterable[Any]:
            return [shards.buffer(copies[name, entry.box])]

        def persist() -> None:
            copied.result()
            then(write(folder, step, layout, read, dict(state), extras, self.axis, faults))

        self._copied = copied = self._thread.submit(copy)
        self._pending = self._thread.submit(persist)

    def _buffer(self, named: tuple[str, Box], source: Tensor) -> Tensor:
        """Host memory for a copy; the buffer of the last save if it fits."""
        buffer = self._buffers.get(named)
        if buffer is None or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        return buffer
