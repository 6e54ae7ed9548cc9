"""The keys and values of a prefix, split over tensor-parallel ranks by kv head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.distributed import comm
from megatron_lite.distributed.shard import ShardSpec, attach
from megatron_lite.layers.attention import Attention
from megatron_lite.layers.linear import product
from megatron_lite.peft.prefix import PrefixConfig

_STD = 0.02  # small values and nearly uniform attention: the prefix has little effect at first


def _parameter(spec: ShardSpec, size: int, init: float) -> nn.Parameter:
    return attach(nn.Parameter(torch.empty(spec.local_shape(size))), spec, init)


class Stem(nn.Module):
    """The input of all layers' prefixes: with ``reparameterize`` the hidden layer of their MLP, [length, hidden units],
    replicated; else None. Backward all-reduces its gradient over tp."""

    def __init__(self, model: Any, config: PrefixConfig) -> None:
        super().__init__()
        self.length, self.tp = config.length, model.tp
        self.embedding: nn.Parameter | None = None
        if config.reparameterize is not None:
            units, width = config.reparameterize, model.config.hidden_size
            self.embedding = _parameter(ShardSpec((config.length, width)), 1, 1.0)
            self.weight = _parameter(ShardSpec((units, width)), 1, width**-0.5)
            self.bias = _parameter(ShardSpec((units,)), 1, 0.0)

    def forward(self, dtype: torch.dtype) -> Tensor | None:
        if self.embedding is None:
            return None
        hidden = product(self.embedding.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return comm.copy_to(hidden.tanh(), self.tp)


class Prefix(nn.Module):
    """One layer's keys and values, each [local kv heads, length, head_dim]: parameters, or projected from the stem.

    Split over tp by kv head. With fewer kv heads than ranks, every rank holds all heads and takes the one that its
    queries attend to; backward all-reduces the gradients over tp.
    """

    def __init__(self, attention: Attention, config: PrefixConfig) -> None:
        super().__init__()
        self.tp, self.heads, self.length = attention.tp, attention.num_kv_heads, config.length
        self.head_dim, self.replicated = attention.head_dim, attention.gathers_kv
        dim, size = (None if self.replicated else 0), self.tp.size
        units = config.reparameterize
        self.keys: nn.Parameter | None = None
        if units is None:
            spec = ShardSpec((self.heads, self.length, self.head_dim), dim=dim)
            self.keys = _parameter(spec, size, _STD)
            self.values = _parameter(spec, size, _STD)
        else:
            width = self.heads * self.head_dim
            chunks = None if self.replicated else (width, width)
            self.weight = _parameter(ShardSpec((2 * width, units), dim=dim, chunks=chunks), size, _STD)
            self.bias = _parameter(ShardSpec((2 * width,), dim=dim, chunks=chunks), size, 0.0)

    def forward(self, stem: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = self.made(stem, dtype)
        if self.replicated:
            own = self.tp.rank * self.heads // self.tp.size
            return keys[own : own + 1], values[own : own + 1]
        return keys, values

    def made(self, stem: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values of every head that this rank holds."""
        if self.keys is not None:
            return self._whole(self.keys).to(dtype), self._whole(self.values).to(dtype)
        assert stem is not None
        flat = product(stem, self._whole(self.weight).to(dtype), self._whole(self.bias).to(dtype))
        keys, values = flat.view(self.length, 2, -1, self.head_dim).permute(1, 2, 0, 3)
        return keys, values

    def _whole(self, parameter: Tensor) -> Tensor:
        return comm.copy_to(parameter, self.tp) if self.replicated else parameter
