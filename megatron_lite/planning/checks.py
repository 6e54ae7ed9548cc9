"""Checks of a layout: what a model, the packing of its weights or an engine does not support. No torch."""

from __future__ import annotations

import math
from importlib.util import find_spec

from megatron_lite import cli
from megatron_lite.config import PACKED_BLOCK, Config, ModelConfig
from megatron_lite.errors import ConfigError
from megatron_lite.families.family import Linear, linears


def degrees_that_fit(model: ModelConfig, limit: int = 64) -> list[int]:
    """Every tensor-parallel degree up to ``limit`` that this model can be split by."""
    return [tp for tp in range(1, limit + 1) if not _tp_mistakes(model, tp)]


def _tp_mistakes(model: ModelConfig, tp: int) -> list[str]:
    mistakes = []
    if model.num_heads % tp:
        mistakes.append(f"model.num_heads={model.num_heads}")
    kv_width = model.num_kv_heads * model.head_dim
    if model.num_kv_heads % tp and (tp % model.num_kv_heads or kv_width % tp):
        mistakes.append(f"model.num_kv_heads={model.num_kv_heads}")
    if model.ffn_size % tp:
        mistakes.append(f"model.ffn_size={model.ffn_size}")
    if model.vocab_size is not None and model.padded_vocab_size % tp:
        mistakes.append(
            f"the vocabulary of {model.vocab_size} padded to {model.padded_vocab_size} (model.vocab_multiple)"
        )
    return mistakes


def check_tp(model: ModelConfig, tp: int) -> None:
    """Raises ConfigError when this model cannot be split over ``tp`` ranks."""
    if unfit := _tp_mistakes(model, tp):
        fits = ", ".join(map(str, degrees_that_fit(model)))
        raise ConfigError(f"parallel.tp={tp} does not divide {' nor '.join(unfit)}; this model can use tp {fits}")


def _fsdp_mistakes(config: Config, dp: int) -> list[str]:
    mistakes, parallel = [], config.parallel
    if parallel.offload != "none":
        mistakes.append(f"parallel.offload={parallel.offload} requires parallel.engine=deepspeed")
    if parallel.reduce_once and parallel.zero == 0:
        mistakes.append("parallel.reduce_once: with parallel.zero=0 gradients are reduced once a step anyway")
    if parallel.deepspeed:
        mistakes.append("parallel.deepspeed: these keys require parallel.engine=deepspeed")
    if parallel.zero == 1:
        mistakes.append(
            "parallel.zero=1: FSDP2 shards gradients whenever it shards optimizer state; use parallel.zero=2, which "
            "sends as many bytes and needs less memory, or parallel.engine=deepspeed"
        )
    return mistakes


def _deepspeed_mistakes(config: Config, dp: int) -> list[str]:
    mistakes, parallel = [], config.parallel
    offload, keys = f"parallel.offload={parallel.offload}", parallel.deepspeed
    if config.optim.name != "adamw":
        mistakes.append(
            f"optim.name={config.optim.name} needs whole matrices, but DeepSpeed's partitions cut through them; use "
            "engine=fsdp"
        )
    if parallel.reduce_once:
        mistakes.append(
            "parallel.reduce_once requires engine=fsdp; DeepSpeed always does so at zero 0 and 1, and never at 2 and 3"
        )
    if find_spec("deepspeed") is None:
        mistakes.append("parallel.engine=deepspeed: not installed here; pip install 'megatron_lite[deepspeed]'")
    if parallel.dp_replicate > 1:
        mistakes.append("parallel.dp_replicate: hybrid sharding requires parallel.engine=fsdp")
    if parallel.offload != "none" and dp == 1:
        mistakes.append(f"{offload}: with a single data-parallel rank nothing is sharded; start more ranks")
    if parallel.offload != "none" and parallel.zero < (least := 3 if parallel.offload == "all" else 1):
        mistakes.append(f"{offload} requires parallel.zero={least} or more")
    if parallel.zero == 3 and config.train.compile:
        mistakes.append(
            "train.compile: DeepSpeed's ZeRO 3 hooks cause a recompilation in every module; use engine=fsdp"
        )
    ours = sorted(keys.keys() & _OURS) + ["zero_optimization.stage"] * (
        "stage" in (keys.get("zero_optimization") or {})
    )
    if ours:
        mistakes.append(f"parallel.deepspeed: {', '.join(ours)} follows from this config and cannot be set there")
    return mistakes


_OURS = {  # keys of DeepSpeed's config that follow from ours
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("gradient_allreduce_op", "optimizer", "scheduler", "fp16", "bf16", "data_types", "communication_data_type"),
}

