"""Validation counts each window once: the same loss at every batch size, layout and engine, that of a plain loop."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_lite.data.batch import IGNORED
from megatron_lite.data.dataset import build_dataset
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.loader import once
from megatron_lite.planning.plan import make_plan
from megatron_lite.training.faults import Faults
from megatron_lite.training.step import Trainer
from tests.kit.parity import SEQ_LEN, Layout, mesh_of, ruffle

LAYOUTS = {
    "alone": Layout(),
    "micro batches of 1": Layout(accumulation=16),
    "micro batches of 2": Layout(accumulation=8),
    "dp 2": Layout(dp=2),
    "dp 2, micro batches of 2": Layout(dp=2, accumulation=4),
    "tp 2, sp": Layout(tp=2, parallel={"sp": True}),
    "zero 3": Layout(dp=2, parallel={"zero": 3}),
    "zero 2, micro batches of 1": Layout(dp=2, accumulation=8, parallel={"zero": 2}),
    "deepspeed, zero 3": Layout(dp=2, parallel={"engine": "deepspeed", "zero": 3}),
    "deepspeed, zero 1, micro batches of 1": Layout(dp=2, accumulation=8, parallel={"engine": "deepspeed", "zero": 1}),
}
LIMITS = (1, 5, 19, 1000)


def documents(folder, name, count):
    """A dataset of ``count`` windows, in documents shorter than they are."""
    rng = np.random.default_rng(count)
    with IndexedWriter(folder / name, np.dtype(np.uint16)) as writer:
        for length in [7] * (count * SEQ_LEN // 7) + [1 + count * SEQ_LEN % 7]:
            writer.add_document(rng.integers(0, 101, length).astype(np.uint16))
    return str(folder / name)


def validate(rank, size, paths, names):
    """On rank 0, the loss of each layout over so many windows, and that of a plain loop over those windows."""
    found = {}
    sources = [{"path": path, "weight": weight} for path, weight in paths]
    data = {"train": sources, "document_mask": True, "seq_len": SEQ_LEN}
    for name in names:
        layout = LAYOUTS[name]
        ranks = layout.dp * layout.tp
        config = layout.config("", {"data": data})
        plan = make_plan(config, ranks)
        mesh = mesh_of(plan.degrees, ranks)
        if mesh is None:
            continue
        trainer = Trainer(config, mesh, plan, Faults.none())
        ruffle(trainer)
        dataset = build_dataset(config.data, 0, "train", 101)
        micro = config.train.micro_batch_size
        where = {"micro_batch_size": micro, "dp_rank": mesh.dp.rank, "dp_size": mesh.dp.size, "device": mesh.device}
        found[name] = [trainer.evaluate(once(dataset, limit, **where)) for limit in LIMITS]
        if name == "alone":
            found["plain"] = [plainly(trainer, dataset, limit) for limit in LIMITS]
    return found


@torch.no_grad()
def plainly(trainer, dataset, limit):
    total = count = 0.0
    windows = list(zip(*dataset.once(limit), strict=True))
    assert len(windows) == len(set(windows)) == min(limit, sum(source.num_samples for source in dataset.sources))
    for number, window in windows:
        batch = dataset.batch(0, np.array([number]), np.array([window]))
        total += trainer.loss(replace(batch, counted=None), training=False).item()
        count += int((batch.targets != IGNORED).sum())
    return total / count


@pytest.fixture(scope="module")
def found(pair, tmp_path_factory):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("validation")
    paths = [(documents(folder, "a", 14), 0.9), (documents(folder, "b", 9), 0.1)]
    return pair.run(validate, paths, tuple(LAYOUTS))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_is_that_of_a_plain_loop(found, layout):
    for got, want in zip(found[layout], found["plain"], strict=True):
        assert math.isclose(got, want, rel_tol=1e-12)
