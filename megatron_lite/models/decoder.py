"""The decoder-only transformer: one class for all families, whose differences come from the config.

Only the layers know about ranks and collectives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.config import ModelConfig
from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers.context import Context
from megatron_lite.layers.dropout import Dropout
from megatron_lite.layers.embedding import VocabParallelEmbedding
from megatron_lite.layers.linear import ColumnParallelLinear
from megatron_lite.layers.mask import Mask
from megatron_lite.layers.positions import LearnedPositions, RotaryPositions
from megatron_lite.layers.projection import Projection
from megatron_lite.models.block import NORMS, Block, Blocks
from megatron_lite.models.head import Output, last_logits
from megatron_lite.models.stage import Stage


class Decoder(nn.Module):
    """Embedding, blocks, norm and output projection (tied or not), or a ``stage`` of these.

    Built for the padded vocabulary; loss and sampling use only its true size. ``tp`` and ``sp`` are passed to the
    layers, which own every collective. ``prefix``: a module set by a PEFT method; its ``length`` keys and values
    precede the tokens in every layer, and its forward returns the hidden states that layers project them from.
    """

    def __init__(self, config: ModelConfig, tp: Axis, *, sp: bool, stage: Stage | None = None) -> None:
        super().__init__()
        assert config.vocab_size
        stage = stage or Stage(range(config.num_layers))
        self.config, self.tp, self.sp, self.stage = config, tp, sp, stage
        self.vocab_size = config.vocab_size
        self.prefix: Any = None
        vocab, hidden, std = config.padded_vocab_size, config.hidden_size, config.init_std
        self.embedding: VocabParallelEmbedding | None = None
        if stage.first or (stage.last and config.tie_embeddings):
            self.embedding = VocabParallelEmbedding(vocab, hidden, tp, sp=sp, std=std)
        self.positions: LearnedPositions | None = None
        self.rotary: RotaryPositions | None = None
        if config.traits.rotary:
            self.rotary = RotaryPositions(config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)
        elif stage.first:
            self.positions = LearnedPositions(config.max_seq_len, hidden, tp, sp=sp, std=std)
        self.dropout = Dropout(config.dropout, 3 * config.num_layers, tp, sp=sp)
        self.blocks = Blocks(Block(config, layer, tp, sp=sp) for layer in stage.blocks)
        self.norm: nn.Module | None = None
        self.head: ColumnParallelLinear | None = None
        if stage.last:
            self.norm = NORMS[config.traits.norm](hidden, tp, sp=sp, eps=config.norm_eps)
            if not config.tie_embeddings:
                self.head = ColumnParallelLinear(hidden, vocab, tp, bias=False, sp=sp, std=std)

    @property
    def projection(self) -> Projection:
        """The module that projects hidden states to the vocabulary."""
        found = self.embedding if self.head is None else self.head
        assert found is not None
        return found

    @contextlib.contextmanager
    def whole_tokens(self) -> Iterator[None]:
        """Turn off sequence parallelism inside the ``with`` block: the single tokens of generation cannot be split."""
        split = [module for module in self.modules() if getattr(module, "sp", False)]
        for module in split:
            module.sp = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in split:
                module.sp = True  # type: ignore[assignment]

    def begin(self, context: Context, shape: torch.Size, device: torch.device) -> tuple[Context, Tensor]:
        """The context with what all blocks share, and the positions of the tokens, int64 [batch, seq]."""
        batch, length = shape
        seen = 0 if context.cache is None else context.cache.offset
        ahead = 0 if self.prefix is None else self.prefix.length
        positions = context.positions
        if positions is None:
            start = torch.as_tensor(seen, device=device).view(-1, 1)
            positions = (start + torch.arange(length, device=device)).expand(batch, length)
        positions = positions + ahead
        mask = Mask(offset=seen, documents=context.document_ids, prefix=ahead)
        return replace(
            context,
            batch=batch,
            visible=mask.visible(length, device),
            angles=None if self.rotary is None else self.rotary(positions, context.dtype),
            prefix=self.prefix(context.dtype) if ahead else None,
        ), positions

    def embed(self, tokens: Tensor, positions: Tensor, context: Context) -> Tensor:
        """Token ids [batch, seq] → [tokens (/ tp under sp), hidden]."""
        assert self.embedding is not None
        x = self.embedding(tokens, context.dtype)
        if self.positions is not None:
            x = self.positions(x, positions)
        return self.dropout(x, context)

    def forward(
        self,
        tokens: Tensor,
        context: Context | None = None,
        output: Output = last_logits,
        x: Tensor | None = None,
    ) -> Tensor:
        """Token ids [batch, seq] → the result of ``output`` for the normalised hidden states [tokens (/ tp under sp),
        hidden]; by default the logits of each row's last token.

        A stage that is not the last returns its hidden states, the ``x`` of the next stage.
        """
        context, positions = self.begin(context or Context(), tokens.shape, tokens.device)
        if x is None:
            x = self.embed(tokens, positions, context)
        for block in self.blocks:
            x = block(x, context)
        if context.cache is not None:
            context.cache.advance(tokens.shape[1])
        return x if self.norm is None else output(self, self.norm(x), context)
