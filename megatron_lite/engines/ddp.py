"""Plain data parallelism: every rank keeps all weights and optimizer state of its tp shard.

Weights are float32 (or float64) masters; layers cast them to the compute dtype where they are used, so gradients
arrive, accumulate and are reduced in the masters' precision.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as torch_dist
from torch import Tensor, nn

from megatron_lite.config import Config
from megatron_lite.distributed import comm
from megatron_lite.distributed.shard import Piece, materialize
from megatron_lite.engines.engine import Engine


class _Bucket:
    """Gradients that are reduced together, as views into one flat buffer. The buffer exists from the first gradient of
    a step until the update, so its memory is free for activations during forward."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.pending, self.work = parameters, 0, None
        self.flat: Tensor | None = None

    def open(self, _: Tensor) -> None:
        """Allocate the buffer before the first gradient is accumulated."""
        if self.flat is not None:
            return
        sizes = [parameter.numel() for parameter in self.parameters]
        self.flat = self.parameters[0].new_zeros(sum(sizes))
        for parameter, part in zip(self.parameters, self.flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)


class DataParallel(Engine):
    """ZeRO stage 0: an all-reduce over the data axis, in buckets, started as backward fills each of them.

    The bucketed overlap follows PyTorch DDP (Li et al. 2020), but sums where DDP averages.
    """

    def spread(self, config: Config) -> None:
        materialize(self.model, self.mesh.device)
        self.buckets: list[_Bucket] = []
        self._reducing = False
        if self.mesh.data.size > 1:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self._fill_buckets(trained, config.parallel.bucket_mb * 2**20)

    def piece(self, name: str, tensor: Tensor) -> Piece:
        return self.specs[name].piece(tensor, self.axis(name))

    def _fill_buckets(self, parameters: list[nn.Parameter], limit: float) -> None:
        # Backward reaches the last parameters first.
        group: list[nn.Parameter] = []
        size = 0
        for parameter in reversed(parameters):
            group.append(parameter)
            size += parameter.numel() * parameter.element_size()
            if size >= limit or parameter is parameters[0]:
                bucket = _Bucket(group)
                self.buckets.append(bucket)
                for member in group:
                    member.register_hook(bucket.open)
                    member.register_post_accumulate_grad_hook(self._hook(bucket))
                group, size = [], 0

    def _hook(self, bucket: _Bucket) -> Any:
        data = self.mesh.data.of(f"gradients, bucket {len(self.buckets) - 1}")

        def ready(_: Tensor) -> None:
            if not self._reducing:
                return
            bucket.pending -= 1
            if bucket.pending == 0:
                data.note()
                bucket.work = torch_dist.all_reduce(bucket.flat, group=data.group, async_op=True)

        return ready

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._reducing = last
        for bucket in self.buckets:
            bucket.pending = len(bucket.parameters)
        loss.backward()
        self._reducing = False

    def finish_gradients(self) -> Tensor:
        for bucket in self.buckets:
            assert bucket.work is not None, "a parameter got no gradient, so its bucket was never reduced"
            comm.wait(bucket.work)
            bucket.work = None
        return self.norm()

    def drop_gradients(self) -> None:
        super().drop_gradients()
        for bucket in self.buckets:
            bucket.flat = None
