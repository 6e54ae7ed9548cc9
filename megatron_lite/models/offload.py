"""Activation offload (Rajbhandari et al. 2021): tensors saved for backward are kept in CPU memory.

With ``recompute=full`` these are only the inputs of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class _Mover:
    """Copies tensors to pinned memory on a separate stream, in parallel with forward, and back when backward needs
    them."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None

    def out(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        if not tensor.is_cuda:
            return host.copy_(tensor)
        self.stream = self.stream or torch.cuda.Stream(tensor.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)
        return host

    def back(self, host: Tensor, device: torch.device) -> Tensor:
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        return host.to(device, non_blocking=True)


def apply_offload(blocks: Iterable[Any]) -> None:
    """Offload each block's saved tensors, except weights and what all blocks share (rotary angles, masks), which stay
    in memory anyway. Call it after ``apply_recompute``."""
    mover = _Mover()
    for block in blocks:
        block.forward = _offloaded(block.forward, mover)


def _offloaded(forward: Callable[..., Any], mover: _Mover) -> Callable[..., Any]:
    def run(x: Tensor, context: Any) -> Any:
        shared = {storage(t) for part in vars(context).values() for t in _tensors(part)}

        def pack(tensor: Tensor) -> tuple[Tensor, torch.device | None]:
            weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
            if weight or storage(tensor) in shared:
                return tensor, None
            return mover.out(tensor), tensor.device

        def unpack(packed: tuple[Tensor, torch.device | None]) -> Tensor:
            tensor, device = packed
            return tensor if device is None else mover.back(tensor, device)

        with saved_tensors_hooks(pack, unpack):
            return forward(x, context)

    return run


def storage(tensor: Tensor) -> int:
    """The address of a tensor's storage: the same for tensors that share memory."""
    return tensor.untyped_storage().data_ptr()


def _tensors(part: Any) -> Iterable[Tensor]:
    return [t for t in (part if isinstance(part, tuple) else (part,)) if isinstance(t, Tensor)]
