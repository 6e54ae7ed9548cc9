"""A micro batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # the target of a place with nothing to predict, as in torch


@dataclass(frozen=True)
class Batch:
    """One micro batch.

    tokens, targets: int64 [batch, seq]; a target of ``IGNORED`` does not count. positions, document_ids: int64 [batch,
    seq] where documents are masked from each other, else None. index: the position of its first sample in the run.
    counted: int64, where the flattened targets count; None: not looked for, or everywhere.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None
    document_ids: Tensor | None
    index: int
    counted: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; to a GPU it is copied from pinned memory, without waiting."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.pin_memory().to(device, non_blocking=True)

        tokens, targets = move(self.tokens), move(self.targets)
        assert tokens is not None and targets is not None
        return Batch(tokens, targets, move(self.positions), move(self.document_ids), self.index, move(self.counted))
