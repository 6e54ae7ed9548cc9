"""Vocabulary-parallel cross entropy, projection and loss together, chunked over tokens.

The logits of the whole micro batch are never in memory: those of one chunk, [chunk, vocab / tp], are computed, turned
into their gradient in place and used. Gradients are computed in forward, as in Liger-Kernel's fused linear cross
entropy (Hsu et al. 2024); the split over the vocabulary is Megatron-LM's (Shoeybi et al. 2019).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers.projection import Projection, VocabProduct

IGNORED = -100  # the target of a token with nothing to predict
_CHUNK_ELEMENTS = 1 << 24  # logits in memory at once on each rank, or twice the size of the hidden states if larger


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: type[VocabProduct],
        targets: Tensor,
        vocab_size: int,
        tp: Axis,
        counted: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        product = kind(tuple(tensor.requires_grad for tensor in tensors), *tensors)
        hidden, precise, rows = product.hidden, product.precise, tensors[1].shape[0]
        tokens = len(targets if counted is None else counted)
        first = tp.rank * rows
        padding = max(0, first + rows - vocab_size)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        size = max(1, max(_CHUNK_ELEMENTS, 2 * hidden.numel()) // rows)
        products = hidden.new_empty((min(size, tokens), rows))  # reused by every chunk
        precisely = None if precise == hidden.dtype else hidden.new_empty(products.shape, dtype=precise)
        for start in range(0, tokens, size):
            part = slice(start, start + size) if counted is None else counted[start : start + size]
            target = targets[part]
            kept = target != IGNORED
            local = target - first
            here = kept & (local >= 0) & (local < rows)
            index = local.masked_fill(~here, 0).unsqueeze(1)
            chunk = products[: len(target)]
            product.logits(part, chunk)
            logits = chunk if precisely is None else precisely[: len(chunk)].copy_(chunk)
            if padding:
                logits[:, max(0, rows - padding) :] = float("-inf")
            peak = comm.all_reduce(logits.amax(dim=1), tp, torch_dist.ReduceOp.MAX)
            logits.sub_(peak.unsqueeze(1))
            picked = logits.gather(1, index).squeeze(1).masked_fill(~here, 0)
            logits.exp_()
            sums = comm.all_reduce(torch.stack((logits.sum(dim=1), picked)), tp)
            total += (sums[0].log() - sums[1]).masked_fill(~kept, 0).sum()
            if product.grad_hidden is None:
                continue
            # softmax minus one-hot, zero for a token that does not count
            logits.mul_((kept / sums[0]).unsqueeze(1))
            logits.scatter_add_(1, index, -here.to(precise).unsqueeze(1))
            product.accumulate(part, chunk if precisely is None else chunk.copy_(logits))
        grads = zip(product.gradients(), tensors, strict=True)
        ctx.save_for_backward(*(grad if grad is None else grad.to(tensor.dtype) for grad, tensor in grads))
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since these buffers are this call's own; autograd's version check refuses a second backward.
        grads = (None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in ctx.saved_tensors)
        return None, None, None, None, None, *grads


def linear_cross_entropy(
    x: Tensor,
    projection: Projection,
    targets: Tensor,
    vocab_size: int,
    *,
    seed: int | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Sum of the cross entropies of ``x W^T`` against ``targets``, a scalar in float32 or better.

    x: [tokens, hidden], or [tokens / tp, hidden] under the projection's ``sp``. ids of ``vocab_size`` and above get no
    probability. targets: [tokens], ``IGNORED`` where there is none. The same value on every tp rank. Forward: for each
    chunk a max all-reduce of [chunk] and a sum all-reduce of [2, chunk] numbers; both passes: those of the projection's
    ``enter``. A frozen weight gets no gradient. ``counted``: indices of the targets that count, int64, ascending; only
    their logits are computed. None: those of all tokens.
    """
    tp = projection.tp.of("loss")
    tensors = projection.enter(x, seed, tp)
    return comm.apply(
        _LinearCrossEntropy, projection.product_kind, targets.reshape(-1), vocab_size, tp, counted, *tensors
    )
