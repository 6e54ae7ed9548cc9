"""From hidden states to the vocabulary: the product with the projection's weight, for the loss and for logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers import matmul


class VocabProduct:
    """``hidden W^T`` for one chunk of tokens at a time, and the gradients of its tensors from those of the logits.

    hidden: [tokens, hidden]; weight: [rows, hidden], this rank's part of the vocabulary. ``wanted``: which tensors need
    a gradient. The compute dtype may be wider than that of ``hidden`` (``matmul.through_float32``).
    """

    def __init__(self, wanted: tuple[bool, ...], hidden: Tensor, weight: Tensor) -> None:
        self.precise = torch.promote_types(hidden.dtype, torch.float32)
        if matmul.through_float32(hidden, weight):
            hidden = hidden.float()
        self.hidden, self.matrix = hidden, weight.to(hidden.dtype)
        self.grad_hidden = hidden.new_zeros(hidden.shape) if any(wanted) else None
        self.grad_weight = weight.new_zeros(weight.shape, dtype=self.precise) if wanted[1] else None

    def logits(self, tokens: slice | Tensor, into: Tensor) -> None:
        """Write the logits of ``tokens`` to ``into`` [chunk, rows]."""
        self.chunk = self.hidden[tokens]
        torch.mm(self.chunk, self.matrix.t(), out=into)

    def accumulate(self, tokens: slice | Tensor, grad: Tensor) -> None:
        """Accumulate gradients from ``grad`` [chunk, rows], the gradient of the logits that were written last."""
        assert self.grad_hidden is not None
        self.grad_hidden[tokens] = matmul.linear(grad, self.matrix.t())
        if self.grad_weight is not None:
            add_product(self.grad_weight, grad, self.chunk)

    def gradients(self) -> list[Tensor | None]:
        """The gradient of each tensor; None where it is not wanted."""
        return [self.grad_hidden, self.grad_weight]


def add_product(into: Tensor, grad: Tensor, chunk: Tensor) -> None:
    """Add ``grad^T chunk`` to ``into``, the gradient of a matrix."""
    if grad.dtype == into.dtype:
        into.addmm_(grad.t(), chunk)
    else:
        into.add_(matmul.linear(grad.t(), chunk.t()))


class Projection(nn.Module):
    """The last module of a model: the output projection, or the token embedding that it is tied to.

    ``weight``: [padded vocabulary / tp, hidden].
    """

    tp: Axis
    sp: bool
    weight: nn.Parameter
    product_kind: type[VocabProduct] = VocabProduct

    def enter(self, x: Tensor, seed: int | None, tp: Axis) -> tuple[Tensor, ...]:
        """The tensors of ``product_kind``, for all tokens. Forward: all-gather of x under ``sp``, else none. Backward:
        reduce-scatter (``sp``) or all-reduce of its gradient. ``tp``: this module's axis, named for the caller."""
        return (comm.gather_from(x, tp) if self.sp else comm.copy_to(x, tp)), self.weight

    def rows(self, x: Tensor) -> Tensor:
        """Logits of this rank's part of the vocabulary, [tokens, rows]; no gradient, no communication."""
        return matmul.linear(x, matmul.factor(self.weight, x))

    def whole(self, x: Tensor, batch: int) -> Tensor:
        """The hidden states of all tokens, [batch, seq, hidden]; all-gather under ``sp``. No gradient."""
        x = comm.all_gather(x, self.tp) if self.sp else x
        return x.view(batch, -1, x.shape[-1])

    def logits(self, x: Tensor, vocab_size: int) -> Tensor:
        """[tokens, hidden], the same on all ranks → logits [tokens, vocab_size] in float32 or better; all-gather over
        the vocabulary. No gradient."""
        rows = self.rows(x)
        return comm.all_gather(rows.to(torch.promote_types(x.dtype, torch.float32)), self.tp, dim=1)[:, :vocab_size]
