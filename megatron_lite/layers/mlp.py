"""The feed-forward half of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers.context import Context
from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """``down(gelu(up(x)))``, or ``down(silu(gate) · up)`` with gate and up fused (SwiGLU, Shazeer 2020).

    [tokens (/ tp under ``sp``), hidden] → the same; the only collectives are those of its two linears.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        tp: Axis,
        *,
        gated: bool,
        bias: bool,
        sp: bool,
        std: float,
        out_std: float,
    ) -> None:
        super().__init__()
        self.gated = gated
        chunks = (ffn_size, ffn_size) if gated else (ffn_size,)
        self.up = ColumnParallelLinear(hidden_size, sum(chunks), tp, bias=bias, sp=sp, std=std, chunks=chunks)
        self.down = RowParallelLinear(ffn_size, hidden_size, tp, bias=bias, sp=sp, std=out_std)

    def activation(self, x: Tensor) -> Tensor:
        """The function between the linears. It is cheap, so selective recomputation does not save its output."""
        if not self.gated:
            return F.gelu(x, approximate="tanh")
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.down(self.activation(self.up(x, context.seed)), context.seed)
