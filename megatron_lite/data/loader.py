"""Batches for training, cut by data-parallel rank, read ahead.

A loader is the dataset's order read at the positions that belong to its rank; its whole state is one number, the
samples consumed. All ranks of one tensor-parallel group have the same dp rank and so read the same batches.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_lite.data.batch import Batch
from megatron_lite.data.dataset import Dataset

_AHEAD = 1024  # positions whose order is worked out at once: the cost a sample falls with it


def once(
    dataset: Dataset, limit: int, *, micro_batch_size: int, dp_rank: int, dp_size: int, device: torch.device
) -> Iterator[list[Batch]]:
    """One dp rank's part of the first ``limit`` windows, each once (``Dataset.once``), in steps of one micro batch. As
    many on every rank: the last ones are filled up with rows that have no target."""
    which, window = dataset.once(limit)
    stride = micro_batch_size * dp_size
    for start in range(0, len(which), stride):
        first = start + dp_rank * micro_batch_size
        own = slice(first, first + micro_batch_size)
        yield [dataset.batch(first, which[own], window[own], micro_batch_size).to(device)]


class Loader:
    """Endless steps of micro batches for one dp rank: ``next(loader)`` is a list of ``num_micro_batches`` batches.

    Micro batch i of dp rank r takes the positions from ``consumed + (i × dp_size + r) × micro_batch_size`` on, so a
    global batch holds the same samples however it is cut. ``prefetch`` steps are read ahead in a thread (0: none).
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch_size: int,
        num_micro_batches: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int,
        prefetch: int,
        device: torch.device,
    ) -> None:
        self.dataset, self.device = dataset, device
        self._micro, self._count, self._dp_rank, self._dp_size = micro_batch_size, num_micro_batches, dp_rank, dp_size
        self._consumed = consumed_samples
        self._planned: list[tuple[int, np.ndarray, np.ndarray]] = []  # micro batches worked out, the next one last
        self._queue: queue.Queue[Any] | None = None
        if prefetch:
            self._queue = queue.Queue(prefetch)
            self._closing = threading.Event()
            self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)
            self._thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[Batch]:
        found = self._read() if self._queue is None else self._queue.get()
        if isinstance(found, BaseException):
            if self._queue is not None:
                self._queue.put(found)  # whoever asks again gets the same answer, not silence
            raise found
        return [batch.to(self.device) for batch in found]

    def _plan(self) -> None:
        """Work out which windows the next micro batches of this rank hold, many at once."""
        stride = self._micro * self._dp_size
        number = max(self._count, _AHEAD // self._micro // self._count * self._count)
        firsts = self._consumed + stride * np.arange(number, dtype=np.int64) + self._dp_rank * self._micro
        self._consumed += stride * number
        positions = firsts[:, None] + np.arange(self._micro)
        which, window = (x.reshape(positions.shape) for x in self.dataset.order(positions.reshape(-1)))
        self._planned = list(zip(firsts.tolist(), which, window, strict=True))[::-1]

    def _read(self) -> list[Batch]:
        if not self._planned:
            self._plan()
        return [self.dataset.batch(*self._planned.pop()) for _ in range(self._count)]

    def _read_ahead(self) -> None:
        assert self._queue is not None
        found: Any = None
        while not self._closing.is_set() and not isinstance(found, BaseException):
            try:
                found = self._read()
            except BaseException as error:  # handed to whoever asks for this step
                found = error
            while not self._closing.is_set():
                try:
                    self._queue.put(found, timeout=0.1)
                    break
                except queue.Full:
                    continue

    def close(self) -> None:
        """Stop reading ahead."""
        if self._queue is not None:
            self._closing.set()
            self._thread.join()
