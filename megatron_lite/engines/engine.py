"""What an engine is: it owns gradients and the optimizer. One implementation a file, one line in ``registry.py``."""

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

    The loss handed to ``backward`` is already divided by the global count of target tokens, so gradients are summed
    over micro batches and data-parallel ranks, never averaged. Weights, gradients and optimizer state are float32 (or
    float64) whatever is computed in, and known by layout-free names. What is frozen (``requires_grad`` is false) is
    spread in the form it comes in, and has neither master, gradient nor state.

    The model comes on the meta device; ``spread`` gives each parameter the memory of this rank's part alone, and only
    then it gets its first values.
    """

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.forward: Callable[..., Tensor] = model  # what training calls
        self.specs = {name: shard.spec_of(parameter) for name, parameter in model.named_parameters()}
        self.trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        inits = shard.inits_of(model)
        self.spread(config)
        self.parameters = dict(model.named_parameters())
        self.optimizer = self.make_optimizer(config.optim)
        self.matrices: WholeMatrices | None = None  # what the optimizer has to see whole
        if config.optim.name != "adamw":
            self.matrices = WholeMatrices(config.optim, self.specs, self.weights(), self.mesh)
        shard.initialize(self.weights(), inits, config.run.seed)
        self.publish()

    @abstractmethod
    def spread(self, config: Config) -> None:
        """Divide the model's parameters over data-parallel ranks and allocate them, uninitialised, on the device."""

    def make_optimizer(self, config: OptimConfig) -> torch.optim.Optimizer:
        """AdamW over what ``spread`` made, without what ``matrices`` updates."""
        return build_adamw(self.model, self.specs, config)

    @abstractmethod
    def piece(self, name: str, tensor: Tensor) -> Piece:
        """What this rank's memory of the parameter ``name``, of its gradient or a moment is of the global tensor."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate one micro batch's gradients; ``last``: no other follows in this step."""

    def finish_gradients(self) -> Tensor:
        """Wait for the reduction over the data axis; the norm of the global gradient, the same on every rank."""
        return self.norm()

    def norm(self) -> Tensor:
        """The norm of the global gradient from everybody's part of it."""
        parts = ((gradient, self.copies(name)) for name, gradient in self.local_gradients().items())
        return gradient_norm(parts, self.mesh.world)

    def copies(self, name: str) -> int:
        """How many ranks hold the same part of a gradient, once it is reduced."""
        spec, mesh = self.specs[name], self.mesh
        parts = mesh.pp.size * mesh.dp_shard.size * (mesh.axis(spec.axis).size if spec.dim is not None else 1)
        return mesh.world.size // parts

    def axis(self, name: str) -> Axis:
        """The axis that a parameter is split over."""
        return self.mesh.axis(self.specs[name].axis)

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale every gradient by min(1, limit / norm)."""
        scale_gradients(list(self.local_gradients().values()), norm, limit)

    def step(self, lr: float) -> None:
        """Update the weights and drop the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.matrices is not None:
            self.matrices.step(self.weights(), self.gradients(), lr)
        self.update()

    def update(self) -> None:
        """One step of the optimizer; the gradients are gone after it."""
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget this step's gradients without an update."""
        self.model.zero_grad(set_to_none=True)

    def local_weights(self) -> dict[str, Tensor]:
        """This rank's memory of the masters."""
        return {name: local(parameter.detach()) for name, parameter in self.parameters.items()}

    def local_moments(self, moment: str) -> dict[str, Tensor]:
        """This rank's memory of one of AdamW's moments."""
        names = self.trained - set(self.matrices.names if self.matrices is not None else ())
        return {name: local(self.state(p)[moment]) for name, p in self.parameters.items() if name in names}

    def local_gradients(self) -> dict[str, Tensor]:
        """This rank's memory of the reduced gradients; between ``finish_gradients`` and ``step``."""
        return {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}

    def state(self, parameter: Tensor) -> dict[str, Any]:
        """The optimizer's state of one of the tensors it updates: what AdamW itself would make in its first step."""
        state: dict[str, Any] = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
        return state

    def gradients(self) -> dict[str, Piece]:
        """The reduced gradients under their parameters' names, each in its place."""
        return {name: self.piece(name, gradient) for name, gradient in self.local_gradients().items()}

    def weights(self) -> dict[str, Piece]:
        """The masters under their parameters' names, to be saved from or written in place; then ``publish``."""
        return {name: self.piece(name, weight) for name, weight in self.local_weights().items()}

    def publish(self) -> None:  # noqa: B027 (most engines compute with the masters)
        """After the masters were written in place: bring up to date what the model computes with."""

    def optimizer_state(self) -> dict[str, Piece]:
        """The optimizer's tensors as ``NAME.exp_avg`` and the like, to be saved or loaded in place."""
        moments = {
            f"{name}.{moment}": self.piece(name, held)
            for moment in MOMENTS
            for name, held in self.local_moments(moment).items()
        }
        return moments if self.matrices is None else moments | self.matrices.state()

    def loaded(self, updates: int) -> None:
        """After a checkpoint was read into ``pieces``: how many updates the optimizer has made."""
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)
        if self.matrices is not None:
            self.matrices.loaded(updates)
        self.publish()

    def pieces(self) -> dict[str, Piece]:
        """What a checkpoint holds: trained weights as ``model.NAME``, optimizer state as ``optimizer.NAME.MOMENT``."""
        weights = {f"model.{name}": piece for name, piece in self.weights().items() if name in self.trained}
        return weights | {f"optimizer.{name}": piece for name, piece in self.optimizer_state().items()}

    def frozen(self) -> dict[str, Piece]:
        """The weights that stay as they are, as ``model.NAME``: none, unless an adapter is trained."""
        return {f"model.{name}": piece for name, piece in self.weights().items() if name not in self.trained}


def local(tensor: Any) -> Tensor:
    """This rank's memory of a tensor, which FSDP2 hands out as a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # asked without the import, of half a second
