"""The training step: one batch from the loader through the model to new weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lite import peft
from megatron_lite.config import Config
from megatron_lite.data.batch import Batch
from megatron_lite.data.tokenizer import Tokenizer
from megatron_lite.distributed import comm, random, shard
from megatron_lite.distributed.mesh import Axis, Mesh
from megatron_lite.engines.optim import learning_rate
from megatron_lite.engines.registry import build_engine
from megatron_lite.errors import NonFiniteError
from megatron_lite.layers import matmul
from megatron_lite.layers.context import DTYPES, Context
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.offload import apply_offload
from megatron_lite.models.recompute import apply_recompute
from megatron_lite.planning.plan import Plan
from megatron_lite.tasks import build_task
from megatron_lite.tasks.task import Task
from megatron_lite.training.faults import Faults


@dataclass
class TrainState:
    """Every number that a resumed run continues from, besides weights and optimizer state.

    ``step``: steps done. ``updates``: those that changed the weights. ``samples``: samples consumed, which determines
    the loader's position. ``skipped``: steps skipped because loss or gradient norm was not finite.
    """

    step: int = 0
    updates: int = 0
    samples: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one step reports: mean loss per target token, global gradient norm before clipping, learning rate, number of
    target tokens; ``stop``: whether any rank was asked to stop; ``skipped``: whether the weights are unchanged."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    stop: bool
    skipped: bool = False
    busy: tuple[float, ...] = ()  # the ``busy`` that each rank gave to ``train_step``


class Trainer:
    """Model, engine and state of one run on this rank; ``train_step`` is the whole of training."""

    def __init__(self, config: Config, mesh: Mesh, plan: Plan, faults: Faults, task: Task | None = None) -> None:
        self.task = task or build_task(config)
        self.config, self.mesh, self.plan, self.faults = config, mesh, plan, faults
        self.compute_dtype = DTYPES[config.train.precision]
        matmul.measure(self.compute_dtype, mesh.device)
        with torch.device("meta"):
            self.model = Decoder(config.model, mesh.tp, sp=plan.sp)
        peft.apply(self.model, config.peft, self.compute_dtype)
        shard.check_model(self.model, mesh)
        _name_axes(self.model)
        apply_recompute(self.model.blocks, config.parallel.recompute)
        if config.parallel.offload_activations:
            apply_offload(self.model.blocks)
        if config.train.compile:
            for block in self.model.blocks:
                block.compile()
        self.engine = build_engine(self.model, config, mesh)
        self.state = TrainState()
        self.before_update: Callable[[], None] = lambda: None  # called before weights and optimizer state change

    def loss(self, batch: Batch, *, training: bool) -> Tensor:
        """Sum of the losses of one micro batch's targets."""
        context = Context(
            dtype=self.compute_dtype,
            seed=random.mix(self.config.run.seed, batch.index) if training else None,
            positions=batch.positions,
            document_ids=batch.document_ids,
        )
        return self.task.loss(self.engine.forward if training else self.model, batch, context)

    def train_step(self, micro_batches: list[Batch], *, stop: bool = False, busy: float | None = None) -> StepResult:
        """One step over this rank's micro batches: forward, backward, reduce, clip, update.

        ``stop``: this rank was asked to stop; the result says whether any rank was. ``busy``: a number to share
        with all ranks, given by all of them or none. If the global loss or gradient norm is not finite, every rank
        skips the update or, after ``train.skip_bad_batches`` skipped steps, raises NonFiniteError.
        """
        state, mesh, step = self.state, self.mesh, self.state.step + 1
        counts = torch.stack([self.task.count(batch) for batch in micro_batches]).sum()
        tokens = comm.all_reduce(counts, mesh.data).clamp(min=1)  # without any target, the loss and gradients are 0

        total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        for i, batch in enumerate(micro_batches):
            self.faults.at("fwd", step)
            loss = self.faults.poison(self.loss(batch, training=True) / tokens, step)
            self.faults.at("bwd", step)
            self.engine.backward(loss, last=i == len(micro_batches) - 1)
            total += loss.detach()

        norm = self.engine.finish_gradients()
        # One all-reduce over the world for all numbers; the loss is divided by its copies: a sum over the data axis.
        said = total.new_zeros(2 + (mesh.world.size if busy is not None else 0))
        said[0], said[1] = total / mesh.copies, float(stop)
        if busy is not None:
            said[2 + mesh.world.rank] = busy
        loss_value, stops, *everyone = comm.read(comm.all_reduce(said, mesh.world))
        norm_value = norm.item()

        lr = learning_rate(self.config.optim, state.step, self.config.train.steps)
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            self.faults.at("optim", step)
            self.before_update()
            if self.config.optim.clip > 0:
                self.engine.clip(norm, self.config.optim.clip)
            self.engine.step(lr)
            state.updates += 1
        else:
            self._refuse(step, loss_value, norm_value)
        state.step = step
        state.samples += self.config.train.global_batch_size
        return StepResult(loss_value, norm_value, lr, int(tokens), stops > 0, not finite, tuple(everyone))

    def _refuse(self, step: int, loss: float, norm: float) -> None:
        """Drop the gradients of a step that is not finite; count it as skipped or, at the limit, raise the error."""
        state, size = self.state, self.config.train.global_batch_size
        self.engine.drop_gradients()
        if state.skipped >= self.config.train.skip_bad_batches:
            raise NonFiniteError(
                f"step {step}: loss {loss:g}, gradient norm {norm:g} on samples {state.samples} to "
                f"{state.samples + size - 1}; the weights of step {step - 1} are untouched "
                f"(train.skip_bad_batches={self.config.train.skip_bad_batches})"
            )
        state.skipped += 1

    @torch.no_grad()
    def evaluate(self, steps: Iterable[list[Batch]]) -> float:
        """Mean loss per target token over validation batches, equally many on every rank; one all-reduce over the data
        axis, so the result is the same on every rank."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for micro_batches in steps:
            for batch in micro_batches:
                sums[0] += self.loss(batch, training=False)
                sums[1] += self.task.count(batch)
        total, count = comm.all_reduce(sums, self.mesh.data).tolist()
        return total / max(count, 1)

    def sample(self, tokenizer: Tokenizer, files: Mapping[str, bytes]) -> str | None:
        """A text that shows what the model has learnt, if the task has one to show."""
        return self.task.sample(self.model, tokenizer, files, Context(dtype=self.compute_dtype))


def _name_axes(model: nn.Module) -> None:
    """Give each module a copy of its axes with its own name, so that a hanging collective can be attributed to it."""
    for name, module in model.named_modules():
        for attribute, axis in list(vars(module).items()):
            if isinstance(axis, Axis):
                setattr(module, attribute, axis.of(name))
