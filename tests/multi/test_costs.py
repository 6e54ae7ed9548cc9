"""What an engine costs, counted: memory of a rank against the formula, bytes sent in a step against the textbook."""

import ctypes
import gc
import re
import resource
from pathlib import Path

import pytest
import torch

from megatron_lite.config import Config, parse_config
from megatron_lite.data.dataset import build_dataset
from megatron_lite.data.loader import Loader
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.errors import PeerError
from megatron_lite.planning.memory import bytes_per_parameter
from megatron_lite.planning.plan import make_plan
from megatron_lite.training.faults import Faults
from megatron_lite.training.step import Trainer
from tests.kit.engines import AT_ONCE
from tests.kit.engines import ENGINES as EVERY
from tests.kit.tiny import tiny_data
from tests.kit.traffic import Traffic
from tests.kit.world import run_ranks

pytestmark = pytest.mark.slow
ENGINES = {**EVERY, "deepspeed, zero 3": {**EVERY["deepspeed, zero 3"], "deepspeed": AT_ONCE}}
# Many small blocks, so that parameters dominate: what is gathered for a moment is one block.
SIZES = {"vocab_size": 64, "hidden_size": 256, "num_layers": 24, "num_heads": 4, "ffn_size": 768, "max_seq_len": 16}


def config_of(size: int, data: str, parallel: dict, precision: str, layers: int) -> Config:
    return parse_config(
        {
            "model": {**SIZES, "num_layers": layers},
            "data": {"train": [{"path": data}], "seq_len": 4},
            "parallel": {"bucket_mb": 1, **parallel},
            "train": {"global_batch_size": size, "micro_batch_size": 1, "precision": precision},
        }
    )


def megabytes(field: str) -> float:
    """A line of /proc/self/status, in MB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def train(size: int, data: str, parallel: dict, precision: str, layers: int) -> dict[str, float]:
    """Two steps; of the second one the peak of this process's memory and the bytes sent, for 4 of each parameter."""
    config = config_of(size, data, parallel, precision, layers)
    plan = make_plan(config, size)
    mesh = build_mesh(plan.degrees, torch.device("cpu"))
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
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with Traffic() as sent:
        trainer.train_step(next(batches))
    parameters = sum(torch.Size(spec.shape).numel() for spec in trainer.engine.specs.values())
    formula = sum(bytes_per_parameter(config, plan).values()) * parameters / 1e6
    return {"peak": megabytes("VmHWM"), "formula": formula, "sent": sent.bytes / (4 * parameters)}


def give_back_what_is_freed(mapped: int = 1 << 14) -> None:
    """To the system, at once: else what a process holds tells nothing. From ``mapped`` bytes on, each tensor has pages
    of its own."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(-3, mapped) and libc.mallopt(-1, 0)


def cost(rank: int, size: int, data: str, parallel: dict, precision: str) -> dict[str, float]:
    """What a model costs on this rank, beyond what a small one of the same kind leaves behind."""
    give_back_what_is_freed()
    train(size, data, parallel, precision, 1)
    gc.collect()
    before = megabytes("VmRSS")
    found = train(size, data, parallel, precision, SIZES["num_layers"])
    return {**found, "memory": found["peak"] - before}


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    data = str(tiny_data(tmp_path_factory.mktemp("costs")))
    found: dict[tuple[str, int, str], dict[str, float]] = {}

    def of(engine: str, size: int, precision: str) -> dict[str, float]:
        key = (engine, size, precision)
        if key not in found:
            ranks = run_ranks(cost, size, data, ENGINES[engine], precision, timeout=60)
            found[key] = max(ranks, key=lambda one: one["memory"])
        return found[key]

    return of


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_more_is_sent_than_the_textbook_says(costs, engine, size):
    """In units of all parameters: an all-reduce is 2, a reduce-scatter, a reduce and an all-gather 1 each."""
    assert costs(engine, size, "float32")["sent"] == pytest.approx(3 if engine.endswith("zero 3") else 2, rel=0.01)


@pytest.mark.parametrize("size, precision", [(2, "float32"), (4, "float32"), (2, "bfloat16")])
@pytest.mark.parametrize("engine", ENGINES)
def test_memory_is_what_the_formula_says(costs, engine, size, precision):
    """Within a tenth, and a few blocks that are there whole for a moment where gradients or weights are divided."""
    found = costs(engine, size, precision)
    block = 4 * (4 * SIZES["hidden_size"] + 3 * SIZES["ffn_size"]) * SIZES["hidden_size"] / 1e6
    formula = found["formula"]
    moment = {"fsdp, zero 3": 7, "deepspeed, zero 2": 5, "deepspeed, zero 3": 7}.get(engine, 0)
    assert 0.85 * formula < found["memory"] < 1.1 * formula + moment * block


def train_within(rank: int, size: int, data: str, parallel: dict, limit_mb: float) -> float:
    """The loss of two steps by a rank that may take ``limit_mb`` more than what is there before the model."""
    give_back_what_is_freed()
    train(size, data, parallel, "float32", 1)
    gc.collect()
    limit = int((megabytes("VmData") + limit_mb) * 1e6)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return train(size, data, parallel, "float32", SIZES["num_layers"])["sent"]


@pytest.mark.parametrize("engine", ["fsdp, zero 3", "deepspeed, zero 3"])
def test_a_model_larger_than_the_memory_of_a_rank(tmp_path, engine):
    """All its state takes 328 MB, its weights alone 82; each of four ranks is allowed 260."""
    data = str(tiny_data(tmp_path))
    assert all(run_ranks(train_within, 4, data, ENGINES[engine], 260.0, timeout=60))
    with pytest.raises(PeerError, match=r"allocate|memory"):
        run_ranks(train_within, 4, data, ENGINES["ddp"], 260.0, timeout=60)
