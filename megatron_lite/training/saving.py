"""A run's checkpoints: what is in them, when they are written, how many are kept."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from megatron_lite import __version__, checkpoint
from megatron_lite.config import Config, to_yaml
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.errors import StorageError
from megatron_lite.planning.plan import Plan
from megatron_lite.training.origin import Origin
from megatron_lite.training.step import Trainer

logger = logging.getLogger("megatron_lite")


class Saver:
    """Commits checkpoints of a trainer, at once or, with ``checkpoint.async``, during the next steps."""

    def __init__(self, config: Config, plan: Plan, mesh: Mesh, folder: Path, origin: Origin, trainer: Trainer) -> None:
        self.config, self.plan, self.mesh, self.folder = config, plan, mesh, folder
        self.origin, self.trainer = origin, trainer
        self.background: checkpoint.BackgroundSaver | None = None
        if config.checkpoint.background:
            self.background = checkpoint.BackgroundSaver(mesh.world, mesh.device)
            trainer.before_update = self.background.wait_for_copy

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written in the background."""
        return self.background is not None and self.background.failed

    def save(self) -> None:
        """Commit a checkpoint of the current step, then prune older ones. Collective."""
        config, origin, state = self.config, self.origin, self.trainer.state
        validation, tokenizer = origin.validation_data, origin.tokenizer
        content = {
            "train": dict(vars(state)),
            "seed": config.run.seed,
            "dataset": origin.train_data.fingerprint,
            "validation": validation.fingerprint if validation is not None else None,
            "vocab_size": config.model.vocab_size,
            "padded_vocab_size": config.model.padded_vocab_size,
            "tokenizer_sha256": tokenizer.sha256 if tokenizer else None,
            "layout": f"{config.parallel.engine} {self.plan.describe(config).partition(';')[0]}",
            "versions": {"megatron_lite": __version__, "torch": torch.__version__},
        }
        if config.peft is not None:
            content["base"] = origin.base_fingerprint
        extras = {**origin.extras, "config.yaml": to_yaml(config).encode()}
        pieces, faults = self.trainer.engine.pieces(), self.trainer.faults
        if self.background is not None:
            self.background.save(self.folder, state.step, pieces, content, extras, faults, self._saved)
        else:
            world = self.mesh.world
            self._saved(checkpoint.save(self.folder, state.step, pieces, content, extras, world, faults))

    def wait(self) -> None:
        """Wait until a checkpoint that is being written in the background is committed."""
        if self.background is not None:
            self.background.wait()

    def _saved(self, path: Path) -> None:
        """Called after a checkpoint is committed; with ``checkpoint.async`` in the background thread."""
        if self.mesh.world.rank:
            return
        logger.info("saved %s", path)
        try:
            checkpoint.prune(self.folder, self.config.checkpoint.keep, self.config.checkpoint.keep_every)
        except StorageError as error:
            logger.warning("warning: an older checkpoint could not be removed: %s", error)
