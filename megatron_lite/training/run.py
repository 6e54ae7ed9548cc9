"""``python -m megatron_lite train``: one rank of a run, from the config to its exit code."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import time
from collections.abc import Sequence

import torch

from megatron_lite import checkpoint
from megatron_lite.config import Config, to_yaml
from megatron_lite.data.loader import Loader, once
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.mesh import Mesh, build_mesh, limit_waits, peer_failure, pick_device, process_group
from megatron_lite.errors import Preempted
from megatron_lite.planning.plan import Plan
from megatron_lite.tasks import build_task
from megatron_lite.training import allocator
from megatron_lite.training.faults import Faults
from megatron_lite.training.lifetime import StopRequest, die, identity, locked
from megatron_lite.training.origin import Origin
from megatron_lite.training.progress import Progress, describe_data
from megatron_lite.training.saving import Saver
from megatron_lite.training.step import Trainer
from megatron_lite.training.watchdog import Watchdog

logger = logging.getLogger("megatron_lite")
_COLLECT_EVERY = 50  # steps
_GRACE_S = 0.5  # collectives time out this much after hang_timeout, so that the watchdog writes its record first


class Run:
    """One rank of a run, and the loop around ``train_step``."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        rank: Rank,
        mesh: Mesh,
        stop: StopRequest,
        watchdog: Watchdog,
        hosts: Sequence[str] = (),
    ) -> None:
        self.config, self.plan, self.mesh = config, plan, mesh
        self.stop, self.watchdog, self.hosts = stop, watchdog, hosts
        self.tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        self.task = build_task(config)
        self.train_data = self.task.dataset("train")
        self.validation_data = self.task.dataset("validation") if config.train.eval_every else None
        folder = config.folder / "checkpoints"
        checkpoint.prepare(folder, mesh.world)
        self.origin = Origin(config, mesh.world, folder, self.train_data, self.validation_data, self.tokenizer)
        faults = Faults.parse(rank.faults, rank.rank, rank.attempt)
        self.trainer = Trainer(config, mesh, plan, faults, self.task)
        limit_waits(config.train.hang_timeout + _GRACE_S)
        self.saver = Saver(config, plan, mesh, folder, self.origin, self.trainer)
        self.progress: Progress | None = None

    @property
    def _validation_limit(self) -> int:
        return self.config.train.eval_steps * self.config.train.global_batch_size

    def start(self) -> Progress:
        """Load the state that the run starts from, and log what begins."""
        config, trainer = self.config, self.trainer
        trainer.state = self.origin.load(trainer.engine)
        data = describe_data(self.train_data, self.validation_data, self._validation_limit)
        self.progress = Progress(config, self.plan, trainer, data, self.hosts)
        if self.mesh.world.rank == 0:
            # Only now: a start that was refused must not overwrite the run's config.
            (config.folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            step, steps = trainer.state.step, config.train.steps
            if step >= steps:
                logger.info("nothing to train: the run is already at step %d of train.steps=%d", step, steps)
        return self.progress

    def loop(self) -> None:
        """Train to the last step, pausing every so often to evaluate, to sample and to save. Raises Preempted after a
        requested stop, once the run is saved."""
        train, trainer, every = self.config.train, self.trainer, self.config.checkpoint.every
        progress = self.start()
        saved = trainer.state.step
        profiler = self._profiler()
        gc.freeze()
        gc.disable()  # all ranks collect at the same steps; otherwise the others would wait for each that collects
        with contextlib.closing(self._loader(trainer.state.samples)) as loader:
            while trainer.state.step < train.steps:
                step = trainer.state.step + 1
                self.watchdog.watch(step)
                began = time.perf_counter()
                busy = self.watchdog.take_busy() if step % train.log_every == 0 else None
                result = trainer.train_step(next(loader), stop=self.stop.asked or self.saver.failed, busy=busy)
                self.watchdog.pause()
                progress.step(result, time.perf_counter() - began)
                if profiler is not None:
                    profiler.step()
                if step % _COLLECT_EVERY == 0:
                    gc.collect()
                if self.validation_data is not None and (step % train.eval_every == 0 or step == train.steps):
                    self.evaluate(progress)
                if train.sample_every and step % train.sample_every == 0 and self.tokenizer is not None:
                    progress.sample(trainer.sample(self.tokenizer, self.origin.extras))
                if result.stop or step == train.steps or (every and step % every == 0):
                    self.watchdog.watch(step)
                    self.watchdog.pause()
                    self.saver.save()
                    saved = step
                if result.stop and step < train.steps:
                    self.saver.wait()
                    anew = "" if self.config.checkpoint.resume == "auto" else ", with checkpoint.resume=auto,"
                    raise Preempted(f"stopped at step {step} on request, saved; run again{anew} to continue")
        if saved < trainer.state.step:
            self.saver.save()
        self.saver.wait()

    def close(self) -> None:
        """Flush what is reported and give the terminal back."""
        if self.progress is not None:
            self.progress.close()

    def evaluate(self, progress: Progress) -> None:
        """Report the task's metrics on the validation windows: the same ones every time, each counted once."""
        assert self.validation_data is not None
        batches = once(
            self.validation_data,
            self._validation_limit,
            micro_batch_size=self.config.train.micro_batch_size,
            dp_rank=self.mesh.dp.rank,
            dp_size=self.mesh.dp.size,
            device=self.mesh.device,
        )
        metrics = self.task.metrics(self.trainer.evaluate(batches))
        progress.evaluation(metrics, self.task.describe(metrics))

    def _loader(self, samples: int) -> Loader:
        return Loader(
            self.train_data,
            micro_batch_size=self.config.train.micro_batch_size,
            num_micro_batches=self.plan.accumulation,
            dp_rank=self.mesh.dp.rank,
            dp_size=self.mesh.dp.size,
            consumed_samples=samples,
            prefetch=self.config.data.prefetch,
            device=self.mesh.device,
        )

    def _profiler(self) -> torch.profiler.profile | None:
        """A torch profiler over the chosen steps of rank 0; its trace goes to the run folder."""
        wanted = self.config.train.profile
        if wanted is None or self.mesh.world.rank:
            return None
        schedule = torch.profiler.schedule(wait=max(0, wanted.start - 2), warmup=1, active=wanted.steps, repeat=1)
        trace = str(self.config.folder / "trace.json")
        profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(trace))
        profiler.start()
        return profiler


