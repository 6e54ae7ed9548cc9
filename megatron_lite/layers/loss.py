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

from megatron_lite.dist import comm
from megatron_lite.dist.mesh import Axis

IGNORED = -100  # the target of a token with nothing to predict
_CHUNK_ELEMENTS = 1 << 23  # logits held at once, on each rank


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, tp: Axis) -> Tensor:
        rows = weight.shape[0]
        first = tp.rank * rows
        padding = max(0, first + rows - vocab_size)
        with_grad = hidden.requires_grad or weight.requires_grad
        precise = torch.promote_types(hidden.dtype, torch.float32)
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device) if with_grad else None
        total = torch.zeros((), dtype=precise, device=hidden.device)
        size = max(1, _CHUNK_ELEMENTS // rows)
        for start in range(0, hidden.shape[0], size):
            chunk, target = hidden[start : start + size], targets[start : start + size]
            counted = target != IGNORED
            local = target - first
            here = counted & (local >= 0) & (local < rows)
            index = local.masked_fill(~here, 0).unsqueeze(1)
            logits = (chunk @ matrix.t()).to(precise)
            if padding:
                logits[:, max(0, rows - padding) :] = float("-inf")
            peak = comm.all_reduce(logits.amax(dim=1), tp, torch_dist.ReduceOp.MAX)
            logits.sub_(peak.unsqueeze(1))
            picked = logits.gather(1, index).squeeze(1).masked_fill(~here, 0)
            logits.exp_()
            sums = comm.all_reduce(torch.stack((logits.sum(dim=1), picked)), tp)
            total += (sums[0].log() - sums[1]).masked_fill(~counted, 0).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # softmax minus one-hot, zero where nothing is counted
            logits.mul_((counted / sums[0]).unsqueeze(1))
            logits.scatter_add_(1, index, -here.to(precise).unsqueeze(1))
            grad = logits.to(hidden.dtype)
            torch.mm(grad, matrix, out=grad_hidden[start : start + size])
            if grad.dtype == precise:
                grad_weight.addmm_(grad.t(), chunk)
            else:
                grad_weight.add_(grad.t() @ chunk)
        if grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place, since these buffers are this call's own; autograd's version check refuses a second backward.
        grad_hidden.mul_(scale.to(grad_hidden.dtype))
        grad_weight.mul_(scale.to(grad_weight.dtype))
        return grad_hidden, grad_weight, None, None, None


_linear_cross_entropy = torch.compiler.disable(_LinearCrossEntropy.apply)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, tp: Axis, *, sp: bool
) -> Tensor:
    """Sum of the cross entropies of ``hidden @ weight.T`` against ``targets``, a scalar of float32 or better.

    hidden: [tokens, hidden], or [tokens / tp, hidden] under ``sp``. weight: this rank's rows of the padded vocabulary;
    ids of ``vocab_size`` and above get no probability. targets: [tokens], ``IGNORED`` where there is none. The same
    value on every tp rank. Forward: per chunk one max and one sum all-reduce of [chunk] numbers (and an all-gather of
    hidden under ``sp``). Backward: all-reduce or reduce-scatter of hidden's gradient.
    """
    hidden = comm.gather_from(hidden, tp) if sp else comm.copy_to(hidden, tp)
    return _linear_cross_entropy(hidden, weight, targets.reshape(-1), vocab_size, tp)
