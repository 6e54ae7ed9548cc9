"""When engines communicate: reductions beside backward, gathers ahead of their use, once a step where that is asked."""

from itertools import takewhile

import pytest
import torch

from megatron_lite.config import parse_config
from megatron_lite.data.dataset import build_dataset
from megatron_lite.data.loader import Loader
from megatron_lite.planning.plan import make_plan
from megatron_lite.training.faults import Faults
from megatron_lite.training.step import Trainer
from tests.kit.engines import AT_ONCE
from tests.kit.optional import optional
from tests.kit.parity import mesh_of
from tests.kit.traffic import Traffic

optional("deepspeed", "deepspeed")

LAYERS, MICRO_BATCHES = 4, 3
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_layers": LAYERS, "num_heads": 4, "ffn_size": 128, "max_seq_len": 16}
# What is sent in a step of three micro batches, in units of all parameters.
SENT = {
    "ddp": ({"bucket_mb": 0.1}, 2),
    "ddp, one bucket": ({}, 2),
    "fsdp, zero 2": ({"zero": 2, "prefetch": 2}, 3 * 2),
    "fsdp, zero 2, reduce_once": ({"zero": 2, "reduce_once": True}, 3 * 1 + 1),
    "fsdp, zero 3": ({"zero": 3}, 3 * 3),
    "fsdp, zero 3, no prefetch": ({"zero": 3, "prefetch": 0}, 3 * 3),
    "fsdp, zero 3, prefetch 2": ({"zero": 3, "prefetch": 2}, 3 * 3),
    "fsdp, zero 3, reduce_once": ({"zero": 3, "reduce_once": True}, 3 * 2 + 1),
    "deepspeed, zero 0": ({"engine": "deepspeed"}, 2),
    "deepspeed, zero 1": ({"engine": "deepspeed", "zero": 1}, 2),
    "deepspeed, zero 2": ({"engine": "deepspeed", "zero": 2}, 3 * 1 + 1),
    "deepspeed, zero 3": ({"engine": "deepspeed", "zero": 3, "deepspeed": AT_ONCE}, 3 * 3),
}


def step(rank: int, size: int, data: str) -> dict[str, tuple[float, float, list[str]]]:
    """Of each engine's second step, what is sent in units of all parameters, which share of them is outside the blocks,
    and the events."""
    found = {}
    for name, (parallel, _) in SENT.items():
        batch = {"global_batch_size": size * MICRO_BATCHES, "micro_batch_size": 1}
        config = parse_config(
            {
                "model": SIZES,
                "data": {"train": [{"path": data}], "seq_len": 16},
                "parallel": parallel,
                "train": batch,
            }
        )
        plan = make_plan(config, size)
        mesh = mesh_of(plan.degrees, size)
        trainer = Trainer(config, mesh, plan, Faults.none())
        batches = Loader(
            build_dataset(config.data, 0, "train", SIZES["vocab_size"]),
            micro_batch_size=1,
            num_micro_batches=plan.accumulation,
            dp_rank=mesh.dp.rank,
            dp_size=mesh.dp.size,
            consumed_samples=0,
            prefetch=0,
            device=mesh.device,
        )
        trainer.train_step(next(batches))
        traffic, backward = Traffic(), trainer.engine.backward

        def noted(loss, *, last, traffic=traffic, backward=backward):
            traffic.note("backward")
            backward(loss, last=last)
            traffic.note("done")

        trainer.engine.backward = noted
        for i, block in enumerate(trainer.model.blocks):
            block.register_forward_pre_hook(lambda *_, i=i, traffic=traffic: traffic.note(f"block {i}"))
        with traffic:
            trainer.train_step(next(batches))
        sizes = {name: torch.Size(spec.shape).numel() for name, spec in trainer.engine.specs.items()}
        total = sum(sizes.values())
        outside = sum(size for name, size in sizes.items() if not name.startswith("blocks."))
        found[name] = (traffic.bytes / (4 * total), outside / total, traffic.events)
    return found


@pytest.fixture(scope="module")
def steps(pair, data):
    return pair.run(step, str(data))[0]


def passes(events: list[str]) -> list[list[str]]:
    """The events of each micro batch's backward."""
    found = []
    for i, event in enumerate(events):
        if event == "backward":
            found.append(list(takewhile(lambda e: e != "done", events[i + 1 :])))
    assert len(found) == MICRO_BATCHES
    return found


@pytest.mark.parametrize("engine", SENT)
def test_accumulation_sends_what_it_must(steps, engine):
    """FSDP2 keeps what is outside the blocks gathered until backward."""
    sent, outside, _ = steps[engine]
    kept = MICRO_BATCHES * outside if engine.startswith("fsdp, zero 3") else 0
    assert sent == pytest.approx(SENT[engine][1] - kept, rel=0.01)


def test_ddp_reduces_beside_the_last_backward(steps):
    *others, last = passes(steps["ddp"][2])
    assert not any("allreduce" in events for events in others)
    assert last.count("allreduce") > LAYERS
    assert "mm" in last[last.index("allreduce") :][1:]
    assert passes(steps["ddp, one bucket"][2])[-1].count("allreduce") == 1


@pytest.mark.parametrize("engine", ["fsdp, zero 2", "fsdp, zero 3"])
def test_fsdp_reduces_each_block_beside_backward(steps, engine):
    for events in passes(steps[engine][2]):
        assert events.count("_reduce_scatter_base") == LAYERS + 1
        assert "mm" in events[events.index("_reduce_scatter_base") :]
    *others, last = passes(steps[f"{engine}, reduce_once"][2])
    assert not any("_reduce_scatter_base" in events for events in others)
    assert last.count("_reduce_scatter_base") == LAYERS + 1


@pytest.mark.parametrize(
    "engine, ahead, ahead_backward",
    [("fsdp, zero 3, no prefetch", 0, 1), ("fsdp, zero 3", 1, 1), ("fsdp, zero 3, prefetch 2", 2, 2)],
)
def test_fsdp_gathers_ahead_of_the_block_at_work(steps, engine, ahead, ahead_backward):
    """FSDP2 itself gathers one block ahead in backward at least."""
    events = steps[engine][2]
    for i in range(LAYERS):
        gathered = events[: events.index(f"block {i}")].count("_allgather_base")
        assert gathered == 1 + min(LAYERS, i + 1 + ahead)  # and what is outside the blocks
    for backward in passes(events):
        assert list(takewhile(lambda e: e != "mm", backward)).count("_allgather_base") == 1 + ahead_backward