def _prepare_logs(config: Config, rank: Rank) -> None:
    (config.folder / "logs").mkdir(parents=True, exist_ok=True)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO if rank.rank == 0 else logging.WARNING)


def train(config: Config, plan: Plan, rank: Rank) -> None:
    """Run one rank to its end; the process exits here on any failure, with the documented exit code."""
    Faults.parse(rank.faults)
    try:
        with locked(config.folder, rank):
            _prepare_logs(config, rank)
            stop = StopRequest(rank.relay, attached=rank.size > 1, local_size=rank.local_size)
            device = pick_device(rank)
            if device.type == "cpu":
                allocator.keep_freed()
            hang_timeout = config.train.hang_timeout
            with process_group(rank, device, hang_timeout + _GRACE_S, identity(config)) as hosts:
                stop.begun = True
                mesh = build_mesh(plan.degrees, device)
                assert mesh is not None
                limit_waits(hang_timeout + _GRACE_S)
                watchdog = Watchdog(config.folder / "logs", rank, mesh, hang_timeout)
                try:
                    with contextlib.closing(Run(config, plan, rank, mesh, stop, watchdog, hosts)) as run:
                        run.loop()
                except Exception as error:
                    if peer_failure(error):
                        watchdog.lost(error)
                    raise
                finally:
                    watchdog.close()
    except BaseException as error:
        die(error)
