"""Self-attention, heads split over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.distributed import comm, random
from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers import matmul
from megatron_lite.layers.context import Context
from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_lite.layers.norm import RMSNorm
from megatron_lite.layers.positions import rotate


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with fused q, k, v.

    [tokens (/ tp under ``sp``), hidden] → the same, with the collectives of its two linears. Each rank holds
    ``num_heads / tp`` query heads. With fewer key-value heads than ranks, each rank projects a slice of a head; an
    all-gather (reduce-scatter backward) gives every rank the one head that its queries need. With ``qk_norm_eps``, each
    head's queries and keys are normalised first (Henry et al. 2020); backward all-reduces the gradients of these norms
    over tp. ``prefix``, a module set by a PEFT method, returns keys and values that all queries see, each [local kv
    heads, length, head_dim].
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        tp: Axis,
        *,
        layer: int,
        bias: bool,
        qkv_bias: bool,
        sp: bool,
        std: float,
        out_std: float,
        dropout: float,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.tp, self.head_dim, self.num_kv_heads, self.layer, self.dropout = tp, head_dim, num_kv_heads, layer, dropout
        self.local_heads = num_heads // tp.size
        self.gathers_kv = num_kv_heads < tp.size
        self.local_kv_heads = 1 if self.gathers_kv else num_kv_heads // tp.size
        chunks = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        self.qkv = ColumnParallelLinear(hidden_size, sum(chunks), tp, bias=qkv_bias, sp=sp, std=std, chunks=chunks)
        self.out = RowParallelLinear(num_heads * head_dim, hidden_size, tp, bias=bias, sp=sp, std=out_std)
        self.prefix: nn.Module | None = None
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if qk_norm_eps is not None:  # one weight for all heads: its gradient is partial on each rank, as under sp
            self.q_norm = RMSNorm(head_dim, tp, sp=True, eps=qk_norm_eps)
            self.k_norm = RMSNorm(head_dim, tp, sp=True, eps=qk_norm_eps)

    def _whole_kv_heads(self, qkv: Tensor) -> Tensor:
        """Replace the rank's slices of k and v by the one whole head of each that its queries attend to."""
        q, kv = qkv.split((self.local_heads * self.head_dim, qkv.shape[1] - self.local_heads * self.head_dim), dim=1)
        gathered = comm.gather_from(kv, self.tp, dim=1).view(kv.shape[0], self.tp.size, 2, -1)
        heads = gathered.transpose(1, 2).reshape(kv.shape[0], 2, self.num_kv_heads, self.head_dim)
        own = heads[:, :, self.tp.rank * self.num_kv_heads // self.tp.size]
        return torch.cat((q, own.flatten(1)), dim=1)

    def core(self, qkv: Tensor, context: Context) -> Tensor:
        """Rotate, attend, merge heads: [tokens, (heads + 2 kv) · head_dim] → [tokens, heads · head_dim]."""
        heads, kv = self.local_heads, self.local_kv_heads
        split = qkv.view(context.batch, -1, heads + 2 * kv, self.head_dim)
        qk, v = split.split((heads + kv, kv), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((heads, kv), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        if context.angles is not None:
            qk = rotate(qk, context.angles)
        q, k = qk.split((heads, kv), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        if self.prefix is not None:
            first_k, first_v = self.prefix(context.prefix, k.dtype)
            k = torch.cat((first_k.expand(k.shape[0], -1, -1, -1), k), dim=2)
            v = torch.cat((first_v.expand(v.shape[0], -1, -1, -1), v), dim=2)
        dropout = self.dropout if context.seed is not None else 0.0
        if dropout > 0:
            assert context.seed is not None
            random.seed_default(random.mix(context.seed, 3 * self.layer, self.tp.rank), q.device)
        if matmul.attends_in_float32(q):
            q, k, v = q.float(), k.float(), v.float()
        keys, causal = context.visible
        assert not causal or q.shape[2] == k.shape[2]  # is_causal lets the first query see the first key alone
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=keys, dropout_p=dropout, is_causal=causal, enable_gqa=heads != kv
        )
        return attended.to(qkv.dtype).transpose(1, 2).reshape(qkv.shape[0], heads * self.head_dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        qkv = self.qkv(x, context.seed)
        if self.gathers_kv:
            qkv = self._whole_kv_heads(qkv)
        return self.out(self.core(qkv, context), context.seed)
