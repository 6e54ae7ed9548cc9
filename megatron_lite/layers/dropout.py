"""Dropout on hidden states."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_lite.distributed import random
from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers.context import Context


class Dropout(nn.Module):
    """[tokens (/ tp under sp), hidden] → the same. Masks are a function of the micro batch's seed and the ``site``.

    All tp ranks use the same mask; under ``sp``, where each rank has its own tokens, each uses its own.
    """

    def __init__(self, rate: float, site: int, tp: Axis, *, sp: bool) -> None:
        super().__init__()
        self.rate, self.site, self.split = rate, site, tp.rank if sp else 0

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.rate == 0.0 or context.seed is None:
            return x
        return random.dropout(x, self.rate, random.mix(context.seed, self.site, self.split))
