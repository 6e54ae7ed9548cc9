"""Token embedding split by vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import ShardSpec, attach
from megatron_lite.layers.projection import Projection


class VocabParallelEmbedding(Projection):
    """Look up token ids [batch, seq] → [tokens, hidden], or [tokens / tp, hidden] under ``sp``.

    Each rank holds an equal range of the padded vocabulary and contributes zeros for ids outside it. Forward:
    all-reduce, or reduce-scatter under ``sp``. Backward: none, or all-gather under ``sp``.
    """

    def __init__(self, padded_vocab_size: int, hidden_size: int, tp: Axis, *, sp: bool, std: float) -> None:
        super().__init__()
        self.tp, self.sp = tp, sp
        spec = ShardSpec((padded_vocab_size, hidden_size), dim=0)
        self.weight = attach(nn.Parameter(torch.empty(spec.local_shape(tp.size))), spec, std)

    def look_up(self, tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        """Look up token ids in this rank's rows of a table: [tokens, columns], zeros for the ids of other ranks."""
        flat = tokens.reshape(-1)
        if self.tp.size == 1:
            return F.embedding(flat, table).to(dtype)
        rows = table.shape[0]
        local = flat - self.tp.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), table).to(dtype)
        return found.masked_fill(elsewhere.unsqueeze(-1), 0)

    def reduce(self, found: Tensor) -> Tensor:
        """Sum the ranks' lookups: reduce-scatter under ``sp``, else all-reduce."""
        return comm.reduce_scatter_to(found, self.tp) if self.sp else comm.reduce_from(found, self.tp)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.reduce(self.look_up(tokens, self.weight, dtype))
