"""A run saved under any engine and layout goes on under any other: every weight and moment bit for bit, then the same
losses as the run that was never interrupted, in float64 with clipping on."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite import checkpoint
from megatron_lite.data.dataset import build_dataset
from megatron_lite.data.loader import Loader
from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.planning.plan import make_plan
from megatron_lite.proof.record import gathered
from megatron_lite.training.faults import Faults
from megatron_lite.training.step import Trainer, TrainState
from tests.kit.engines import ENGINES
from tests.kit.parity import Layout, mesh_of
from tests.kit.pieces import world_of

LAYOUTS = {
    "one process": Layout(),
    "tp 4, sp": Layout(tp=4, parallel={"sp": True}),
    "ddp 2 × tp 2": Layout(dp=2, tp=2),
    "fsdp 3, dp 4": Layout(dp=4, parallel={"zero": 3}),
    "fsdp 3, dp 3": Layout(dp=3, parallel={"zero": 3}),
    "fsdp 2, dp 2 × tp 2": Layout(dp=2, tp=2, parallel={"zero": 2}),
    "hybrid": Layout(dp=4, parallel={"zero": 3, "dp_replicate": 2}),
    "deepspeed 1, dp 4": Layout(dp=4, parallel={"engine": "deepspeed", "zero": 1}),
    "deepspeed 2, dp 3": Layout(dp=3, parallel={"engine": "deepspeed", "zero": 2}),
    "deepspeed 3, dp 2 × tp 2": Layout(dp=2, tp=2, parallel=ENGINES["deepspeed, zero 3"]),
}
WHOLE_MATRICES = ["one process", "tp 4, sp", "ddp 2 × tp 2", "fsdp 3, dp 3", "fsdp 2, dp 2 × tp 2", "hybrid"]
ADAPTERS = {
    "lora": {"method": "lora", "targets": ["blocks.*"], "r": 3, "dora": True},
    "prefix": {"method": "prefix", "length": 5, "reparameterize": 6},
}
BEFORE, AFTER, BATCH = 2, 3, 12  # steps, and a global batch that 1, 2, 3 and 4 divide
# 99 of 104 rows are the vocabulary's; sizes that neither 3 nor 4 ranks divide evenly; tied and not.
MODELS = {
    "llama": {"vocab_size": 99, "num_kv_heads": 2, "hidden_size": 40, "tie_embeddings": True},
    "gpt2": {"vocab_size": 99, "family": "gpt2", "tie_embeddings": False},
}
MATRICES = {  # the optimizer, the model, the layouts, and of how many pairs of them one is tried
    "adamw, llama": ("adamw", "llama", list(LAYOUTS), 5),
    "adamw, llama, every pair": ("adamw", "llama", list(LAYOUTS), 1),
    "adamw, gpt2": ("adamw", "gpt2", list(LAYOUTS), 5),
    "muon, llama": ("muon", "llama", WHOLE_MATRICES, 3),
    "adafactor, llama": ("adafactor", "llama", WHOLE_MATRICES, 3),
    "lora": ("adamw", "llama", list(LAYOUTS), 5),
    "prefix": ("adamw", "llama", list(LAYOUTS), 5),
}


def pairs(matrix: str) -> list[tuple[str, str]]:
    """What is saved under the first of each, and loaded under the second; every layout is in both places."""
    layouts, every = MATRICES[matrix][2:]
    places = product(range(len(layouts)), repeat=2)
    return [(layouts[a], layouts[b]) for a, b in places if (b - a) % len(layouts) % every == 1 % every]


class Bench:
    """A trainer under one layout, its samples, and what its ranks hold."""

    def __init__(self, layout: Layout, data: str, changes: Mapping[str, Mapping[str, Any]], mesh: Mesh) -> None:
        sizes = {"global_batch_size": BATCH, "micro_batch_size": BATCH // layout.dp // layout.accumulation}
        self.config = layout.config(data, {**changes, "train": sizes})
        self.mesh, self.plan = mesh, make_plan(self.config, mesh.world.size)
        self.trainer = Trainer(self.config, mesh, self.plan, Faults.none())

    def losses(self, steps: int) -> list[float]:
        loader = Loader(
            build_dataset(self.config.data, 0, "train", 99),
            micro_batch_size=self.config.train.micro_batch_size,
            num_micro_batches=self.plan.accumulation,
            dp_rank=self.mesh.dp.rank,
            dp_size=self.mesh.dp.size,
            consumed_samples=self.trainer.state.samples,
            prefetch=0,
            device=self.mesh.device,
        )
        found = [self.trainer.train_step(next(loader)).loss for _ in range(steps)]
        loader.close()
        return found

    def whole(self) -> dict[str, torch.Tensor]:
        """Every tensor of weights and optimizer, from everybody's pieces."""
        pieces = self.trainer.engine.pieces()
        return dict(gathered(pieces, pieces, self.mesh.world))

    def save(self, folder: Path) -> Path:
        state = {"train": vars(self.trainer.state)}
        checkpoint.prepare(folder, self.mesh.world)
        pieces = self.trainer.engine.pieces()
        return checkpoint.save(folder, BEFORE, pieces, state, {}, self.mesh.world, Faults.none())

    def load(self, path: Path) -> None:
        found = checkpoint.open_checkpoint(path, self.mesh.world)
        found.load(self.trainer.engine.pieces(), self.mesh.world)
        self.trainer.state = TrainState(**found.state()["train"])
        self.trainer.engine.loaded(self.trainer.state.updates)


