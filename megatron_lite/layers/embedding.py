"""Token embedding split by vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.dist import comm
from megatron_lite.dist.mesh import Axis
from megatron_lite.dist.shard import ShardSpec, attach


class VocabParallelEmbedding(nn.Module):
    """Look up token ids [batch, seq] → [tokens, hidden], or [tokens / tp, hidden] under ``sp``.

    Each rank holds an equal range of the padded vocabulary and contributes zeros for ids outside it. Forward:
    all-reduce, or reduce-scatter under ``sp``. Backward: none, or all-gather under ``sp``.
    """

    def __init__(self, padded_vocab_size: int, hidden_size: int, tp: Axis, *, sp: bool, std: float) -> None:
        super().__init__()
        self.tp, self.sp = tp, sp
        spec = ShardSpec((padded_vocab_size, hidden_size), dim=0)
        self.weight = attach(nn.Parameter(torch.empty(spec.local_shape(tp.size))), spec, std)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        flat = tokens.reshape(-1)
        if self.tp.size == 1:
            return F.embedding(flat, self.weight).to(dtype)
        rows = self.weight.shape[0]
        local = flat - self.tp.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight).to(dtype)
        found = found.masked_fill(elsewhere.unsqueeze(-1), 0)
        return comm.reduce_scatter_to(found, self.tp) if self.sp else comm.reduce_from(found, self.tp)
