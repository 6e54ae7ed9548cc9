"""The optimizer: which parameters decay, the learning-rate schedule, and the global gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.config import OptimConfig
from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import ShardSpec


def decays(name: str, spec: ShardSpec) -> bool:
    """Weight decay applies to matrices, not to norms, biases or embeddings looked up by index."""
    return len(spec.shape) >= 2 and not name.startswith(("embedding.", "positions."))


def is_updated_whole(name: str, spec: ShardSpec, config: OptimConfig) -> bool:
    """Whether the optimizer updates this parameter as a whole: Muon matrices of blocks, Adafactor everything."""
    hidden_matrix = name.startswith("blocks.") and len(spec.shape) == 2
    return config.name == "adafactor" or (config.name == "muon" and hidden_matrix)


def build_adamw(
    model: nn.Module, specs: Mapping[str, ShardSpec], config: OptimConfig, group_elements: float = math.inf
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) with groups with and without weight decay, except for parameters that
    another optimizer updates. ``specs``: shapes, because an engine may have flattened the parameters. A group ends with
    the parameter that reaches ``group_elements``."""
    groups: list[dict[str, Any]] = []
    for decay in (True, False):
        groups.append({"params": [], "weight_decay": config.weight_decay if decay else 0.0})
        size = 0
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or is_updated_whole(name, specs[name], config):
                continue
            if decays(name, specs[name]) != decay:
                continue
            if size >= group_elements:
                groups.append({**groups[-1], "params": []})
                size = 0
            groups[-1]["params"].append(parameter)
            size += parameter.numel()
    groups = [group for group in groups if group["params"]] or groups[:1]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of ``step`` (from 0) of ``steps``: linear warm-up, then the schedule.

    ``wsd`` (warm-up, stable, decay; Hu et al. 2024) falls linearly over the last ``decay_steps``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    if config.schedule == "cosine":
        level = (1 + math.cos(math.pi * progress)) / 2
    elif config.schedule == "linear":
        level = 1 - progress
    elif config.schedule == "wsd":
        level = min(1.0, (steps - step) / max(1, config.decay(steps)))
    else:
        return config.lr
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * level)


@torch.no_grad()
def gradient_norm(gradients: Iterable[tuple[Tensor, int]], world: Axis) -> Tensor:
    """L2 norm of the global gradient, each element counted once: a scalar, all-reduced over the world.

    Each gradient comes with the number of ranks that hold the same part, by which its squares are divided.
    """
    held: dict[int, list[Tensor]] = {}
    for gradient, copies in gradients:
        held.setdefault(copies, []).append(gradient)
    sums = [torch.stack(torch._foreach_norm(some)).double().square().sum() / copies for copies, some in held.items()]
    return comm.all_reduce(torch.stack(sums).sum(), world).sqrt()


@torch.no_grad()
def scale_gradients(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Clip by the global norm: scale every gradient by min(1, limit / norm)."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
