"""Norms over the last dim. Under sequence parallelism each rank normalises its own tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import ShardSpec, attach


class _Norm(nn.Module):
    def __init__(self, size: int, tp: Axis, *, sp: bool, eps: float, bias: bool) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        # Tokens are split over tp only under sp: only then is a weight's gradient partial.
        self.partial = tp if sp else Axis("tp")
        self.weight = attach(nn.Parameter(torch.empty(size)), ShardSpec((size,)), "ones")
        self.bias = attach(nn.Parameter(torch.empty(size)), ShardSpec((size,)), 0.0) if bias else None


class RMSNorm(_Norm):
    """Root-mean-square norm (Zhang and Sennrich 2019), [..., size] → the same.

    Under ``sp``, backward all-reduces the weight's gradient over tp.
    """

    def __init__(self, size: int, tp: Axis, *, sp: bool, eps: float) -> None:
        super().__init__(size, tp, sp=sp, eps=eps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.size,), comm.copy_to(self.weight, self.partial).to(x.dtype), self.eps)


class LayerNorm(_Norm):
    """Layer norm (Ba et al. 2016) with bias, [..., size] → the same; collectives as in ``RMSNorm``."""

    def __init__(self, size: int, tp: Axis, *, sp: bool, eps: float) -> None:
        super().__init__(size, tp, sp=sp, eps=eps, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        weight, bias = comm.copy_to(self.weight, self.partial), comm.copy_to(self.bias, self.partial)
        return F.layer_norm(x, (self.size,), weight.to(x.dtype), bias.to(x.dtype), self.eps)
