"""The decoder-only transformer, one class for every family; what differs is read from the config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.config import ModelConfig
from megatron_lite.distributed import comm, random
from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers import matmul
from megatron_lite.layers.attention import Attention, Context, KeyValueCache
from megatron_lite.layers.embedding import VocabParallelEmbedding
from megatron_lite.layers.linear import ColumnParallelLinear
from megatron_lite.layers.loss import linear_cross_entropy
from megatron_lite.layers.mlp import MLP
from megatron_lite.layers.norm import LayerNorm, RMSNorm
from megatron_lite.layers.positions import LearnedPositions, RotaryPositions


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual: [tokens (/ tp under sp), hidden] → the same.

    ``attention_adapter``, ``mlp_adapter``: where a PEFT method sets one, it turns a half's input and output into what
    joins the residual.
    """

    def __init__(self, config: ModelConfig, layer: int, tp: Axis, *, sp: bool) -> None:
        super().__init__()
        assert config.num_kv_heads and config.head_dim and config.ffn_size
        norm = LayerNorm if config.family == "gpt2" else RMSNorm
        out_std = config.init_std / (2 * config.num_layers) ** 0.5  # GPT-2's: residual branches add up to the stem
        self.layer, self.dropout, self.split = layer, config.dropout, tp.rank if sp else 0
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
            bias=bool(config.bias),
            qkv_bias=bool(config.qkv_bias),
            sp=sp,
            std=config.init_std,
            out_std=out_std,
            dropout=config.attention_dropout,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        self.mlp_norm = norm(config.hidden_size, tp, sp=sp, eps=config.norm_eps)
        self.mlp = MLP(
            config.hidden_size,
            config.ffn_size,
            tp,
            gated=config.family == "llama",
            bias=bool(config.bias),
            sp=sp,
            std=config.init_std,
            out_std=out_std,
        )

    def _drop(self, x: Tensor, context: Context, site: int) -> Tensor:
        """Dropout on replicated tokens draws one mask on every tp rank; on slices of them, its own on each."""
        if self.dropout == 0.0 or context.seed is None:
            return x
        return random.dropout(x, self.dropout, random.mix(context.seed, 3 * self.layer + site, self.split))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        normed = self.attention_norm(x)
        added = self.attention(normed, context)
        if self.attention_adapter is not None:
            added = self.attention_adapter(normed, added)
        x = x + self._drop(added, context, 1)
        normed = self.mlp_norm(x)
        added = self.mlp(normed, context.seed)
        if self.mlp_adapter is not None:
            added = self.mlp_adapter(normed, added)
        return x + self._drop(added, context, 2)


class Decoder(nn.Module):
    """Embedding, blocks, norm, output projection tied or not.

    Built from the padded vocabulary; the true size bounds what the loss and the sampler can see. ``tp`` and ``sp`` are
    handed to the layers, which own every collective. ``prefix``, where a PEFT method sets it: ``length`` keys and
    values come before the tokens in every layer; called, it makes what the layers' own prefixes start from.
    """

    def __init__(self, config: ModelConfig, tp: Axis, *, sp: bool) -> None:
        super().__init__()
        assert config.vocab_size and config.head_dim
        sp = sp and tp.size > 1
        self.config, self.tp, self.sp = config, tp, sp
        self.prefix: Any = None
        vocab, hidden, std = config.padded_vocab_size, config.hidden_size, config.init_std
        self.embedding = VocabParallelEmbedding(vocab, hidden, tp, sp=sp, std=std)
        self.positions: LearnedPositions | None = None
        self.rotary: RotaryPositions | None = None
        if config.family == "gpt2":
            self.positions = LearnedPositions(config.max_seq_len, hidden, tp, sp=sp, std=std)
        else:
            self.rotary = RotaryPositions(config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)
        self.blocks = nn.ModuleList(Block(config, layer, tp, sp=sp) for layer in range(config.num_layers))
        norm = LayerNorm if config.family == "gpt2" else RMSNorm
        self.norm = norm(hidden, tp, sp=sp, eps=config.norm_eps)
        self.head: ColumnParallelLinear | None = None  # its product is the loss's
        if not config.tie_embeddings:
            self.head = ColumnParallelLinear(hidden, vocab, tp, bias=False, sp=sp, std=std)

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output projection."""
        return self.embedding.weight if self.head is None else self.head.weight

    @contextlib.contextmanager
    def whole_tokens(self) -> Iterator[None]:
        """Without sequence parallelism inside: single tokens, as generating reads them, cannot be split over tp."""
        split = [module for module in self.modules() if getattr(module, "sp", False)]
        for module in split:
            module.sp = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in split:
                module.sp = True  # type: ignore[assignment]

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        seed: int | None,
        caches: list[KeyValueCache] | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Token ids [batch, seq] → normalised hidden states [tokens (/ tp under sp), hidden]."""
        batch, length = tokens.shape
        seen = 0 if caches is None or caches[0].keys is None else caches[0].keys.shape[2]
        if positions is None:
            positions = torch.arange(seen, seen + length, device=tokens.device).expand(batch, length)
        ahead = 0 if self.prefix is None else self.prefix.length
        positions = positions + ahead
        x = self.embedding(tokens, dtype)
        if self.positions is not None:
            x = self.positions(x, positions)
        if seed is not None and self.config.dropout > 0:
            site = 3 * self.config.num_layers
            x = random.dropout(x, self.config.dropout, random.mix(seed, site, self.tp.rank if self.sp else 0))
        context = Context(batch, seed=seed, caches=caches)
        if self.rotary is not None:
            context.angles = self.rotary(positions, dtype)
        if document_ids is not None:
            assert document_ids.shape[1] == seen + length
            same = document_ids.unsqueeze(1) == document_ids[:, seen:].unsqueeze(2)
            context.mask = same.tril(seen).unsqueeze(1)
        elif (ahead or seen) and length > 1:
            whole = torch.ones(1, 1, length, seen + length, dtype=torch.bool, device=tokens.device)
            context.mask = whole.tril(seen)
        if ahead:
            context.prefix = self.prefix(dtype)
            if context.mask is not None:
                context.mask = nn.functional.pad(context.mask, (ahead, 0), value=True)
        for block in self.blocks:
            x = block(x, context)
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        counted: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        seed: int | None = None,
        caches: list[KeyValueCache] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """With ``targets`` [batch, seq]: the sum of their cross entropies. Without: logits of the last position.

        tokens: [batch, seq], after those in ``caches``. counted: where the flattened targets count, int64, if known.
        positions, document_ids: [batch, seq], both when documents are masked from each other; ids those in the caches,
        too. dtype: what is computed in. Logits come as [batch, vocab_size], gathered over tp, float32 or better, and
        have no gradient.
        """
        x = self.hidden_states(tokens, positions, document_ids, seed, caches, dtype)
        weight = self.head_weight
        if targets is not None:
            low_rank = None if self.head is None else self.head.low_rank(x, seed)
            vocab_size = self.config.vocab_size
            assert vocab_size
            return linear_cross_entropy(
                x, weight, targets, vocab_size, self.tp, sp=self.sp, low_rank=low_rank, counted=counted
            )
        if self.sp:
            x = comm.all_gather(x, self.tp)
        last = x.view(tokens.shape[0], tokens.shape[1], -1)[:, -1]
        logits = matmul.linear(last, matmul.factor(weight, last))
        if self.head is not None and (update := self.head.low_rank(last)) is not None:
            logits = logits + update[0] @ update[1].t()
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        return comm.all_gather(logits, self.tp, dim=1)[:, : self.config.vocab_size]
