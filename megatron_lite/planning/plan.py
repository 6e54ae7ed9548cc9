"""Degrees → batch arithmetic, checked before any process group exists. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite import cli
from megatron_lite.config import Config
from megatron_lite.errors import ConfigError
from megatron_lite.planning.checks import check_tp, engine_mistakes, peft_mistakes


@dataclass(frozen=True)
class Plan:
    """A layout that works. ``accumulation``: micro batches of a step on each data-parallel rank."""

    tp: int
    dp: int
    sp: bool
    accumulation: int
    dp_shard: int = 1

    @property
    def degrees(self) -> dict[str, int]:
        """The mesh's axes, for ``build_mesh``."""
        return {"dp_replicate": self.dp // self.dp_shard, "dp_shard": self.dp_shard, "tp": self.tp}

    def describe(self, config: Config) -> str:
        """One line for the log: how the ranks and the global batch are divided."""
        size, micro = config.train.global_batch_size, config.train.micro_batch_size
        sp = " with sequence parallelism" if self.sp else ""
        sharded = ""
        if self.dp_shard > 1:
            sharded = f" (ZeRO {config.parallel.zero} over {self.dp_shard})"
        elif config.parallel.zero > 0 or (config.parallel.engine == "deepspeed" and self.dp == 1):
            sharded = " (nothing to divide: trained as engine=fsdp, zero=0)"
        return (
            f"{cli.several(self.tp * self.dp, 'rank')} = dp {self.dp}{sharded} × tp {self.tp}{sp}; "
            f"global batch {size} = dp {self.dp} × {self.accumulation} × micro {micro} "
            f"({size * config.data.seq_len:,} tokens)"
        )


def make_plan(config: Config, world_size: int) -> Plan:
    """Check the degrees against the model and the number of ranks. Raises ConfigError with every mistake."""
    tp, train = config.parallel.tp, config.train
    mistakes = []
    if world_size % tp:
        mistakes.append(f"parallel.tp={tp} does not divide the {cli.several(world_size, 'rank')} of this job")
    try:
        check_tp(config.model, tp)
    except ConfigError as error:
        mistakes.append(str(error))
    tokens = train.micro_batch_size * config.data.seq_len
    if config.parallel.sp and tokens % tp:
        mistakes.append(f"parallel.sp: micro batch × seq_len = {tokens} tokens cannot be split over tp={tp}")
    if config.parallel.offload_activations and train.compile:
        mistakes.append(
            "parallel.offload_activations: a compiled block keeps what it wants; use parallel.recompute with "
            "train.compile, or no compilation"
        )
    zero, replicate = config.parallel.zero, config.parallel.dp_replicate
    mistakes += engine_mistakes(config, -(-world_size // tp)) + peft_mistakes(config, -(-world_size // tp))
    if zero == 1 and config.parallel.engine == "fsdp":
        mistakes.append(
            "parallel.zero=1: FSDP2 divides gradients wherever it divides optimizer state; parallel.zero=2 does both, "
            "sends as many bytes and needs less memory; or parallel.engine=deepspeed"
        )
    if zero == 0 and replicate > 1:
        mistakes.append(
            f"parallel.dp_replicate={replicate}: with parallel.zero=0 every rank holds everything; it takes zero 2 or 3"
        )
    if world_size % tp == 0 and world_size // tp % replicate:
        mistakes.append(f"parallel.dp_replicate={replicate} does not divide dp {world_size // tp}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    dp = world_size // tp
    if train.global_batch_size % (dp * train.micro_batch_size):
        step = dp * train.micro_batch_size
        below = train.global_batch_size // step * step
        near = f"{below} or {below + step}" if below else str(step)
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} must be a multiple of dp {dp} × "
            f"train.micro_batch_size {train.micro_batch_size} = {step}; nearest: {near}"
        )
    accumulation = train.global_batch_size // (dp * train.micro_batch_size)
    return Plan(tp, dp, config.parallel.sp and tp > 1, accumulation, dp // replicate if zero else 1)
