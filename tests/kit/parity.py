"""Layouts to compare: a tiny model, a dataset, and what one process computes as the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from megatron_lite.config import Config, parse_config
from megatron_lite.distributed.mesh import Mesh, build_mesh, solo_mesh
from megatron_lite.planning.plan import make_plan
from megatron_lite.proof.record import FLOORS, TOLERANCES, Record, Row, compare, record
from megatron_lite.training.step import Trainer

Change = Callable[[Trainer], None]

STEPS, SEQ_LEN, GLOBAL_BATCH, TOLERANCE = 2, 16, 16, TOLERANCES["float64"]
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 64, "max_seq_len": SEQ_LEN}
TREE: dict[str, dict[str, Any]] = {
    "model": {**SIZES, "vocab_size": 101, "vocab_multiple": 8, "init_std": 0.2},  # padded to 104
    "data": {"seq_len": SEQ_LEN},
    "optim": {"lr": 1e-2, "clip": 0.1},
    "parallel": {},
    "train": {"global_batch_size": GLOBAL_BATCH, "precision": "float64"},
}


@dataclass(frozen=True)
class Layout:
    """Ranks 0 to dp × tp - 1 of the world, and how they work."""

    dp: int = 1
    tp: int = 1
    accumulation: int = 1
    parallel: Mapping[str, Any] = field(default_factory=dict)
    compile: bool = False

    def config(self, data: str, changes: Mapping[str, Mapping[str, Any]]) -> Config:
        """The tiny model with ``changes`` to some sections, trained on the dataset at ``data`` in this layout."""
        own = {
            "data": {"train": [{"path": data}]},
            "parallel": {"tp": self.tp, **self.parallel},
            "train": {"micro_batch_size": GLOBAL_BATCH // self.dp // self.accumulation, "compile": self.compile},
        }
        names = [*TREE, *(name for name in changes if name not in TREE)]
        return parse_config({n: {**TREE.get(n, {}), **own.get(n, {}), **changes.get(n, {})} for n in names})


def ruffle(trainer: Trainer) -> None:
    """Add a wave to every parameter: those that start as zeros or ones would hide a missing or doubled term."""
    for piece in trainer.engine.weights().values():
        wave = 0.01 * torch.arange(math.prod(piece.shape), dtype=torch.float64).sin().view(piece.shape)
        for tile in piece.tiles:
            tile.put(0, tile.numbers + wave[tile.place])
    trainer.engine.publish()


def hold_still(trainer: Trainer) -> None:
    """Assert from now on that what a checkpoint holds changes in the update alone: a save in the background may read
    it until then."""
    engine = trainer.engine
    update = engine.step

    def unchanged(tensors: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        assert all(torch.equal(now, before) for now, before in tensors)

    def watch() -> None:
        held = [(tile.data, tile.data.clone()) for piece in engine.pieces().values() for tile in piece.tiles]
        trainer.before_update = partial(unchanged, held)

    def step(lr: float) -> None:
        update(lr)
        watch()

    watch()
    engine.step = step  # type: ignore[method-assign]


def train(
    layout: Layout,
    data: str,
    changes: Mapping[str, Mapping[str, Any]],
    plant: Change | None,
    steps: int = STEPS,
    *,
    moments: bool = True,
) -> list[Record]:
    """The records of some steps on the first ranks of the world, from ruffled weights; ``plant`` may then spoil
    the trainer. Every rank of the world calls this; a rank without a part in it gets nothing."""
    size, config = layout.dp * layout.tp, layout.config(data, changes)
    degrees = make_plan(config, size).degrees
    mesh = mesh_of(degrees, size)
    if mesh is None:
        return []

    def prepare(trainer: Trainer) -> None:
        ruffle(trainer)
        if plant is not None:
            plant(trainer)
        hold_still(trainer)

    return list(record(config, mesh, steps, prepare, moments=moments))


def mesh_of(degrees: Mapping[str, int], size: int) -> Mesh | None:
    """The mesh of the first ``size`` ranks of the world; None for the others."""
    return _mesh(tuple(degrees.items()), size)


@cache  # every new process group slows the ones that exist
def _mesh(degrees: tuple[tuple[str, int], ...], size: int) -> Mesh | None:
    return solo_mesh() if size == 1 else build_mesh(dict(degrees), torch.device("cpu"), ranks=range(size))


@dataclass(frozen=True)
class Case:
    """``layout`` against ``truth``, which takes one rank."""

    layout: Layout
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    truth: Layout = Layout()
    plant: Change | None = None


_truths: dict[str, list[Record]] = {}


def run_case(rank: int, size: int, data: str, case: Case) -> list[Row]:
    """On rank 0 a row for each step and kind of tensor."""
    got = train(case.layout, data, case.changes, case.plant)
    if rank:
        return []
    key = repr((data, case.truth, case.changes))
    if key not in _truths:
        _truths[key] = train(case.truth, data, case.changes, None)
    precision = case.changes.get("train", {}).get("precision", "float64")
    limits = TOLERANCES[precision], FLOORS[precision]
    steps = zip(_truths[key], got, strict=True)
    return [row for step, (a, b) in enumerate(steps, 1) for row in compare(a, b, step, *limits)]


def assert_equal(rows: list[Row]) -> None:
    assert len(rows) == 5 * STEPS
    worst = max(rows, key=lambda row: row.difference)
    assert worst.difference <= TOLERANCE, worst