# What an engine does not support, for ``dp`` ranks; a new engine adds a line here and in engines/registry.py.
_ENGINES = {"fsdp": _fsdp_mistakes, "deepspeed": _deepspeed_mistakes}


def _called(linear: Linear) -> str:
    """A linear's name for users: that of its part if it has only one."""
    return linear.name if len(linear.parts) > 1 else f"{linear.half}.{next(iter(linear.parts))}"


def packing_mistakes(model: ModelConfig, tp: int, packing: str | None) -> list[str]:
    """A line for each linear whose rows, or a tp rank's parts of them, are not a whole number of blocks."""
    if packing is None:
        return []
    mistakes = []
    for linear in linears(model):
        parts = tp if linear.split == 1 else 1
        name, columns = _called(linear), linear.columns
        if columns % (parts * PACKED_BLOCK):
            fits = [str(n) for n in degrees_that_fit(model) if n < tp and not packing_mistakes(model, n, packing)]
            fix = f"use tp {' or '.join(fits)}" if fits else "use bfloat16"
            over = f" / parallel.tp={tp}" if parts > 1 else ""
            mistakes.append(
                f"peft.base_dtype={packing}: {name} has {columns} input features{over}, not a multiple of the "
                f"block size {PACKED_BLOCK}; {fix}"
            )
    return mistakes


def _cut_blocks(config: Config, dp: int) -> list[str]:
    """A line if DeepSpeed's stage 3, which divides a tensor's bytes evenly, would cut within a block."""
    tp, model = config.parallel.tp, config.model
    blocks = {_called(linear): linear.rows * linear.columns // tp // PACKED_BLOCK for linear in linears(model)}
    cut = [name for name, count in blocks.items() if count % dp]
    common = math.gcd(*blocks.values())
    near = max((n for n in range(1, dp + 1) if common % n == 0), default=1)
    return [
        f"peft.base_dtype={config.peft and config.peft.packing}: dp {dp} does not divide the {blocks[name]} blocks of "
        f"{PACKED_BLOCK} numbers in {name}, and DeepSpeed's ZeRO 3 would cut within one; use dp {near}, zero 2, or "
        "engine=fsdp"
        for name in cut[:1]
    ]


def _peft_mistakes(config: Config, dp: int) -> list[str]:
    mistakes, peft = [], config.peft
    if peft is None:
        return []
    if config.optim.name != "adamw":
        mistakes.append(
            f"optim.name={config.optim.name} is for a model's own matrices, not for what peft adds to them; use adamw"
        )
    computed = config.train.precision
    mistakes += packing_mistakes(config.model, config.parallel.tp, peft.packing)
    if config.parallel.engine == "deepspeed" and config.parallel.zero == 3 and peft.packing:
        mistakes += _cut_blocks(config, dp)
    if config.parallel.engine == "deepspeed" and dp > 1 and peft.base_dtype not in (None, computed, peft.packing):
        mistakes.append(
            f"peft.base_dtype={peft.base_dtype}: DeepSpeed holds all weights in the compute dtype, "
            f"train.precision={computed}; leave it out, or use engine=fsdp"
        )
    return mistakes


def mistakes(config: Config, world_size: int) -> list[str]:
    """Every reason why ``world_size`` ranks cannot train this config."""
    parallel, train = config.parallel, config.train
    tp, replicate = parallel.tp, parallel.dp_replicate
    found = []
    if world_size % tp:
        found.append(f"parallel.tp={tp} does not divide the {cli.several(world_size, 'rank')} of this job")
    try:
        check_tp(config.model, tp)
    except ConfigError as error:
        found.append(str(error))
    tokens = train.micro_batch_size * config.data.seq_len
    if parallel.sp and tokens % tp:
        found.append(f"parallel.sp: micro batch × seq_len = {tokens} tokens cannot be split over tp={tp}")
    if parallel.offload_activations and train.compile:
        found.append(
            "parallel.offload_activations has no effect in compiled blocks; use parallel.recompute with "
            "train.compile, or no compilation"
        )
    dp = -(-world_size // tp)
    found += _ENGINES[parallel.engine](config, dp) + _peft_mistakes(config, dp)
    if parallel.zero == 0 and replicate > 1:
        found.append(
            f"parallel.dp_replicate={replicate} requires zero 2 or 3; with parallel.zero=0 every rank holds everything"
        )
    if world_size % tp == 0 and dp % replicate:
        found.append(f"parallel.dp_replicate={replicate} does not divide dp {dp}")
    return found
