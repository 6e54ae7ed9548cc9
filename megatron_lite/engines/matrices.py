"""Optimizers that need whole matrices (Muon, Adafactor), under engines where no rank holds one.

Each matrix has an owner among all ranks. At every update the owner collects its weights and gradient, runs torch's own
optimizer, and sends the new weights back. Only the owner keeps optimizer state, so state and work are divided over all
ranks under every engine. After Moonlight's distributed Muon (Liu et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from megatron_lite.config import OptimConfig
from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.distributed.shard import Box, Piece, ShardSpec, Tile
from megatron_lite.engines.optim import decays, is_updated_whole


@dataclass
class Matrix:
    """One matrix (or vector): a parameter, or a chunk of a fused parameter. ``start``: its first row in the parameter.

    ``boxes``: the rectangles that each rank holds. ``leaf``: the tensor for the owner's optimizer, empty between
    updates.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    boxes: list[list[Box]]
    owner: int = 0
    leaf: nn.Parameter | None = None
    sources: dict[Box, int] = field(default_factory=dict)

    def settle(self, owner: int) -> None:
        """Choose the owner. It takes each box from itself, or from the nearest following rank that holds it."""
        self.owner = owner
        for step in range(len(self.boxes)):
            rank = (owner + step) % len(self.boxes)
            for box in self.boxes[rank]:
                self.sources.setdefault(box, rank)

    def sent_by(self, rank: int) -> list[Box]:
        """The boxes that the owner takes from ``rank``."""
        return [box for box, source in self.sources.items() if source == rank]

    def view(self, whole: Tensor, box: Box) -> Tensor:
        """A box of the matrix, as a view."""
        (first, *others), shape = box
        offset = (first - self.start, *others)
        return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


