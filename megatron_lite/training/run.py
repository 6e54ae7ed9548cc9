"""``python -m megatron_lite train``: one rank of a run, from the config to its exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_lite import __version__, checkpoint
from megatron_lite.cli import several
from megatron_lite.config import CHANGEABLE, Config, to_yaml
from megatron_lite.data.ends import ends, with_ends
from megatron_lite.data.loader import Dataset, Loader, build_dataset, once
from megatron_lite.data.tokenizer import GENERATION, TEMPLATE, load_tokenizer, tokenizer_files
from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.mesh import Mesh, build_mesh, limit_waits, peer_failure, pick_device, process_group
from megatron_lite.distributed.shard import Piece
from megatron_lite.errors import CheckpointError, Preempted, StorageError
from megatron_lite.families.targets import summary
from megatron_lite.inference.generate import Sampling, generate
from megatron_lite.planning.plan import Plan, bytes_per_frozen_parameter, bytes_per_parameter, picture
from megatron_lite.training import allocator, resume
from megatron_lite.training.faults import Faults
from megatron_lite.training.lifetime import StopRequest, die, identity, locked
from megatron_lite.training.report import Reporter, flops_per_token, memory_bytes, peak_flops
from megatron_lite.training.step import StepResult, Trainer, TrainState
from megatron_lite.training.watchdog import Stragglers, Watchdog

logger = logging.getLogger("megatron_lite")
_COLLECT_EVERY = 50  # steps
_GRACE_S = 0.5  # how much longer than hang_timeout a collective waits: for the watchdog to leave its record first


class Run:
    """One rank of a run: the trainer, its data and its checkpoints, and the loop around ``train_step``."""

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
        self.config, self.plan, self.mesh, self.stop = config, plan, mesh, stop
        self.folder, self.lead, self.watchdog = config.folder, rank.rank == 0, watchdog
        self.stragglers = Stragglers(hosts) if self.lead else None
        self.checkpoints = self.folder / "checkpoints"
        self.faults = Faults.parse(rank.faults, rank.rank, rank.attempt)
        self.tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        self.tokenizer_digest = self.tokenizer.sha256 if self.tokenizer else None
        data, seed, vocab = config.data, config.run.seed, config.model.vocab_size
        self.train_data = build_dataset(data, seed, "train", vocab)
        self.validation_data = build_dataset(data, seed, "validation", vocab) if self._evaluates else None
        self.validation_fingerprint = self.validation_data.fingerprint if self.validation_data is not None else None
        checkpoint.prepare(self.checkpoints, mesh.world)
        self.found, self.source = self._find(lazy=True), None
        self.base_fingerprint: str | None = None
        if config.init.source is not None and (self.found is None or config.peft is not None):
            self.source = checkpoint.open_source(Path(config.init.source), mesh.world, trust=config.checkpoint.trust)
            # What the config says otherwise than its source is meant to be so: it is noted, no more.
            _note(resume.check_model(config.model, self.source.model, self.source.path, CHANGEABLE))
        self.adapter = self._open_adapter() if self.found is None else None
        self.extras = self._extras()
        self._check_tokenizers()
        self.trainer = Trainer(config, mesh, plan, self.faults)
        limit_waits(config.train.hang_timeout + _GRACE_S)
        self.saver: checkpoint.BackgroundSaver | None = None
        if config.checkpoint.background:
            self.saver = checkpoint.BackgroundSaver(mesh.world, mesh.device)
            self.trainer.before_update = self.saver.wait_for_copy
        self.reporter: Reporter | None = None

    @property
    def _evaluates(self) -> bool:
        return self.config.train.eval_every > 0

    @property
    def _validation_limit(self) -> int:
        return self.config.train.eval_steps * self.config.train.global_batch_size

    # Checkpoints

    def save(self) -> None:
        """Commit a checkpoint of the current step, then prune older ones."""
        config, state = self.config, self.trainer.state
        content = {
            "train": dict(vars(state)),
            "seed": config.run.seed,
            "dataset": self.train_data.fingerprint,
            "validation": self.validation_fingerprint,
            "vocab_size": config.model.vocab_size,
            "padded_vocab_size": config.model.padded_vocab_size,
            "tokenizer_sha256": self.tokenizer_digest,
            "layout": f"{config.parallel.engine} {self.plan.describe(config).partition(';')[0]}",
            "versions": {"megatron_lite": __version__, "torch": torch.__version__},
        }
        if config.peft is not None:
            content["base"] = self.base_fingerprint
        extras = {**self.extras, "config.yaml": to_yaml(config).encode()}
        pieces, world = self.trainer.engine.pieces(), self.mesh.world
        if self.saver is not None:
            self.saver.save(self.checkpoints, state.step, pieces, content, extras, self.faults, self._saved)
        else:
            self._saved(checkpoint.save(self.checkpoints, state.step, pieces, content, extras, world, self.faults))

    def _extras(self) -> dict[str, bytes]:
        """The tokenizer, and what came with it in the checkpoint or folder that this run goes on from, such as a chat
        template; that of another tokenizer stays behind. What the data ends answers with ends a text from now on."""
        name = self.config.data.tokenizer
        own = tokenizer_files(name) if name else {}
        source = checkpoint.CheckpointSource(self.found) if self.found is not None else self.source
        found = source.extras() if source is not None else {}
        found |= self.adapter.extras() if self.adapter is not None else {}
        template = self.train_data.chat_template
        written = {} if template is None else {TEMPLATE: template.encode()}
        same = all(found.get(name) == content for name, content in own.items() if name != GENERATION)
        extras = with_ends((own | found if same else own) | written, self.train_data.ends)
        if self.found is not None:
            _note(resume.check_template(found, extras, self.found.path, self.config.checkpoint.allow_change))
        return extras

    def _check_tokenizers(self) -> None:
        """Refuse data and a tokenizer that do not fit each other or the model."""
        datasets = [data for data in (self.train_data, self.validation_data) if data is not None]
        source = self.source or (checkpoint.CheckpointSource(self.found) if self.found is not None else None)
        resume.check_tokenizers(self.config, datasets, self.tokenizer, source)

    def _open_adapter(self) -> checkpoint.Source | None:
        """What ``peft`` adds is to start as, checked against this config."""
        config = self.config
        if config.init.adapter is None or config.peft is None:
            return None
        assert self.source is not None
        path, trust = Path(config.init.adapter), config.checkpoint.trust
        adapter = checkpoint.open_adapter(path, self.source, self.mesh.world, trust=trust)
        assert adapter.peft is not None
        allowed = [*config.checkpoint.allow_change, "model.dropout", "model.attention_dropout"]  # which are training's
        _note(resume.check_model(config.model, adapter.model, adapter.path, allowed))
        if told := config.peft.differences(adapter.peft, config.model):
            raise CheckpointError(f"{adapter.path}: {'; '.join(told)}")
        return adapter

    def _saved(self, path: Path) -> None:
        """A checkpoint is committed; with ``checkpoint.async`` this runs beside training."""
        if self.lead:
            logger.info("saved %s", path)
            try:
                checkpoint.prune(self.checkpoints, self.config.checkpoint.keep, self.config.checkpoint.keep_every)
            except StorageError as error:
                logger.warning("warning: an older checkpoint could not be removed: %s", error)

    def _find(self, *, lazy: bool) -> checkpoint.Checkpoint | None:
        """The checkpoint to go on from, checked against this config before a model is made. ``lazy``: its tensors are
        verified when they are loaded."""
        wanted, world, trust = self.config.checkpoint.resume, self.mesh.world, self.config.checkpoint.trust
        found = None
        if wanted == "auto":
            found = checkpoint.newest(self.checkpoints, world, trust=trust, lazy=lazy)
        elif wanted != "none":
            found = checkpoint.open_checkpoint(checkpoint.find(Path(wanted)), world, trust=trust, lazy=lazy)
        if found is not None:
            self.changes = resume.check_run(
                self.config,
                found,
                self.train_data.fingerprint,
                self.tokenizer_digest,
                self.validation_fingerprint,
            )
        return found

    def start(self) -> None:
        """Continue from the checkpoint that was found, or give a new run the weights of ``init.from``, of which each
        rank reads its own parts, in whatever form they are. An adapter has the latter for its base in both cases."""
        world, engine = self.mesh.world, self.trainer.engine
        if self.config.peft is not None:
            self._load_base(engine.frozen())
        if self.found is not None:
            self._load_found()
            self.trainer.state = self._found_state()
            engine.loaded(self.trainer.state.updates)
            if self.lead:
                logger.info("resumed %s: step %d", self.found.path, self.trainer.state.step)
            _note(self.changes)
        elif self.source is not None and self.config.peft is None:
            with contextlib.closing(self.source) as source:
                optimizer = self.config.init.optimizer
                wanted = {n: p for n, p in engine.pieces().items() if optimizer or n.startswith("model.")}

                def load() -> None:
                    if optimizer:
                        resume.check_optimizer(source, wanted, self.config.optim.name)
                    source.load(wanted)

                checkpoint.agree(world, load, source.path)
            self.trainer.state.updates = source.num_updates if optimizer else 0
            engine.loaded(self.trainer.state.updates)
            if self.lead:
                logger.info("%s", "\n".join([f"started from the weights of {source.path}", *source.notes]))

    def _found_state(self) -> TrainState:
        """Where the run that was found has come to."""
        assert self.found is not None
        tree = self.found.state().get("train")
        known = [field.name for field in dataclasses.fields(TrainState)]
        if not isinstance(tree, dict) or any(type(tree.get(name)) is not int or tree[name] < 0 for name in known):
            raise CheckpointError(
                f"{self.found.path}/state.json: train: expected {', '.join(known)}, found {tree!a:.200}"
            )
        return TrainState(**{name: tree[name] for name in known})

    def _load_found(self) -> None:
        """Load the checkpoint that was found; where that is damaged, tell of it and load the last sound one instead."""
        assert self.found is not None
        pieces, world = self.trainer.engine.pieces(), self.mesh.world
        self.found.check(pieces, world)
        try:
            self.found.load(pieces, world)
        except CheckpointError:
            self.found = self._find(lazy=False)
            assert self.found is not None
            self.found.load(pieces, world)
            self.extras = self._extras()

    def _load_base(self, frozen: dict[str, Piece]) -> None:
        """Read what an adapter is trained on, and refuse another than it was trained on so far."""
        assert self.source is not None
        path, world = self.source.path, self.mesh.world
        with contextlib.closing(self.source) as source:
            self.base_fingerprint = checkpoint.load_base(source, frozen, world)
            if self.adapter is not None:
                self._load_adapter(self.adapter, path)
        if self.found is not None:
            checkpoint.check_base(self.found, self.base_fingerprint, path)
        self.trainer.engine.loaded(0)
        if self.lead:
            logger.info("%s", "\n".join([f"adapting {path} ({self.base_fingerprint[:12]})", *self.source.notes]))

    def _load_adapter(self, adapter: checkpoint.Source, base: Path) -> None:
        """Start as an adapter that there is, and refuse it where it is another base's."""
        assert self.base_fingerprint is not None
        if isinstance(adapter, checkpoint.CheckpointSource):
            checkpoint.check_base(adapter.checkpoint, self.base_fingerprint, base)
        wanted = {name: piece for name, piece in self.trainer.engine.pieces().items() if name.startswith("model.")}

        def load() -> None:
            adapter.load(wanted)
            if any(not tile.data.isfinite().all() for piece in wanted.values() for tile in piece.tiles):
                raise CheckpointError(f"{adapter.path} holds numbers that are not finite")

        with contextlib.closing(adapter):
            checkpoint.agree(self.mesh.world, load, adapter.path)
        if self.lead:
            logger.info("started from the adapter in %s", adapter.path)

    # Reporting

    def _open_reporter(self) -> None:
        state, device = self.trainer.state, self.mesh.device
        self.flops = flops_per_token(self.config.model, self.config.data.seq_len, frozen=self.config.peft is not None)
        # Measured on every rank at once, as the ranks will compute.
        self.peak, source = peak_flops(device, self.trainer.compute_dtype)
        if self.config.train.peak_tflops:
            self.peak, source = self.config.train.peak_tflops * 1e12, "train.peak_tflops"
        if not self.lead:
            return
        logger.info("%s", self.plan.describe(self.config))
        _note(self.train_data.notes)
        if self.validation_data is not None:
            there = sum(source.num_samples for source in self.validation_data.sources)
            some = f"the first {self._validation_limit:,} of" if there > self._validation_limit else "all"
            logger.info("validation: %s %s, each once", some, several(there, "window"))
        engine = self.trainer.engine
        parameters = sum(math.prod(spec.shape) for spec in engine.specs.values())
        if self.plan.tp * self.plan.dp > 1:
            logger.info("%s", picture(self.plan))
        sizes = {name: math.prod(spec.local_shape(self.plan.tp)) for name, spec in engine.specs.items()}
        held = sum(sizes[name] for name in engine.trained)
        costs = bytes_per_parameter(self.config, self.plan)
        parts = {name: held * size / 2**20 for name, size in costs.items()}
        if self.config.peft is not None:
            frozen = {name: size for name, size in sizes.items() if name not in engine.trained}
            each = {n: bytes_per_frozen_parameter(self.config, self.plan, engine.specs[n].packing) for n in frozen}
            parts = {"frozen": sum(size * each[name] for name, size in frozen.items()) / 2**20, **parts}
            trained = sum(math.prod(engine.specs[name].shape) for name in engine.trained)
            logger.info(
                "%s on %s", self.config.peft.method, ", ".join(summary(self.config.peft.matched(self.config.model)))
            )
            logger.info(
                "trained: %s of %s parameters (%.3g %%), which saves %s MiB a rank of training all",
                f"{trained:,}",
                f"{parameters:,}",
                100 * trained / parameters,
                f"{sum(frozen.values()) * sum(costs.values()) / 2**20 - parts['frozen']:,.1f}",
            )
        logger.info(
            "memory a rank, MiB: %s = %s, and activations",
            " + ".join(f"{name} {size:,.1f}" for name, size in parts.items()),
            f"{sum(parts.values()):,.1f}",
        )
        logger.info("%s parameters; peak %.3g FLOP/s a rank (%s)", f"{parameters:,}", self.peak, source)
        self.reporter = Reporter(self.folder, self.config.train.steps, state.step)

    def report(self, result: StepResult, seconds: float) -> None:
        """The numbers of one step, on rank 0."""
        if self.reporter is None:
            return
        # All that is computed on: of conversations, targets are the lesser part.
        positions = self.config.train.global_batch_size * self.config.data.seq_len
        step, rate = self.trainer.state.step, positions / seconds
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
        summary = (
            f"loss {result.loss:.4f}  norm {result.grad_norm:.3f}  lr {result.lr:.2e}  {rate:,.0f} tok/s  mfu {mfu:.1%}"
        )
        if result.skipped:
            summary += "  SKIPPED: not finite, weights unchanged"
        due = result.skipped or step % self.config.train.log_every == 0 or step == self.config.train.steps
        self.reporter.advance(step, summary, log=due)

    def evaluate(self) -> None:
        """Validation loss and perplexity over the same windows every time, each of which counts once."""
        assert self.validation_data is not None
        loss = self.trainer.evaluate(
            once(
                self.validation_data,
                self._validation_limit,
                micro_batch_size=self.config.train.micro_batch_size,
                dp_rank=self.mesh.dp.rank,
                dp_size=self.mesh.dp.size,
                device=self.mesh.device,
            )
        )
        if self.reporter is not None:
            values = {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
            self.reporter.scalars(self.trainer.state.step, values)
            logger.info("validation loss %.4f  perplexity %.2f", *values.values())

    def sample(self) -> None:
        """Continue ``train.sample_prompt`` greedily and show the text."""
        if self.tokenizer is None:
            return
        prompt = self.tokenizer.encode_prompt(self.config.train.sample_prompt)
        if any(not 0 <= token < (self.config.model.vocab_size or 0) for token in prompt):
            logger.warning("no sample: train.sample_prompt has tokens that the model does not")
            return
        sampling, stop = Sampling(max_new_tokens=64), ends(self.tokenizer, self.extras)
        tokens = generate(self.trainer.model, prompt, sampling, stop, self.trainer.compute_dtype)
        if self.reporter is not None:
            text = self.tokenizer.decode([*prompt, *tokens])
            self.reporter.text(self.trainer.state.step, "sample", text)

    # The loop

    def _loader(self, dataset: Dataset, samples: int) -> Loader:
        batch = self.config.train.micro_batch_size
        return Loader(
            dataset,
            micro_batch_size=batch,
            num_micro_batches=self.plan.accumulation,
            dp_rank=self.mesh.dp.rank,
            dp_size=self.mesh.dp.size,
            consumed_samples=samples,
            prefetch=self.config.data.prefetch,
            device=self.mesh.device,
        )

    def loop(self) -> None:
        """Train to the last step, pausing every so often to evaluate, to sample and to save."""
        train, trainer = self.config.train, self.trainer
        self.start()
        self._open_reporter()
        saved = trainer.state.step
        if self.lead:
            # Here, since a start that was refused is not to be mistaken for the run.
            (self.folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
            if saved >= train.steps:
                logger.info("nothing to train: it is at step %d of train.steps=%d", saved, train.steps)
        profiler = self._profiler()
        gc.freeze()
        gc.disable()  # all ranks collect at the same steps: each at a time of its own would keep the others waiting
        with contextlib.closing(self._loader(self.train_data, trainer.state.samples)) as loader:
            while trainer.state.step < train.steps:
                step = trainer.state.step + 1
                self.watchdog.watch(step)
                began = time.perf_counter()
                failed = self.saver is not None and self.saver.failed
                busy = self.watchdog.take_busy() if step % train.log_every == 0 else None
                result = trainer.train_step(next(loader), stop=self.stop.asked or failed, busy=busy)
                self.watchdog.pause()
                self.report(result, time.perf_counter() - began)
                self._warn_of_stragglers(result.busy)
                if profiler is not None:
                    profiler.step()
                if step % _COLLECT_EVERY == 0:
                    gc.collect()
                if self._evaluates and (step % train.eval_every == 0 or step == train.steps):
                    self.evaluate()
                if train.sample_every and step % train.sample_every == 0:
                    self.sample()
                every = self.config.checkpoint.every
                if result.stop or step == train.steps or (every and step % every == 0):
                    self.watchdog.watch(step)
                    self.watchdog.pause()
                    self.save()
                    saved = step
                if result.stop and step < train.steps:
                    if self.saver is not None:
                        self.saver.wait()
                    anew = "" if self.config.checkpoint.resume == "auto" else ", with checkpoint.resume=auto,"
                    raise Preempted(f"stopped at step {step} on request, saved; run again{anew} to continue")
        if saved < trainer.state.step:
            self.save()
        if self.saver is not None:
            self.saver.wait()

    def _warn_of_stragglers(self, busy: Sequence[float]) -> None:
        if self.stragglers is not None and len(busy) > 1 and (warning := self.stragglers.add(busy, time.monotonic())):
            logger.warning("warning: step %d: %s", self.trainer.state.step, warning)

    def _profiler(self) -> torch.profiler.profile | None:
        """A torch profiler over the chosen steps of rank 0; its trace goes to the run folder."""
        wanted = self.config.train.profile
        if wanted is None or not self.lead:
            return None
        schedule = torch.profiler.schedule(wait=max(0, wanted.start - 2), warmup=1, active=wanted.steps, repeat=1)
        trace = str(self.folder / "trace.json")
        profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(trace))
        profiler.start()
        return profiler


def _note(lines: Sequence[str]) -> None:
    """Say what a user should know; the log is that of rank 0."""
    for line in lines:
        logger.info("%s", line)


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
                    run = Run(config, plan, rank, mesh, stop, watchdog, hosts)
                    try:
                        run.loop()
                    finally:
                        if run.reporter is not None:
                            run.reporter.close()
                except Exception as error:
                    if peer_failure(error):
                        watchdog.lost(error)
                    raise
                finally:
                    watchdog.close()
    except BaseException as error:
        die(error)
