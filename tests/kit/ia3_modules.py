"""The scale of ``ia3.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import ShardSpec, attach


class Scale(nn.Module):
    """``added`` [tokens (/ tp under sp), hidden] times a weight [hidden], whose gradient is all-reduced over tp under
    sp."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.partial, size = model.tp if model.sp else Axis("tp"), model.config.hidden_size
        self.weight = attach(nn.Parameter(torch.empty(size)), ShardSpec((size,)), "ones")

    def forward(self, start: Tensor, added: Tensor) -> Tensor:
        return added * comm.copy_to(self.weight, self.partial).to(added.dtype)
