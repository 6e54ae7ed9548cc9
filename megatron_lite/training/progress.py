"""What a run reports: its layout and memory at the start, its metrics at every step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence

from megatron_lite.cli import several
from megatron_lite.config import Config
from megatron_lite.data.dataset import Dataset
from megatron_lite.engines.engine import Engine
from megatron_lite.families.targets import summary
from megatron_lite.planning.memory import bytes_per_frozen_parameter, bytes_per_parameter
from megatron_lite.planning.picture import picture
from megatron_lite.planning.plan import Plan
from megatron_lite.training.origin import note
from megatron_lite.training.report import Reporter, flops_per_token, memory_bytes, peak_flops
from megatron_lite.training.step import StepResult, Trainer
from megatron_lite.training.watchdog import Stragglers

logger = logging.getLogger("megatron_lite")


class Progress:
    """One on every rank, since all measure their peak FLOP/s together, as they will compute; only rank 0 reports."""

    def __init__(self, config: Config, plan: Plan, trainer: Trainer, data: Sequence[str], hosts: Sequence[str]) -> None:
        self.config, self.trainer, self.mesh = config, trainer, trainer.mesh
        self.flops = flops_per_token(config.model, config.data.seq_len, frozen=config.peft is not None)
        self.peak, self.peak_source = peak_flops(self.mesh.device, trainer.compute_dtype)
        if config.train.peak_tflops:
            self.peak, self.peak_source = config.train.peak_tflops * 1e12, "train.peak_tflops"
        self.reporter: Reporter | None = None
        self.stragglers: Stragglers | None = None
        if self.mesh.world.rank == 0:
            self.stragglers = Stragglers(hosts)
            note([plan.describe(config), *data])
            self._describe(plan)
            self.reporter = Reporter(config.folder, config.train.steps, trainer.state.step)

    def _describe(self, plan: Plan) -> None:
        config, engine = self.config, self.trainer.engine
        parameters = sum(math.prod(spec.shape) for spec in engine.specs.values())
        if plan.tp * plan.dp > 1:
            logger.info("%s", picture(plan))
        parts, all_trained = _memory(config, plan, engine)
        if config.peft is not None:
            trained = sum(math.prod(engine.specs[name].shape) for name in engine.trained)
            logger.info("%s on %s", config.peft.method, ", ".join(summary(config.peft.matched(config.model))))
            logger.info(
                "trained: %s of %s parameters (%.3g %%), which saves %s MiB per rank compared with training all",
                f"{trained:,}",
                f"{parameters:,}",
                100 * trained / parameters,
                f"{all_trained - parts['frozen']:,.1f}",
            )
        logger.info(
            "memory per rank, MiB: %s = %s, plus activations",
            " + ".join(f"{name} {size:,.1f}" for name, size in parts.items()),
            f"{sum(parts.values()):,.1f}",
        )
        logger.info("%s parameters; peak %.3g FLOP/s per rank (%s)", f"{parameters:,}", self.peak, self.peak_source)

    def step(self, result: StepResult, seconds: float) -> None:
        """Report one step, which took ``seconds``."""
        if self.reporter is None:
            return
        train, step = self.config.train, self.trainer.state.step
        # All tokens that are computed on: in conversations, only a smaller part of them are targets.
        rate = train.global_batch_size * self.config.data.seq_len / seconds
        mfu = rate * self.flops / (self.peak * self.mesh.world.size)
        scalars = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens_per_second": rate,
            "mfu": mfu,
            "memory_gib": memory_bytes(self.mesh.device) / 2**30,
        }
        self.reporter.scalars(step, {name: value for name, value in scalars.items() if math.isfinite(value)})
        line = (
            f"loss {result.loss:.4f}  norm {result.grad_norm:.3f}  lr {result.lr:.2e}  {rate:,.0f} tok/s  mfu {mfu:.1%}"
        )
        if result.skipped:
            line += "  SKIPPED: not finite, weights unchanged"
        self.reporter.advance(step, line, log=result.skipped or step % train.log_every == 0 or step == train.steps)
        late = self.stragglers.add(result.busy, time.monotonic()) if self.stragglers and len(result.busy) > 1 else ""
        if late:
            logger.warning("warning: step %d: %s", step, late)

    def evaluation(self, metrics: Mapping[str, float], line: str) -> None:
        """Report the metrics of an evaluation, and log ``line``."""
        if self.reporter is not None:
            self.reporter.scalars(self.trainer.state.step, metrics)
            logger.info("%s", line)

    def sample(self, text: str | None) -> None:
        """Report a text that shows what was learnt."""
        if self.reporter is not None and text is not None:
            self.reporter.text(self.trainer.state.step, "sample", text)

    def close(self) -> None:
        """Flush everything and give the terminal back."""
        if self.reporter is not None:
            self.reporter.close()


def _memory(config: Config, plan: Plan, engine: Engine) -> tuple[dict[str, float], float]:
    """MiB of a rank's persistent memory by kind; and what the frozen part would take if it were trained."""
    sizes = {name: math.prod(spec.local_shape(plan.tp)) for name, spec in engine.specs.items()}
    costs = bytes_per_parameter(config, plan)
    held = sum(sizes[name] for name in engine.trained)
    parts = {name: held * size / 2**20 for name, size in costs.items()}
    frozen = {name: size for name, size in sizes.items() if name not in engine.trained}
    if config.peft is not None:
        each = {n: bytes_per_frozen_parameter(config, plan, engine.specs[n].packing) for n in frozen}
        parts = {"frozen": sum(size * each[name] for name, size in frozen.items()) / 2**20, **parts}
    return parts, sum(frozen.values()) * sum(costs.values()) / 2**20


def describe_data(train: Dataset, validation: Dataset | None, limit: int) -> list[str]:
    """Lines for the log about the data."""
    lines = train.notes
    if validation is not None:
        there = sum(source.num_samples for source in validation.sources)
        some = f"the first {limit:,} of" if there > limit else "all"
        lines = [*lines, f"validation: {some} {several(there, 'window')}, each once"]
    return lines
