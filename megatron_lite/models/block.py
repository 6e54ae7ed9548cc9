"""A transformer block, and the blocks of a model by layer number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

from torch import Tensor, nn

from megatron_lite.config import ModelConfig
from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers.attention import Attention
from megatron_lite.layers.context import Context
from megatron_lite.layers.dropout import Dropout
from megatron_lite.layers.mlp import MLP
from megatron_lite.layers.norm import LayerNorm, RMSNorm

NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual: [tokens (/ tp under sp), hidden] → the same.

    ``attention_adapter``, ``mlp_adapter``: modules set by a PEFT method, which turn the input and the output of
    attention or MLP into what is added to the residual.
    """

    def __init__(self, config: ModelConfig, layer: int, tp: Axis, *, sp: bool) -> None:
        super().__init__()
        norm = NORMS[config.traits.norm]
        out_std = config.init_std / (2 * config.num_layers) ** 0.5  # as in GPT-2, for the number of residual branches
        self.layer = layer
        self.attention_adapter: nn.Module | None = None
        self.mlp_adapter: nn.Module | None = None
        self.attention_norm = norm(config.hidden_size, tp, sp=sp, eps=config.norm_eps)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            tp,
            layer=layer,
            bias=config.bias,
            qkv_bias=config.qkv_bias,
            sp=sp,
            std=config.init_std,
            out_std=out_std,
            dropout=config.attention_dropout,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        self.attention_dropout = Dropout(config.dropout, 3 * layer + 1, tp, sp=sp)
        self.mlp_norm = norm(config.hidden_size, tp, sp=sp, eps=config.norm_eps)
        self.mlp = MLP(
            config.hidden_size,
            config.ffn_size,
            tp,
            gated=config.traits.gated,
            bias=config.bias,
            sp=sp,
            std=config.init_std,
            out_std=out_std,
        )
        self.mlp_dropout = Dropout(config.dropout, 3 * layer + 2, tp, sp=sp)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        normed = self.attention_norm(x)
        added = self.attention(normed, context)
        if self.attention_adapter is not None:
            added = self.attention_adapter(normed, added)
        x = x + self.attention_dropout(added, context)
        normed = self.mlp_norm(x)
        added = self.mlp(normed, context)
        if self.mlp_adapter is not None:
            added = self.mlp_adapter(normed, added)
        return x + self.mlp_dropout(added, context)


class Blocks(nn.Module):
    """Blocks in order, named by layer number, so a block has the same name on every stage."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__()
        for block in blocks:
            self.add_module(str(block.layer), block)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Block]:
        return iter(cast("Iterable[Block]", self._modules.values()))

    def __getitem__(self, layer: int) -> Block:
        return cast(Block, self._modules[str(layer)])
