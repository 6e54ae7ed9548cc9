"""Engines: who owns gradients and the optimizer. One implementation a file, one line in ``build_engine``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_lite.config import Config
from megatron_lite.dist import shard
from megatron_lite.dist.mesh import Mesh
from megatron_lite.dist.shard import Piece
from megatron_lite.optim import build_optimizer, gradient_norm, scale_gradients


class Engine(ABC):
    """A model spread over the data-parallel ranks, its gradients and its optimizer.

    The loss handed to ``backward`` is already divided by the global count of target tokens, so gradients are summed
    over micro batches and data-parallel ranks, never averaged. Weights, gradients and optimizer state are float32 (or
    float64) whatever is computed in, and known by layout-free names.

    The model comes on the meta device; ``spread`` gives each parameter the memory of this rank's part alone, and only
    then it gets its first values.
    """

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.specs = {name: shard.spec_of(parameter) for name, parameter in model.named_parameters()}
        inits = shard.inits_of(model)
        self.spread(config)
        self.parameters = dict(model.named_parameters())
        shard.initialize(
            {name: self.piece(name, local(p.detach())) for name, p in self.parameters.items()}, inits, config.run.seed
        )
        self.optimizer = build_optimizer(model, config.optim)

    @abstractmethod
    def spread(self, config: Config) -> None:
        """Divide the model's parameters over data-parallel ranks and allocate them, uninitialised, on the device."""

    @abstractmethod
    def piece(self, name: str, tensor: Tensor) -> Piece:
        """What this rank's memory of the parameter ``name``, of its gradient or a moment is of the global tensor."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate one micro batch's gradients; ``last``: no other follows in this step."""

    @abstractmethod
    def finish_gradients(self) -> Tensor:
        """Wait for the reduction over dp; the norm of the global gradient, the same on every rank."""

    def norm(self) -> Tensor:
        """The norm of the global gradient from everybody's part of it."""
        parts = ((gradient, self.specs[name]) for name, gradient in self.local_gradients().items())
        return gradient_norm(parts, self.mesh.tp, self.mesh.dp_shard)

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale every gradient by min(1, limit / norm)."""
        scale_gradients(list(self.local_gradients().values()), norm, limit)

    def step(self, lr: float) -> None:
        """Update the weights and drop the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget this step's gradients without an update."""
        self.optimizer.zero_grad(set_to_none=True)

    def local_gradients(self) -> dict[str, Tensor]:
        """This rank's memory of the reduced gradients; between ``finish_gradients`` and ``step``."""
        return {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}

    def gradients(self) -> dict[str, Piece]:
        """The same under their parameters' names, each in its place."""
        return {name: self.piece(name, gradient) for name, gradient in self.local_gradients().items()}

    def weights(self) -> dict[str, Piece]:
        """The weights under their names, to be saved from or loaded into in place."""
        return {name: self.piece(name, local(parameter.detach())) for name, parameter in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Piece]:
        """The optimizer's tensors as ``NAME.exp_avg`` and ``NAME.exp_avg_sq``, to be saved or loaded in place."""
        found = {}
        for name, parameter in self.parameters.items():
            state: dict[str, Any] = self.optimizer.state[parameter]
            if not state:  # what AdamW itself would make in its first step
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            found.update(
                {f"{name}.{moment}": self.piece(name, local(state[moment])) for moment in ("exp_avg", "exp_avg_sq")}
            )
        return found

    def restore_updates(self, updates: int) -> None:
        """After a load: how many updates the optimizer has made."""
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)

    def pieces(self) -> dict[str, Piece]:
        """What a checkpoint holds: weights as ``model.NAME``, optimizer state as ``optimizer.NAME.MOMENT``."""
        weights = {f"model.{name}": piece for name, piece in self.weights().items()}
        return weights | {f"optimizer.{name}": piece for name, piece in self.optimizer_state().items()}


def local(tensor: Any) -> Tensor:
    """This rank's memory of a tensor, which FSDP2 hands out as a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build_engine(model: nn.Module, config: Config, mesh: Mesh) -> Engine:
    """The engine that the config asks for; a single data-parallel rank has nothing to divide."""
    from megatron_lite.parallel.ddp import DataParallel
    from megatron_lite.parallel.fsdp import FullyShardedDataParallel

    return (FullyShardedDataParallel if mesh.dp_shard.size > 1 else DataParallel)(model, config, mesh)
