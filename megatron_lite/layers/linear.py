"""Column- and row-parallel linear layers (Shoeybi et al. 2019) with sequence parallelism (Korthikanti et al. 2022)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.quantization import unpack
from megatron_lite.distributed.shard import ShardSpec, attach, spec_of
from megatron_lite.layers import matmul
from megatron_lite.layers.projection import Projection

_ALONE = Axis("tp")


def _plain(weight: Tensor, packing: str | None, dtype: torch.dtype) -> Tensor:
    """A weight as a matrix: unpacked into ``dtype``, or as it is."""
    return weight if packing is None else unpack(weight, packing, dtype)


class _Product(torch.autograd.Function):
    """``x @ weight.T + bias`` of column-parallel parameters. Backward overlaps the collective of the input gradient
    with the computation of the weight gradient. No collectives along an axis of size 1.

    x is saved only if the weight is trained. Under sequence parallelism only this rank's slice is saved, and backward
    gathers x again while it computes the input gradient. A packed weight is frozen; each product unpacks it and frees
    the result, so only the packed bytes are in memory between forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: Axis, sp: bool, packing: str | None
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.tp, ctx.sp, ctx.packing = tp, sp, packing
        return matmul.linear(comm.all_gather(x, tp) if sp else x, _plain(weight, packing, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tp, sp = ctx.tp, ctx.sp
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad = grad.contiguous()
        gathering = reducing = grad_x = None
        if sp and need_weight:
            own, x = x, x.new_empty((tp.size * x.shape[0], x.shape[1]))
            tp.note()
            gathering = torch_dist.all_gather_single(x, own.contiguous(), group=tp.group, async_op=True)
        if need_x:
            grad_x = partial = matmul.linear(grad, _plain(weight, ctx.packing, grad.dtype).t())
            if sp:
                grad_x = partial.new_empty((partial.shape[0] // tp.size, partial.shape[1]))
                tp.note()
                reducing = torch_dist.reduce_scatter_single(grad_x, partial, group=tp.group, async_op=True)
            elif tp.size > 1:
                tp.note()
                reducing = torch_dist.all_reduce(grad_x, group=tp.group, async_op=True)
        if gathering is not None:
            comm.wait(gathering)
        grad_weight = matmul.linear(grad.t(), x.t(), rounded=False) if need_weight else None
        grad_bias = grad.sum(0) if need_bias else None
        if reducing is not None:
            comm.wait(reducing)
        return grad_x, grad_weight, grad_bias, None, None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, with gradients, without communication."""
    if matmul.chooses(x):
        return comm.apply(_Product, x, weight, bias, _ALONE, False, None)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


class _Linear(nn.Module):
    """What both linears share: a weight, packed or not, and products with this rank's part of it."""

    tp: Axis
    weight: nn.Parameter
    packing: str | None = None

    def pack(self, packing: str) -> None:
        """Replace the frozen weight by uninitialised memory for its packed form (``quantization.py``)."""
        spec, init = replace(spec_of(self.weight), packing=packing), self.weight.init  # type: ignore[attr-defined]
        memory = torch.empty(spec.stored.local_shape(self.tp.size), dtype=torch.uint8, device=self.weight.device)
        self.weight = attach(nn.Parameter(memory, requires_grad=False), spec, init)
        self.packing = packing

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """This rank's weight, unpacked, in ``dtype``."""
        return _plain(self.weight, self.packing, dtype).to(dtype)

    def _weight(self, x: Tensor) -> Tensor:
        return self.weight if self.packing else matmul.factor(self.weight, x)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b``, without communication."""
        if self.packing is None:
            return product(x, self._weight(x), bias)
        return self.multiply(x, bias, _ALONE, sp=False)

    def multiply(self, x: Tensor, bias: Tensor | None, tp: Axis, *, sp: bool) -> Tensor:
        """``x W^T + b``, with a column-parallel layer's collectives along ``tp``."""
        return comm.apply(_Product, x, self._weight(x), bias, tp, sp, self.packing)  # type: ignore[no-any-return]


class ColumnParallelLinear(_Linear, Projection):
    """``y = x W^T + b`` with W split by output features; each rank computes its own columns of y.

    In: [tokens, in_features], or [tokens / tp, in_features] under ``sp``. Out: [tokens, out_features / tp].
    ``chunks``: sizes of fused projections, each split separately. Forward: all-gather of x under ``sp``, else none.
    Backward: reduce-scatter (``sp``) or all-reduce of x's gradient. ``seed``: for the dropout of an adapted linear
    (``peft/lora_modules.py``).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: Axis,
        *,
        bias: bool,
        sp: bool,
        std: float,
        chunks: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.tp, self.sp = tp, sp
        spec = ShardSpec((out_features, in_features), dim=0, chunks=chunks)
        self.weight = attach(nn.Parameter(torch.empty(spec.local_shape(tp.size))), spec, std)
        self.bias: nn.Parameter | None = None
        if bias:
            spec = ShardSpec((out_features,), dim=0, chunks=chunks)
            self.bias = attach(nn.Parameter(torch.empty(spec.local_shape(tp.size))), spec, 0.0)

    def forward(self, x: Tensor, seed: int | None = None) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.tp.size == 1:
            return self.product(x, bias)
        return self.multiply(x, bias, self.tp, sp=self.sp)


class RowParallelLinear(_Linear):
    """``y = x W^T + b`` with W split by input features; partial products are summed over the ranks.

    In: [tokens, in_features / tp]. Out: [tokens, out_features], or [tokens / tp, out_features] under ``sp``.
    Forward: reduce-scatter (``sp``) or all-reduce of y. Backward: all-gather (``sp``) or none. The bias is added once,
    after the sum; under ``sp`` its gradient is partial and backward all-reduces it. ``seed``: as above.
    """

    def __init__(self, in_features: int, out_features: int, tp: Axis, *, bias: bool, sp: bool, std: float) -> None:
        super().__init__()
        self.tp, self.sp = tp, sp
        spec = ShardSpec((out_features, in_features), dim=1)
        self.weight = attach(nn.Parameter(torch.empty(spec.local_shape(tp.size))), spec, std)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = attach(nn.Parameter(torch.empty(out_features)), ShardSpec((out_features,)), 0.0)

    def reduce(self, y: Tensor) -> Tensor:
        """Sum the ranks' partial products: reduce-scatter under ``sp``, else all-reduce."""
        return comm.reduce_scatter_to(y, self.tp) if self.sp else comm.reduce_from(y, self.tp)

    def replicated(self, parameter: Tensor) -> Tensor:
        """A replicated parameter for use after the sum. Under ``sp`` each rank uses it only on its own tokens, so
        backward all-reduces its gradient."""
        return comm.copy_to(parameter, self.tp) if self.sp else parameter

    def forward(self, x: Tensor, seed: int | None = None) -> Tensor:
        if self.tp.size == 1:
            return self.product(x, None if self.bias is None else self.bias.to(x.dtype))
        y = self.reduce(self.product(x, None))
        return y if self.bias is None else y + self.replicated(self.bias).to(x.dtype)
