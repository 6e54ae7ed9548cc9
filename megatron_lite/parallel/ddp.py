"""Plain data parallelism: every rank keeps all weights and optimizer state of its tp shard.

Weights are float32 (or float64) masters; layers cast them to the compute dtype where they are used, so gradients
arrive, accumulate and are reduced in the masters' precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from megatron_lite.dist.mesh import Mesh
from megatron_lite.dist.shard import ShardSpec, named_shards
from megatron_lite.optim import gradient_norm, scale_gradients


class _Bucket:
    """Gradients that are reduced together, views into one flat buffer."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        self.size, self.pending, self.work = len(parameters), 0, None
        start = 0
        for parameter in parameters:
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()


class DataParallel:
    """The engine of ZeRO stage 0: an all-reduce over dp, in buckets, started as backward fills each of them.

    The bucketed overlap follows PyTorch DDP (Li et al. 2020), but sums where DDP averages.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, bucket_mb: float) -> None:
        self.model, self.optimizer, self.mesh = model, optimizer, mesh
        self.parameters = list(model.parameters())
        self.buckets: list[_Bucket] = []
        self._reducing = False
        if mesh.dp.size > 1:
            self._fill_buckets(bucket_mb * 2**20)

    def _fill_buckets(self, limit: float) -> None:
        # Backward reaches the last parameters first.
        group: list[nn.Parameter] = []
        size = 0
        for parameter in reversed(self.parameters):
            group.append(parameter)
            size += parameter.numel() * parameter.element_size()
            if size >= limit or parameter is self.parameters[0]:
                bucket = _Bucket(group)
                self.buckets.append(bucket)
                for member in group:
                    member.register_post_accumulate_grad_hook(self._hook(bucket))
                group, size = [], 0

    def _hook(self, bucket: _Bucket) -> Any:
        def ready(_: Tensor) -> None:
            if not self._reducing:
                return
            bucket.pending -= 1
            if bucket.pending == 0:
                bucket.work = torch_dist.all_reduce(bucket.flat, group=self.mesh.dp.group, async_op=True)

        return ready

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._reducing = last
        for bucket in self.buckets:
            bucket.pending = bucket.size
        loss.backward()
        self._reducing = False

    def finish_gradients(self) -> Tensor:
        for bucket in self.buckets:
            assert bucket.work is not None, "a parameter got no gradient, so its bucket was never reduced"
            bucket.work.wait()
            bucket.work = None
        return gradient_norm(self.parameters, self.mesh.tp)

    def clip(self, norm: Tensor, limit: float) -> None:
        scale_gradients(self.parameters, norm, limit)

    def gradients(self) -> dict[str, tuple[Tensor, ShardSpec]]:
        return {n: (p.grad, spec) for n, p, spec in named_shards(self.model) if p.grad is not None}

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.drop_gradients()

    def tensors(self) -> dict[str, tuple[Tensor, ShardSpec]]:
        found: dict[str, tuple[Tensor, ShardSpec]] = {}
        for name, parameter, spec in named_shards(self.model):
            state = self.optimizer.state[parameter]
            if not state:  # what AdamW itself would make in its first step
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            found[f"model.{name}"] = (parameter.detach(), spec)
            found[f"optimizer.{name}.exp_avg"] = (state["exp_avg"], spec)
            found[f"optimizer.{name}.exp_avg_sq"] = (state["exp_avg_sq"], spec)
        return found

    def restore_updates(self, updates: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)

    def drop_gradients(self) -> None:
        if self.buckets:
            for bucket in self.buckets:
                bucket.flat.zero_()
        else:
            self.optimizer.zero_grad(set_to_none=True)
