"""The whole config, and the constraints between its sections."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from megatron_lite.config.launch import LaunchConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.peft import PeftConfig
from megatron_lite.config.training import (
    CheckpointConfig,
    DataConfig,
    InitConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_lite.section import Section


class Config(Section):
    """The config of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    init: InitConfig = InitConfig()
    peft: PeftConfig | None = None
    launch: LaunchConfig = LaunchConfig()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir) / self.run.name

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len={self.data.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}")
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size={self.train.global_batch_size} must be a multiple of "
                f"train.micro_batch_size={self.train.micro_batch_size}"
            )
        if mistakes := self.optim.mistakes(self.train.steps):
            raise ValueError("\n".join(mistakes))
        if self.peft is not None and (mistakes := self.peft.mistakes(self)):
            raise ValueError("\n".join(mistakes))
        return self
