"""Degrees of parallelism and batch sizes, checked before any process group exists. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite import cli
from megatron_lite.config import Config
from megatron_lite.errors import ConfigError
from megatron_lite.planning import checks


@dataclass(frozen=True)
class Plan:
    """A valid layout. ``accumulation``: micro batches per step on each data-parallel rank."""

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
            sharded = " (only one shard: runs as engine=fsdp, zero=0)"
        return (
            f"{cli.several(self.tp * self.dp, 'rank')} = dp {self.dp}{sharded} × tp {self.tp}{sp}; "
            f"global batch {size} = dp {self.dp} × {self.accumulation} × micro {micro} "
            f"({size * config.data.seq_len:,} tokens)"
        )


def make_plan(config: Config, world_size: int) -> Plan:
    """Check the degrees against the model and the number of ranks. Raises ConfigError with every mistake."""
    if mistakes := checks.mistakes(config, world_size):
        raise ConfigError("\n".join(mistakes))
    parallel, train = config.parallel, config.train
    tp, dp = parallel.tp, world_size // parallel.tp
    if train.global_batch_size % (dp * train.micro_batch_size):
        step = dp * train.micro_batch_size
        below = train.global_batch_size // step * step
        near = f"{below} or {below + step}" if below else str(step)
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} must be a multiple of dp {dp} × "
            f"train.micro_batch_size {train.micro_batch_size} = {step}; nearest: {near}"
        )
    accumulation = train.global_batch_size // (dp * train.micro_batch_size)
    return Plan(tp, dp, parallel.sp and tp > 1, accumulation, dp // parallel.dp_replicate if parallel.zero else 1)
