"""Records what a layout computes, as whole tensors in the order of computation: the squared norm of every block's
output, the loss, every gradient before and after clipping, every weight after the update. Compares two records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megatron_lite.config import Config
from megatron_lite.data.loader import Loader
from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Axis, Mesh
from megatron_lite.distributed.shard import Piece
from megatron_lite.engines.engine import Engine
from megatron_lite.planning.plan import make_plan
from megatron_lite.training.faults import Faults
from megatron_lite.training.step import Trainer

TOLERANCES = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 1e-1}
# The smallest scale by which a tensor's differences are judged, relative to the largest element of its kind. A
# tolerance times this scale is a few rounding errors of that element, which remain where sums cancel.
FLOORS = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 1e-1}
KINDS = ("block outputs", "loss", "gradients", "clipped gradients", "weights")

_SECOND = {"exp_avg_sq", "row_var", "col_var", "variance"}  # AdamW's and Adafactor's second moments

Record = dict[str, Tensor]  # "kind/name" → whole tensor, in the order of computation


@dataclass(frozen=True)
class Row:
    """The largest relative difference among the tensors of one kind in one step, and the first beyond tolerance."""

    step: int
    kind: str
    difference: float
    tensor: str
    first_beyond: tuple[str, float] | None


class _RecordingEngine:
    """Wraps an engine and records gradients and weights during the trainer's calls.

    The optimizer's moments start as if earlier gradients had been as large as those of the first step. From zeros,
    Adam's first update is the gradient's sign, and Muon's has the same length in every direction: rounding errors of a
    vanishing gradient would become as large an update as any other gradient (docs/adr/0008).
    """

    def __init__(self, engine: Engine, note: Callable[[str, dict[str, Piece]], Record], floor: float | None) -> None:
        self.engine, self.note, self.floor = engine, note, floor
        self.model = engine.model

    def finish_gradients(self) -> Tensor:
        norm = self.engine.finish_gradients()
        self.note("gradients", self.engine.gradients())
        return norm

    def clip(self, norm: Tensor, limit: float) -> None:
        self.engine.clip(norm, limit)
        clipped = self.note("clipped gradients", self.engine.gradients())
        if self.floor is not None:
            self._start(_scales(clipped, self.floor))
            self.floor = None

    def step(self, lr: float) -> None:
        self.engine.step(lr)
        self.note("weights", self.engine.weights())

    def _start(self, scales: dict[str, float]) -> None:
        """Fill the moments from the scales of the gradients: second moments with their squares, Muon's momentum with
        rows of the discrete cosine transform, which are orthogonal, so that its next update hardly rotates them."""
        for key, piece in self.engine.optimizer_state().items():
            name, moment = key.rsplit(".", 1)
            if moment == "momentum_buffer":
                rows, columns = (torch.arange(size, dtype=torch.float64) for size in piece.shape)
                waves = torch.outer(rows, (columns + 0.5) * math.pi / len(columns)).cos()
                start = (scales[name] * waves).to(piece.dtype)
            elif moment in _SECOND:
                start = torch.full(piece.shape, scales[name] ** 2, dtype=piece.dtype)
            else:
                continue
            for tile in piece.tiles:
                tile.put(0, start[tile.place])
        if self.engine.matrices is not None:
            self.engine.matrices.loaded(1)  # Adafactor's first update would ignore the state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def batches(trainer: Trainer) -> Loader:
    """The training batches of a new run from its first step, without prefetching."""
    config, mesh = trainer.config, trainer.mesh
    return Loader(
        trainer.task.dataset("train"),
        micro_batch_size=config.train.micro_batch_size,
        num_micro_batches=trainer.plan.accumulation,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        consumed_samples=0,
        prefetch=0,
        device=mesh.device,
    )


def record(
    config: Config, mesh: Mesh, steps: int, prepare: Callable[[Trainer], None] | None = None, *, moments: bool = True
) -> Iterator[Record]:
    """Train ``steps`` steps on this mesh and yield each step's record, whole on every rank. Collective.

    Where ranks disagree about a tensor that they should share, the copy that is furthest from the first rank's is
    recorded. ``prepare`` may change the trainer first: tests inject bugs with it. ``moments``: whether the optimizer's
    moments start filled (``_RecordingEngine``).
    """
    trainer = Trainer(config, mesh, make_plan(config, mesh.world.size), Faults.none())
    if prepare is not None:
        prepare(trainer)
    noted: Record = {}

    def note(kind: str, pieces: dict[str, Piece]) -> Record:
        names = comm.gather_names(pieces, mesh.world)
        if kind != "weights":
            names.reverse()  # backward ends at the embedding
        found = dict(gathered(names, pieces, mesh.world))
        noted.update((f"{kind}/{name}", tensor) for name, tensor in found.items())
        return found

    floor = FLOORS[config.train.precision]
    trainer.engine = _RecordingEngine(trainer.engine, note, floor if moments else None)  # type: ignore[assignment]
    sizes = {name: torch.zeros((), dtype=torch.float64) for name, _ in trainer.model.blocks.named_children()}
    for name, block in trainer.model.blocks.named_children():
        block.register_forward_hook(_measure(sizes[name]))
    loader = batches(trainer)
    for _ in range(steps):
        noted.clear()
        for size in sizes.values():
            size.zero_()
        result = trainer.train_step(next(loader))
        forward: Record = {}
        everyone = comm.gather_objects(sizes, mesh.world)
        for layer in dict.fromkeys(chain.from_iterable(everyone)):
            whole = torch.stack([rank[layer] for rank in everyone if layer in rank]).sum()
            forward[f"block outputs/blocks.{layer}"] = whole / (1 if trainer.model.sp else mesh.copies)
        forward["loss/loss"] = torch.tensor(result.loss, dtype=torch.float64)
        yield {**forward, **noted}
    loader.close()


def _measure(size: Tensor) -> Callable[..., None]:
    @torch.compiler.disable
    def hook(_: Any, __: Any, output: Tensor) -> None:
        size.add_(output.detach().double().square().sum().cpu())

    return hook


def gathered(names: Iterable[str], pieces: Mapping[str, Piece], world: Axis) -> Iterator[tuple[str, Tensor]]:
    """Yield the named tensors in order, each whole, from the pieces of all ranks; a rank may lack some names.
    Collective."""
    empty: dict[str, Piece] = {}
    for kinds in comm.gather_objects({name: (piece.shape, piece.dtype) for name, piece in pieces.items()}, world):
        empty.update((name, Piece(shape, dtype, [])) for name, (shape, dtype) in kinds.items())
    for some in _batches(names, empty):
        held = [pieces.get(name, empty[name]).tiles for name in some]
        own = [[(tile.place, _as_bytes(tile.numbers)) for tile in tiles] for tiles in held]
        for name, parts in zip(some, zip(*comm.gather_objects(own, world), strict=True), strict=True):
            yield name, _whole(empty[name], chain.from_iterable(parts))


def _batches(names: Iterable[str], pieces: Mapping[str, Piece]) -> Iterator[list[str]]:
    """The names in order, a few megabytes of tensors at a time: gathering small tensors one by one would be slow."""
    some: list[str] = []
    size = 0
    for name in names:
        some.append(name)
        size += math.prod(pieces[name].shape)
        if size > 1 << 20:
            yield some
            some, size = [], 0
    if some:
        yield some


def _as_bytes(numbers: Tensor) -> Any:
    """A tensor as an array of bytes, which is pickled about ten times as fast."""
    return numbers.cpu().reshape(-1).view(torch.uint8).numpy()


def _whole(piece: Piece, parts: Iterable[tuple[Any, Any]]) -> Tensor:
    """The global tensor from every rank's parts and their places. Where several ranks hold the same part and disagree,
    the one that is furthest from the first is kept."""
    whole = torch.full(piece.shape, float("nan"), dtype=piece.dtype)
    first = whole.clone()
    for place, array in parts:
        part = torch.from_numpy(array).view(piece.dtype).view(whole[place].shape)
        first[place] = torch.where(first[place].isnan(), part, first[place])
        closer = whole[place].isnan() | ((whole[place] - first[place]).abs() < (part - first[place]).abs())
        whole[place] = torch.where(closer, part, whole[place])
    return whole


def _scales(tensors: Record, floor: float) -> dict[str, float]:
    """The scale of each tensor of a kind: its largest element, but at least ``floor`` times the largest of the kind
    (for gradients that are zero except for rounding)."""
    peaks = {name: float(tensor.abs().max()) for name, tensor in tensors.items()}
    least = floor * max(peaks.values(), default=0.0) or 1.0
    return {name: max(peak, least) for name, peak in peaks.items()}


def compare(a: Record, b: Record, step: int, tolerance: float, floor: float = FLOORS["float64"]) -> list[Row]:
    """One row for each kind; differences are relative to each tensor's scale."""
    assert list(a) == list(b), "the layouts recorded different tensors"
    rows = []
    for kind in KINDS:
        names = [name for name in a if name.startswith(f"{kind}/")]
        scales = _scales({name: a[name] for name in names}, floor)
        gaps = {n: float((a[n].double() - b[n].double()).abs().max()) / scales[n] for n in names}
        # A NaN compares as beyond any tolerance.
        beyond = next(((n.removeprefix(f"{kind}/"), gaps[n]) for n in names if not gaps[n] <= tolerance), None)
        if names:
            worst = max(names, key=lambda n: (gaps[n] != gaps[n], gaps[n]))
            rows.append(Row(step, kind, gaps[worst], worst.removeprefix(f"{kind}/"), beyond))
    return rows
