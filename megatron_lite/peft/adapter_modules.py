"""The bottleneck of an adapter, split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_lite.peft.adapter import AdapterConfig


class Bottleneck(nn.Module):
    """``added + scale · up(gelu(down(x)))``; x is ``added`` or, with placement ``parallel``, the half's input.

    Both [tokens (/ tp under sp), hidden] → the same. ``up`` starts at zero, so the module starts as the identity.
    ``down`` is column-parallel, ``up`` row-parallel; the collectives are theirs.
    """

    def __init__(self, model: Any, config: AdapterConfig) -> None:
        super().__init__()
        self.parallel, self.scale = config.placement == "parallel", config.scale
        hidden, std, tp, sp = model.config.hidden_size, model.config.init_std, model.tp, model.sp
        self.down = ColumnParallelLinear(hidden, config.size, tp, bias=True, sp=sp, std=std)
        self.up = RowParallelLinear(config.size, hidden, tp, bias=True, sp=sp, std=0.0)

    def forward(self, start: Tensor, added: Tensor) -> Tensor:
        return added + self.scale * self.up(F.gelu(self.down(start if self.parallel else added), approximate="tanh"))