class WholeMatrices:
    """Muon (Jordan et al. 2024) or Adafactor (Shazeer and Stern 2018) over parameters that are updated as a whole.

    Communication of a step: an all-to-all of weights and gradients to the owners and an all-to-all of weights back, for
    one matrix of each owner at a time. A rank needs memory for one whole matrix, its gradient, and temporaries.
    """

    def __init__(
        self, config: OptimConfig, specs: Mapping[str, ShardSpec], weights: Mapping[str, Piece], mesh: Mesh
    ) -> None:
        self.world, self.device, self.specs = mesh.world, mesh.device, specs
        world = mesh.world
        held = comm.gather_objects({name: [tile.box for tile in piece.tiles] for name, piece in weights.items()}, world)
        self.matrices = [
            matrix
            for name, spec in specs.items()
            if is_updated_whole(name, spec, config)
            for matrix in _matrices(name, spec, [boxes[name] for boxes in held])
        ]
        self.names = {matrix.name for matrix in self.matrices}
        queues: list[list[Matrix]] = [[] for _ in range(world.size)]
        load = [0] * world.size
        for matrix in sorted(self.matrices, key=lambda m: -math.prod(m.shape)):
            matrix.settle(load.index(min(load)))
            load[matrix.owner] += math.prod(matrix.shape)
            queues[matrix.owner].append(matrix)
        longest = max(map(len, queues))
        self.rounds = [[queue[i] if i < len(queue) else None for queue in queues] for i in range(longest)]
        self.dtypes = {name: piece.dtype for name, piece in weights.items()}
        self.optimizer = self._optimizer(config)

    def _optimizer(self, config: OptimConfig) -> torch.optim.Optimizer:
        groups: list[dict[str, object]] = []
        for decay in (True, False):
            own = [m for m in self._own() if decays(m.name, self.specs[m.name]) == decay]
            for matrix in own:
                empty = torch.empty((0,) * len(matrix.shape), dtype=self.dtypes[matrix.name], device=self.device)
                matrix.leaf = nn.Parameter(empty)
            leaves = [matrix.leaf for matrix in own]
            groups.append({"params": leaves, "weight_decay": config.weight_decay if decay else 0.0})
        optimizer: torch.optim.Optimizer
        if config.name == "muon":
            optimizer = torch.optim.Muon(groups, lr=config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
        else:
            optimizer = torch.optim.Adafactor(groups, lr=config.lr)
        self.kinds = _KINDS[config.name]
        for matrix in self._own():
            assert matrix.leaf is not None
            state = optimizer.state[matrix.leaf]
            if config.name == "adafactor":
                state["step"] = torch.zeros(())
            for kind in self.kinds:
                if (shape := _state_shape(kind, matrix.shape)) is not None:
                    state[kind] = matrix.leaf.new_zeros(shape)
        return optimizer

    def _own(self) -> Iterator[Matrix]:
        return (matrix for matrix in self.matrices if matrix.owner == self.world.rank)

    @torch.no_grad()
    def step(self, weights: Mapping[str, Piece], gradients: Mapping[str, Piece], lr: float) -> None:
        """Update the weights in place. Collective over all ranks."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for matrices in self.rounds:
            own = matrices[self.world.rank]
            whole = self._collect(matrices, weights)
            gradient = self._collect(matrices, gradients)
            if own is not None and own.leaf is not None:
                own.leaf.data, own.leaf.grad = whole, gradient
                self.optimizer.step()
                own.leaf.data, own.leaf.grad = own.leaf.new_empty((0,) * own.leaf.dim()), None
            self._hand_out(matrices, whole, weights)

    def _collect(self, matrices: list[Matrix | None], pieces: Mapping[str, Piece]) -> Tensor:
        """Send all boxes to the owners; returns the whole matrix that this rank owns."""
        rank, own = self.world.rank, matrices[self.world.rank]
        parts = []
        for matrix in matrices:
            tiles = {} if matrix is None else _tiles(pieces[matrix.name])
            parts.append([tiles[box] for box in matrix.sent_by(rank)] if matrix else [])
        into: list[list[Tensor]] = [[] for _ in matrices]
        whole = torch.empty(0, device=self.device)
        if own is not None:
            assert own.leaf is not None
            whole = own.leaf.new_empty(own.shape)
            into = [[own.view(whole, box) for box in own.sent_by(other)] for other in range(self.world.size)]
        comm.all_to_all(parts, into, self.world, self.device)
        return whole

    def _hand_out(self, matrices: list[Matrix | None], whole: Tensor, pieces: Mapping[str, Piece]) -> None:
        """Send the owners' matrices back to all ranks that hold a box of them."""
        rank, own = self.world.rank, matrices[self.world.rank]
        parts: list[list[Tensor]] = [[] for _ in matrices]
        if own is not None:
            parts = [[own.view(whole, box) for box in boxes] for boxes in own.boxes]
        into = []
        for matrix in matrices:
            tiles = {} if matrix is None else _tiles(pieces[matrix.name])
            into.append([tiles[box] for box in matrix.boxes[rank]] if matrix else [])
        comm.all_to_all(parts, into, self.world, self.device)

    def state(self) -> dict[str, Piece]:
        """The optimizer's tensors as ``NAME.KIND``; of a fused parameter, those of its chunks stacked by rows."""
        found: dict[str, Piece] = {}
        for name in sorted(self.names):
            chunks = [matrix for matrix in self.matrices if matrix.name == name]
            for kind in self.kinds:
                shapes = [shape for m in chunks if (shape := _state_shape(kind, m.shape)) is not None]
                if not shapes:
                    continue
                starts = accumulate((shape[0] for shape in shapes), initial=0)
                tiles = [
                    Tile(self.optimizer.state[m.leaf][kind], (start, *(0 for _ in m.shape[1:])))
                    for m, start in zip(chunks, starts, strict=False)
                    if m.leaf is not None
                ]
                rows = sum(shape[0] for shape in shapes)
                found[f"{name}.{kind}"] = Piece((rows, *shapes[0][1:]), self.dtypes[name], tiles)
        return found

    def loaded(self, updates: int) -> None:
        """Called after ``state`` was read from a checkpoint, with the number of updates made."""
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(updates)


_KINDS = {"muon": ("momentum_buffer",), "adafactor": ("row_var", "col_var", "variance")}


def _state_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of one state tensor of a parameter in torch's optimizer, or None if it has no such tensor."""
    match kind:
        case "row_var":
            return (*shape[:-1], 1) if len(shape) > 1 else None
        case "col_var":
            return (*shape[:-2], 1, shape[-1]) if len(shape) > 1 else None
        case "variance":
            return shape if len(shape) == 1 else None
    return shape


def _matrices(name: str, spec: ShardSpec, held: list[list[Box]]) -> Iterator[Matrix]:
    """The chunks of a parameter that is fused along the first dim, each with the boxes of all ranks."""
    chunks = spec.chunks if spec.chunks is not None and spec.dim == 0 else (spec.shape[0],)
    for start, rows in zip(accumulate(chunks, initial=0), chunks, strict=False):
        boxes = [[(o, n) for o, n in boxes if start <= o[0] < start + rows and 0 not in n] for boxes in held]
        yield Matrix(name, start, (rows, *spec.shape[1:]), boxes)


def _tiles(piece: Piece) -> dict[Box, Tensor]:
    return {tile.box: tile.data for tile in piece.tiles}
