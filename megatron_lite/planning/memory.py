"""Estimates for a layout: a rank's memory per parameter, and a checkpoint's bytes on disk. No torch."""

from __future__ import annotations

from megatron_lite.config import PACKED_BLOCK, PACKED_BYTES, Config
from megatron_lite.families.family import block_weights
from megatron_lite.planning.plan import Plan


def bytes_per_parameter(config: Config, plan: Plan) -> dict[str, float]:
    """Persistent memory of a rank by kind, in bytes per parameter of its tp shard. Not included are activations,
    buckets, temporarily gathered tensors and, with Muon, the moments of parameters that AdamW updates. After
    Rajbhandari et al. 2020 (ZeRO), but gradients have the dtype of the masters."""
    deepspeed, zero, shards = config.parallel.engine == "deepspeed", config.parallel.zero, plan.dp_shard
    master = 8.0 if config.train.precision == "float64" else 4.0
    compute = 2.0 if config.train.precision == "bfloat16" else master
    moments = {"adamw": 2 * master / shards, "muon": master / plan.dp, "adafactor": 0.0}[config.optim.name]
    if shards == 1:
        return {"weights": master, "gradients": master, "moments": moments}
    parts = {"masters": master / shards, "gradients": master / shards, "moments": moments}
    if deepspeed:
        if zero == 1:
            parts["gradients"] = master
        return {"weights": compute / shards if zero == 3 else compute, **parts}
    return {"weights": compute, **parts} if zero == 2 else parts


def bytes_per_frozen_parameter(config: Config, plan: Plan, packing: str | None = None) -> float:
    """Persistent memory of a rank in bytes per frozen parameter of its tp shard: only the weight, packed as ``packing``
    or not."""
    parallel, train, peft = config.parallel, config.train, config.peft
    sizes = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.0}
    if packing is not None:
        held = used = PACKED_BYTES[packing] / PACKED_BLOCK
    else:
        held, used = sizes.get((peft and peft.base_dtype) or "", sizes[train.precision]), sizes[train.precision]
    if plan.dp_shard == 1 or (parallel.engine == "deepspeed" and parallel.zero < 3):
        return held
    return held / plan.dp_shard + (used if parallel.zero == 2 else 0.0)


def checkpoint_bytes(config: Config) -> int:
    """The size of a checkpoint on disk, within a few percent: weights and moments, without small tensors. 0 for an
    adapter, which has only a few MB."""
    if config.peft is not None:
        return 0
    model = config.model
    vocabulary = model.padded_vocab_size * (1 if model.tie_embeddings else 2)
    positions = 0 if model.traits.rotary else model.max_seq_len
    weights = model.num_layers * block_weights(model) + model.hidden_size * (vocabulary + positions)
    moments = {"adamw": 2, "muon": 1, "adafactor": 0}[config.optim.name]
    return weights * (1 + moments) * (8 if config.train.precision == "float64" else 4)
