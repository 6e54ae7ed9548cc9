"""Parameter-efficient fine-tuning: the model's own weights stay frozen, a method adds the few that are trained.

``METHODS`` is the only list of methods. The config's ``peft`` section, ``apply``, merging and the peft library's
folders all use it. No torch at import (``method.py`` says why).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_lite.peft.adapter import AdapterConfig
from megatron_lite.peft.lora import LoRAConfig
from megatron_lite.peft.method import PeftMethod
from megatron_lite.peft.prefix import PrefixConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

METHODS: dict[str, type[PeftMethod]] = {
    "lora": LoRAConfig,
    "adapter": AdapterConfig,
    "prefix": PrefixConfig,
}


def apply(model: nn.Module, config: PeftMethod | None, compute: torch.dtype) -> None:
    """Prepare a model for training. With a method: freeze the weights, in ``base_dtype`` or ``compute``, and insert the
    method's parameters, the only ones with a gradient, in float32 or better. Without: all weights in float32 or better.
    """
    import torch

    from megatron_lite.layers.context import DTYPES

    master = torch.promote_types(compute, torch.float32)
    if config is None:
        model.to(master)
        return
    model.requires_grad_(False).to(DTYPES.get(config.base_dtype or "", compute))
    with next(model.parameters()).device:
        config.insert(model)
    pack_base(model, config.packing)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(master)


def pack_base(model: Any, packing: str | None) -> None:
    """Store the frozen linears inside the blocks in 8 or 4 bits, if ``packing`` is given. Call it before loading."""
    from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear

    if packing is None:
        return
    for module in model.blocks.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and not module.weight.requires_grad:
            module.pack(packing)
