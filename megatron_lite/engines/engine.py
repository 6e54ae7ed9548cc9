"""The engine base class. An engine owns gradients and optimizer; each is one file and one line in ``registry.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.config import Config, OptimConfig
from megatron_lite.distributed import shard
from megatron_lite.distributed.mesh import Axis, Mesh
from megatron_lite.distributed.shard import Piece
from megatron_lite.engines.matrices import WholeMatrices
from megatron_lite.engines.optim import build_adamw, gradient_norm, scale_gradients

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(ABC):
    """A model spread over the data-parallel ranks, its gradients and its optimizer.

    The loss passed to ``backward`` is already divided by the global number of target tokens, so gradients are summed
    over micro batches and data-parallel ranks, never averaged. Weights, gradients and optimizer state are float32 (or
    float64) for every compute dtype, and have layout-free names. Frozen parameters (``requires_grad`` is false) are
    divided in the dtype they have, and have no master, gradient or optimizer state.

    The model starts on the meta device; ``spread`` allocates only this rank's part of each parameter, which is
    initialised afterwards.
    """

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.forward: Callable[..., Tensor] = model  # called in training
        self.specs = {name: shard.spec_of(parameter) for name, parameter in model.named_parameters()}
        self.trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        inits = shard.inits_of(model)
        self.spread(config)
        self.parameters = dict(model.named_parameters())
        self.optimizer = self.make_optimizer(config.optim)
        self.matrices: WholeMatrices | None = None  # the optimizer of parameters that it must see whole
        if config.optim.name != "adamw":
            self.matrices = WholeMatrices(config.optim, self.specs, self.weights(), self.mesh)
        shard.initialize(self.weights(), inits, config.run.seed)
        self.publish()

    @abstractmethod
    def spread(self, config: Config) -> None:
        """Divide the model's parameters over data-parallel ranks and allocate them, uninitialised, on the device."""

    def make_optimizer(self, config: OptimConfig) -> torch.optim.Optimizer:
        """AdamW over the parameters from ``spread``, except those that ``matrices`` updates."""
        return build_adamw(self.model, self.specs, config)

    @abstractmethod
    def piece(self, name: str, tensor: Tensor) -> Piece:
        """The part of a global tensor (parameter ``name``, its gradient or a moment) that this rank's memory holds."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate one micro batch's gradients. ``last``: whether it is the last of the step."""

    def finish_gradients(self) -> Tensor:
        """Wait for the reduction over the data axis; returns the norm of the global gradient, equal on every rank."""
        return self.norm()

    def norm(self) -> Tensor:
        """The norm of the global gradient, from all ranks' parts of it. Collective."""
        parts = ((gradient, self.copies(name)) for name, gradient in self.local_gradients().items())
        return gradient_norm(parts, self.mesh.world)

    def copies(self, name: str) -> int:
        """How many ranks hold the same part of a gradient after the reduction."""
        spec, mesh = self.specs[name], self.mesh
        parts = mesh.pp.size * mesh.dp_shard.size * (mesh.axis(spec.axis).size if spec.dim is not None else 1)
        return mesh.world.size // parts

    def axis(self, name: str) -> Axis:
        """The axis over which a parameter is split."""
        return self.mesh.axis(self.specs[name].axis)

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale every gradient by min(1, limit / norm)."""
        scale_gradients(list(self.local_gradients().values()), norm, limit)

    def step(self, lr: float) -> None:
        """Update the weights and free the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.matrices is not None:
            self.matrices.step(self.weights(), self.gradients(), lr)
        self.update()

    def update(self) -> None:
        """One optimizer step; frees the gradients."""
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Discard this step's gradients without an update."""
        self.model.zero_grad(set_to_none=True)

    def local_weights(self) -> dict[str, Tensor]:
        """This rank's part of the master weights."""
        return {name: local(parameter.detach()) for name, parameter in self.parameters.items()}

    def local_moments(self, moment: str) -> dict[str, Tensor]:
        """This rank's part of one of AdamW's moments."""
        names = self.trained - set(self.matrices.names if self.matrices is not None else ())
        return {name: local(self.state(p)[moment]) for name, p in self.parameters.items() if name in names}

    def local_gradients(self) -> dict[str, Tensor]:
        """This rank's part of the reduced gradients; valid between ``finish_gradients`` and ``step``."""
        return {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}

    def state(self, parameter: Tensor) -> dict[str, Any]:
        """The optimizer state of one tensor; created as AdamW would create it in its first step."""
        state: dict[str, Any] = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
        return state

    def gradients(self) -> dict[str, Piece]:
        """The reduced gradients as pieces, by parameter name."""
        return {name: self.piece(name, gradient) for name, gradient in self.local_gradients().items()}

    def weights(self) -> dict[str, Piece]:
        """The masters as pieces, by parameter name, for saving or for writing in place (then call ``publish``)."""
        return {name: self.piece(name, weight) for name, weight in self.local_weights().items()}

    def publish(self) -> None:  # noqa: B027 (most engines compute with the masters)
        """After masters were written in place: update the weights that the model computes with."""

    def optimizer_state(self) -> dict[str, Piece]:
        """The optimizer's tensors as pieces (``NAME.exp_avg`` etc.), for saving or loading in place."""
        moments = {
            f"{name}.{moment}": self.piece(name, held)
            for moment in MOMENTS
            for name, held in self.local_moments(moment).items()
        }
        return moments if self.matrices is None else moments | self.matrices.state()

    def loaded(self, updates: int) -> None:
        """Called after a checkpoint was read into ``pieces``, with the number of updates that the optimizer has
        made."""
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)
        if self.matrices is not None:
            self.matrices.loaded(updates)
        self.publish()

    def pieces(self) -> dict[str, Piece]:
        """The content of a checkpoint: trained weights as ``model.NAME``, optimizer state as
        ``optimizer.NAME.MOMENT``."""
        weights = {f"model.{name}": piece for name, piece in self.weights().items() if name in self.trained}
        return weights | {f"optimizer.{name}": piece for name, piece in self.optimizer_state().items()}

    def frozen(self) -> dict[str, Piece]:
        """Frozen weights as ``model.NAME``; empty unless an adapter is trained."""
        return {f"model.{name}": piece for name, piece in self.weights().items() if name not in self.trained}


def local(tensor: Any) -> Tensor:
    """The local part of a tensor; FSDP2's tensors are DTensors."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # importing DTensor takes half a second
