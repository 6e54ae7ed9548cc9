"""The engine protocol: who owns gradients and the optimizer. One implementation a file, one line in ``ENGINES``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from megatron_lite.dist.shard import ShardSpec


class Engine(Protocol):
    """Gradients in, updated weights out. The loss handed to ``backward`` is already divided by the global count of
    target tokens, so gradients are summed over micro batches and data-parallel ranks, never averaged."""

    model: nn.Module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate one micro batch's gradients; ``last`` starts their reduction over dp, overlapping backward."""

    def finish_gradients(self) -> Tensor:
        """Wait for the reduction; the norm of the global gradient, the same on every rank."""

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale every gradient by min(1, limit / norm)."""

    def step(self, lr: float) -> None:
        """Update the weights and drop the gradients."""

    def gradients(self) -> dict[str, tuple[Tensor, ShardSpec]]:
        """The reduced gradients under their parameters' names; between ``finish_gradients`` and ``step``."""

    def tensors(self) -> dict[str, tuple[Tensor, ShardSpec]]:
        """Weights and optimizer state under layout-free names, to be saved from or loaded into in place."""

    def restore_updates(self, updates: int) -> None:
        """After a load: how many updates the optimizer has made."""

    def drop_gradients(self) -> None:
        """Forget this step's gradients without an update."""
