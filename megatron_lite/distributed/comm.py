"""Collectives along an axis. Those used inside a model are autograd functions in conjugate pairs.

=====================  ==========================  ==========================
function               forward                     backward
=====================  ==========================  ==========================
``copy_to``            identity                    all-reduce
``reduce_from``        all-reduce                  identity
``gather_from``        all-gather along a dim      reduce-scatter
``scatter_to``         keep one's own slice        all-gather
``reduce_scatter_to``  reduce-scatter              all-gather
=====================  ==========================  ==========================

The pairs are f/g and g-bar/f-bar of Megatron-LM (Shoeybi et al. 2019; Korthikanti et al. 2022). Every one is the
identity, without a graph node, along an axis of size 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from megatron_lite.distributed.mesh import Axis


def all_reduce(tensor: Tensor, axis: Axis, op: Any = torch_dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over the axis and return the tensor. No gradient."""
    if axis.size > 1:
        axis.note()
        torch_dist.all_reduce(tensor, op=op, group=axis.group)
    return tensor


def wait(work: torch_dist.Work) -> None:
    """Wait for a collective that was started earlier."""
    work.wait()


def read(tensor: Tensor) -> Any:
    """The numbers in a tensor. On a GPU the host waits here for the device, and thereby for other ranks."""
    return tensor.tolist()


def all_gather(tensor: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """All-gather: concatenate the axis's tensors, all of one shape, along ``dim``. No gradient."""
    if axis.size == 1:
        return tensor
    axis.note()
    out = tensor.new_empty((axis.size * tensor.shape[0], *tensor.shape[1:]))
    torch_dist.all_gather_single(out, tensor.contiguous(), group=axis.group)
    return out if dim == 0 else torch.cat(out.chunk(axis.size), dim)


def reduce_scatter(tensor: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Sum over the axis and keep this rank's equal slice of ``dim``. No gradient."""
    if axis.size == 1:
        return tensor
    whole = tensor.contiguous() if dim == 0 else torch.cat(tensor.chunk(axis.size, dim))
    axis.note()
    out = whole.new_empty((whole.shape[0] // axis.size, *whole.shape[1:]))
    torch_dist.reduce_scatter_single(out, whole, group=axis.group)
    return out


def own_slice(tensor: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's equal slice of ``dim``."""
    return tensor if axis.size == 1 else tensor.chunk(axis.size, dim)[axis.rank].contiguous()


def all_to_all(
    parts: Sequence[Sequence[Tensor]], into: Sequence[Sequence[Tensor]], axis: Axis, device: torch.device
) -> None:
    """Send ``parts[i]`` to rank i and fill ``into[i]`` with the part that rank i sent to this rank. Both must have the
    same number of elements and dtype, in any shape, on ``device``. No gradient."""
    flat = [tensor for tensors in (*parts, *into) for tensor in tensors]
    like = flat[0] if flat else torch.empty(0, device=device)
    sending = torch.cat([like.new_empty(0), *(tensor.reshape(-1) for tensors in parts for tensor in tensors)])
    counts = [sum(tensor.numel() for tensor in tensors) for tensors in into]
    received = sending
    if axis.size > 1:
        received = sending.new_empty(sum(counts))
        splits = [sum(tensor.numel() for tensor in tensors) for tensors in parts]
        axis.note()
        torch_dist.all_to_all_single(received, sending, counts, splits, group=axis.group)
    for tensor, part in zip(
        (tensor for tensors in into for tensor in tensors),
        received.split([tensor.numel() for tensors in into for tensor in tensors]),
        strict=True,
    ):
        tensor.copy_(part.view(tensor.shape))


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """The Python objects of every rank of the axis, in rank order. For plans and errors, never on the hot path."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    axis.note()
    torch_dist.all_gather_object(values, value, group=axis.group)
    return values


def gather_names(names: Iterable[str], axis: Axis) -> list[str]:
    """Every name that some rank of the axis has, in the order of ranks and, of what one has first, in its own."""
    return list(dict.fromkeys(chain.from_iterable(gather_objects(list(names), axis))))


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.contiguous().clone(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        return all_reduce(tensor.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(tensor, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grad, ctx.axis, ctx.dim), None, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return own_slice(tensor, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.axis, ctx.dim), None, None


class _ReduceScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter(tensor, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.axis, ctx.dim), None, None


# torch.compiler.disable would import the compiler at once, which takes as long as importing torch; this form imports it
# only when it is called, so commands that do not train never do.
@torch._disable_dynamo
def apply(function: Any, *args: Any) -> Any:
    """Call a ``torch.autograd.Function`` with collectives or in-place work, outside of torch.compile: only the code
    between such calls is compiled."""
    return function.apply(*args)


def copy_to(tensor: Tensor, axis: Axis) -> Tensor:
    """Enter a parallel region with a replicated tensor: identity forward, all-reduce of its gradient backward."""
    return tensor if axis.size == 1 else apply(_CopyTo, tensor, axis)


def reduce_from(tensor: Tensor, axis: Axis) -> Tensor:
    """Leave a parallel region by summing partial results: all-reduce forward, identity backward."""
    return tensor if axis.size == 1 else apply(_ReduceFrom, tensor, axis)


def gather_from(tensor: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Gather slices of ``dim`` into a tensor used differently on every rank: all-gather, reduce-scatter backward."""
    return tensor if axis.size == 1 else apply(_GatherFrom, tensor, axis, dim)


def scatter_to(tensor: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Keep one's own slice of a replicated tensor: slice forward, all-gather backward."""
    return tensor if axis.size == 1 else apply(_ScatterTo, tensor, axis, dim)


def reduce_scatter_to(tensor: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Sum partial results and keep one's own slice: reduce-scatter forward, all-gather backward."""
    return tensor if axis.size == 1 else apply(_ReduceScatterTo, tensor, axis, dim)


def enter_joined(x: Tensor, low: Tensor, axis: Axis, *, sp: bool) -> tuple[Tensor, Tensor]:
    """Enter a parallel region with two tensors [tokens, …], with one collective in forward and one in backward:
    ``gather_from`` of token slices under ``sp``, else ``copy_to``."""
    if axis.size == 1:
        return x, low
    joined = torch.cat((x, low), dim=1)
    joined = gather_from(joined, axis) if sp else copy_to(joined, axis)
    return joined[:, : x.shape[1]], joined[:, x.shape[1] :]
