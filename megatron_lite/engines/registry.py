"""All engines by name, and the choice of an engine for a run.

Engines are imported on demand: FSDP2 takes half a second, DeepSpeed several, and it may not be installed.
"""

from __future__ import annotations

from importlib import import_module

from torch import nn

from megatron_lite.config import Config
from megatron_lite.distributed.env import export_for_deepspeed
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.engines.engine import Engine

ENGINES = {
    "ddp": ("megatron_lite.engines.ddp", "DataParallel"),
    "fsdp": ("megatron_lite.engines.fsdp", "FullyShardedDataParallel"),
    "deepspeed": ("megatron_lite.engines.deepspeed", "DeepSpeedZeRO"),
}


def build_engine(model: nn.Module, config: Config, mesh: Mesh) -> Engine:
    """The engine that the config selects; ``ddp`` if there is nothing to divide."""
    name = config.parallel.engine if mesh.data.size > 1 else "ddp"
    if name == "fsdp" and mesh.dp_shard.size == 1:
        name = "ddp"
    if name == "deepspeed":
        export_for_deepspeed(mesh.device.type, mesh.device.index)
    module, engine = ENGINES[name]
    made: Engine = getattr(import_module(module), engine)(model, config, mesh)
    return made