def run(rank: int, size: int, data: str, folder: str, matrix: str) -> dict[tuple[str, str], tuple[list[str], float]]:
    """For each pair of layouts, the tensors that came out different and the largest relative difference of a loss."""
    optimizer, model, layouts, _ = MATRICES[matrix]
    changes = {"optim": {"name": optimizer}, "model": MODELS[model]}
    if matrix in ADAPTERS:  # the base is the same everywhere, as it follows from the seed
        changes |= {"peft": ADAPTERS[matrix], "model": {**MODELS[model], "max_seq_len": 32}}
    found: dict[tuple[str, str], tuple[list[str], float]] = {}
    saved: dict[str, tuple[Path, dict[str, torch.Tensor], list[float]]] = {}

    def bench(name: str) -> Bench | None:
        config = LAYOUTS[name].config(data, {**changes, "train": {"global_batch_size": BATCH, "micro_batch_size": 1}})
        ranks = LAYOUTS[name].dp * LAYOUTS[name].tp
        mesh = mesh_of(make_plan(config, ranks).degrees, ranks)
        return Bench(LAYOUTS[name], data, changes, mesh) if mesh is not None and rank < ranks else None

    for name in layouts:
        if (source := bench(name)) is not None:
            source.losses(BEFORE)
            path = source.save(Path(folder) / name.replace(" ", "_"))
            saved[name] = (path, source.whole(), source.losses(AFTER))
        # Everyone has to know them, also ranks that had no part in it.
        (saved[name],) = comm.gather_objects(saved.get(name), world_of(rank, size))[:1]
    for source_name, target in pairs(matrix):
        path, whole, losses = saved[source_name]
        own: tuple[set[str], float] = (set(), 0.0)
        if (trained := bench(target)) is not None:
            trained.load(path)
            pieces = trained.trainer.engine.pieces()
            differ = {n for n, p in pieces.items() for t in p.tiles if not torch.equal(t.data, whole[n][t.place])}
            differ |= whole.keys() ^ pieces.keys()
            gaps = [abs(a - b) / abs(b) for a, b in zip(trained.losses(AFTER), losses, strict=True)]
            own = (differ, max(gaps))
        everyone = comm.gather_objects(own, world_of(rank, size))
        found[source_name, target] = (
            sorted(set().union(*(differ for differ, _ in everyone))),
            max(gap for _, gap in everyone),
        )
    return found


@pytest.mark.parametrize(
    "matrix",
    ["adamw, llama", *(pytest.param(m, marks=pytest.mark.slow) for m in MATRICES if m != "adamw, llama")],
)
def test_saved_under_any_layout_loaded_under_any_other(world, data, tmp_path, matrix):
    found = world.run(run, str(data), str(tmp_path), matrix, timeout=250)[0]
    assert len(found) == len(pairs(matrix))
    different = {pair: tensors for pair, (tensors, _) in found.items() if tensors}
    assert not different
    drifted = {pair: gap for pair, (_, gap) in found.items() if not gap <= 1e-10}
    assert not drifted
