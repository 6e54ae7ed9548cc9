"""What a model's forward pass computes from the last hidden states: its ``output`` argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_lite.layers.context import Context
from megatron_lite.layers.loss import linear_cross_entropy

if TYPE_CHECKING:
    from megatron_lite.models.decoder import Decoder

Output = Callable[["Decoder", Tensor, Context], Tensor]


def hidden_states(model: Decoder, x: Tensor, context: Context) -> Tensor:
    """The hidden states themselves, [tokens (/ tp under sp), hidden]."""
    return x


def _cross_entropy(
    model: Decoder, x: Tensor, context: Context, *, targets: Tensor, counted: Tensor | None = None
) -> Tensor:
    return linear_cross_entropy(x, model.projection, targets, model.vocab_size, seed=context.seed, counted=counted)


def cross_entropy(targets: Tensor, counted: Tensor | None = None) -> Output:
    """The sum of the cross entropies against ``targets`` [batch, seq]; see ``linear_cross_entropy``."""
    return partial(_cross_entropy, targets=targets, counted=counted)


def last_logits(model: Decoder, x: Tensor, context: Context) -> Tensor:
    """Logits of each row's last position, [batch, vocab_size] in float32 or better, on every rank; no gradient."""
    return model.projection.logits(model.projection.whole(x, context.batch)[:, -1], model.vocab_size)
