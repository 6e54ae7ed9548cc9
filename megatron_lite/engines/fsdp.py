"""Fully sharded data parallelism: FSDP2 around local tensor-parallel shards, ZeRO stages 2 and 3.

Each block is a group that is gathered, used and, at stage 3, freed again. Parameters outside of the blocks (embedding,
final norm, projection) form one more group. FSDP2 divides the first dim of each local tensor over dp_shard, and reduces
gradients over dp_shard and, with hybrid sharding, over dp_replicate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_lite.config import Config
from megatron_lite.distributed.shard import Piece
from megatron_lite.engines.engine import Engine

_DTYPES = {"float32": None, "float64": None, "bfloat16": torch.bfloat16}


class FullyShardedDataParallel(Engine):
    """Weights, gradients and optimizer state divided over dp_shard; gradients summed, where FSDP averages.

    With bfloat16, the weights of blocks are gathered in bfloat16; embedding and projection are gathered in float32,
    because rows of an embedding sum up many gradients. Gradients are reduced in the masters' precision.
    """

    def spread(self, config: Config) -> None:
        model: Any = self.model
        device_mesh = self.mesh.device_mesh
        assert device_mesh is not None
        axes = ("dp_replicate", "dp_shard") if self.mesh.dp_replicate.size > 1 else ("dp_shard",)
        compute = _DTYPES[config.train.precision]
        master = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)

        def divide(module: Any, dtype: torch.dtype | None, reshard: bool) -> None:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=master, cast_forward_inputs=False)
            fully_shard(module, mesh=device_mesh[axes], reshard_after_forward=reshard, mp_policy=policy)

        blocks = list(model.blocks)
        for block in blocks:
            divide(block, compute, config.parallel.zero == 3)
        divide(model, None, False)
        ahead = config.parallel.prefetch
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + ahead])
            block.set_modules_to_backward_prefetch(blocks[max(0, i - ahead) : i][::-1])
        self.reduce_once = config.parallel.reduce_once
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        model.to_empty(device=self.mesh.device)

    def piece(self, name: str, tensor: Tensor) -> Piece:
        spec, axis, dp = self.specs[name], self.axis(name), self.mesh.dp_shard
        rows, *others = spec.stored.local_shape(axis.size)
        # FSDP2 divides as torch.chunk does: equal parts, the last ones shorter or empty.
        first = min(rows, -(-rows // dp.size) * dp.rank)
        return spec.piece(tensor, axis, first * math.prod(others))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        model: Any = self.model
        model.set_is_last_backward(last)
        model.set_requires_all_reduce(last)
        if self.reduce_once:
            model.set_requires_gradient_sync(last)
        loss.backward()
