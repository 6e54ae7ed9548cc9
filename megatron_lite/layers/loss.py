"""Vocabulary-parallel cross entropy, projection and loss together, chunked over tokens.

The logits of the whole micro batch never exist: one chunk's logits [chunk, vocab / tp] are made, turned into their own
gradient in place and consumed. Gradients are computed in forward, as in Liger-Kernel's fused linear cross entropy
(Hsu et al. 2024); the split over vocabulary is Megatron-LM's (Shoeybi et al. 2019).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers import matmul

IGNORED = -100  # the target of a token with nothing to predict
_CHUNK_ELEMENTS = 1 << 24  # logits held at once, on each rank; or twice what the hidden states have, if that is more


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        tp: Axis,
        low: Tensor | None,
        factor: Tensor | None,
        counted: Tensor | None,
    ) -> Tensor:
        rows, tokens = weight.shape[0], len(targets if counted is None else counted)
        first = tp.rank * rows
        padding = max(0, first + rows - vocab_size)
        needed = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, factor)]
        precise = torch.promote_types(hidden.dtype, torch.float32)
        formats = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, low, factor)]
        if matmul.through_float32(hidden, weight):
            hidden = hidden.float()
            low, factor = (None if tensor is None else tensor.float() for tensor in (low, factor))
        matrix = weight.to(hidden.dtype)
        grad_hidden = hidden.new_zeros(hidden.shape) if any(needed) else None
        grad_weight = weight.new_zeros(weight.shape, dtype=precise) if needed[1] else None
        grad_low = grad_factor = None
        if low is not None and factor is not None and any(needed):
            grad_low, grad_factor = low.new_zeros(low.shape), factor.new_zeros(factor.shape, dtype=precise)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        size = max(1, max(_CHUNK_ELEMENTS, 2 * hidden.numel()) // rows)
        products = hidden.new_empty((min(size, tokens), rows))  # each chunk's, over the last one's
        precisely = None if precise == hidden.dtype else hidden.new_empty(products.shape, dtype=precise)
        for start in range(0, tokens, size):
            part = slice(start, start + size) if counted is None else counted[start : start + size]
            chunk, target = hidden[part], targets[part]
            kept = target != IGNORED
            local = target - first
            here = kept & (local >= 0) & (local < rows)
            index = local.masked_fill(~here, 0).unsqueeze(1)
            product = products[: len(chunk)]
            torch.mm(chunk, matrix.t(), out=product)
            if low is not None and factor is not None:
                product.addmm_(low[part], factor.t())
            logits = product if precisely is None else precisely[: len(chunk)].copy_(product)
            if padding:
                logits[:, max(0, rows - padding) :] = float("-inf")
            peak = comm.all_reduce(logits.amax(dim=1), tp, torch_dist.ReduceOp.MAX)
            logits.sub_(peak.unsqueeze(1))
            picked = logits.gather(1, index).squeeze(1).masked_fill(~here, 0)
            logits.exp_()
            sums = comm.all_reduce(torch.stack((logits.sum(dim=1), picked)), tp)
            total += (sums[0].log() - sums[1]).masked_fill(~kept, 0).sum()
            if grad_hidden is None:
                continue
            # softmax minus one-hot, zero for a token that does not count
            logits.mul_((kept / sums[0]).unsqueeze(1))
            logits.scatter_add_(1, index, -here.to(precise).unsqueeze(1))
            grad = product if precisely is None else product.copy_(logits)
            grad_hidden[part] = matmul.linear(grad, matrix.t())
            if grad_weight is not None:
                _accumulate(grad_weight, grad, chunk)
            if low is not None and factor is not None and grad_low is not None and grad_factor is not None:
                grad_low[part] = matmul.linear(grad, factor.t())
                _accumulate(grad_factor, grad, low[part])
        grads = (grad_hidden, grad_weight, grad_low, grad_factor)
        ctx.save_for_backward(*(g if g is None else g.to(dtype) for g, dtype in zip(grads, formats, strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since these buffers are this call's own; autograd's version check refuses a second backward.
        grad_hidden, grad_weight, grad_low, grad_factor = (
            None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None, None, grad_low, grad_factor, None


def _accumulate(into: Tensor, grad: Tensor, chunk: Tensor) -> None:
    """Add a chunk's ``grad^T chunk`` to the gradient of a matrix."""
    if grad.dtype == into.dtype:
        into.addmm_(grad.t(), chunk)
    else:
        into.add_(matmul.linear(grad.t(), chunk.t()))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    tp: Axis,
    *,
    sp: bool,
    low_rank: tuple[Tensor, Tensor] | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Sum of the cross entropies of ``hidden @ weight.T`` against ``targets``, a scalar of float32 or better.

    hidden: [tokens, hidden], or [tokens / tp, hidden] under ``sp``. weight: this rank's rows of the padded vocabulary;
    ids of ``vocab_size`` and above get no probability. targets: [tokens], ``IGNORED`` where there is none. The same
    value on every tp rank. Forward: per chunk one max and one sum all-reduce of [chunk] numbers (and an all-gather of
    hidden under ``sp``). Backward: all-reduce or reduce-scatter of hidden's gradient. ``low_rank``: an
    update of the weight, as ``ColumnParallelLinear.low_rank`` gives it. No gradient is made for a frozen weight.
    ``counted``: where targets count, int64, ascending; only these are multiplied. None where nobody has looked.
    """
    low = factor = None
    if low_rank is None:
        hidden = comm.gather_from(hidden, tp) if sp else comm.copy_to(hidden, tp)
    else:
        low, factor = low_rank
        hidden, low = comm.enter_joined(hidden, low, tp, sp=sp)
    return comm.apply(_LinearCrossEntropy, hidden, weight, targets.reshape(-1), vocab_size, tp, low, factor, counted)
