"""Parameter-efficient fine-tuning: the model's own weights stay as they are, a method adds the few that are trained.

A method is one function that puts its modules into a model whose parameters are frozen already: on the meta device,
sharded as their specs say, before any engine sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron_lite.config import PeftConfig
from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_lite.peft.adapter import add_adapters
from megatron_lite.peft.lora import add_lora
from megatron_lite.peft.prefix import add_prefix

METHODS: dict[str, Callable[[Any, Any], None]] = {"lora": add_lora, "adapter": add_adapters, "prefix": add_prefix}
_DTYPES: dict[str | None, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def apply(model: nn.Module, config: PeftConfig | None, compute: torch.dtype) -> None:
    """Make a model what is trained. With a method: its weights frozen, in ``base_dtype`` or what is computed in, and
    the method's own parameters, in float32 or better, the only ones that want a gradient. Without: all of that kind.
    """
    master = torch.promote_types(compute, torch.float32)
    if config is None:
        model.to(master)
        return
    model.requires_grad_(False).to(_DTYPES.get(config.base_dtype, compute))
    with next(model.parameters()).device:
        METHODS[config.method](model, config)
    pack_base(model, config.packing)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(master)


def pack_base(model: Any, packing: str | None) -> None:
    """Store the frozen linears inside the blocks packed, where ``packing`` says so, before they get their numbers."""
    if packing is None:
        return
    for module in model.blocks.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and not module.weight.requires_grad:
            module.pack(packing)
