"""Bottlenecks between frozen layers: Houlsby et al. 2019, Pfeiffer et al. 2021; beside them: He et al. 2022."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config import AdapterConfig
from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear


class Bottleneck(nn.Module):
    """``added + scale · up(gelu(down(x)))``, x being ``added`` itself or, ``parallel``, what the half started from.

    Both [tokens (/ tp under sp), hidden] → the same. ``up`` starts at zero, so the whole as the identity. ``down`` is
    column-parallel, ``up`` row-parallel; collectives are theirs.
    """

    def __init__(self, hidden: int, config: AdapterConfig, tp: Axis, *, sp: bool, std: float) -> None:
        super().__init__()
        self.parallel, self.scale = config.placement == "parallel", config.scale
        self.down = ColumnParallelLinear(hidden, config.size, tp, bias=True, sp=sp, std=std)
        self.up = RowParallelLinear(config.size, hidden, tp, bias=True, sp=sp, std=0.0)

    def forward(self, start: Tensor, added: Tensor) -> Tensor:
        return added + self.scale * self.up(F.gelu(self.down(start if self.parallel else added), approximate="tanh"))


def add_adapters(model: Any, config: AdapterConfig) -> None:
    """Give every block its bottlenecks."""
    sizes, places = model.config, ("attention", "mlp") if config.placement == "houlsby" else ("mlp",)
    for block in model.blocks:
        for place in places:
            bottleneck = Bottleneck(sizes.hidden_size, config, model.tp, sp=model.sp, std=sizes.init_std)
            setattr(block, f"{place}_adapter", bottleneck)
