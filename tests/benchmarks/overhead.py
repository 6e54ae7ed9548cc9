"""What our loop adds to a step of the bare engine: loader, checks, reductions of numbers, metrics and TensorBoard.

    python -m tests.benchmarks.overhead [--rounds=8] [--engines=fsdp-3,deepspeed-3]

Two ranks of a thread each train the 8-layer Llama of train.py, in float32. In turns a step goes as in a run (``loop``)
and as the engine alone does it (``bare``): forward, backward, reduction, clipping, update, on a batch that is there.
The figure is the median over pairs of steps, of rank 0.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_lite.config import parse_config
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.planning.plan import make_plan
from megatron_lite.training.lifetime import StopRequest
from megatron_lite.training.run import Run
from megatron_lite.training.watchdog import Watchdog
from tests.benchmarks.help import answer_help
from tests.benchmarks.train import LR, MODELS, SEQ

BATCH = 2
MODEL = MODELS["small"]


def contend(rank: int, size: int, folder: str, engine: str, stage: int, rounds: int) -> list[float]:
    """For each pair of steps, what the loop's takes over the bare engine's."""
    torch.set_num_threads(1)
    config = parse_config(
        {
            "run": {"dir": folder},
            "model": {**MODEL, "max_seq_len": SEQ},
            "data": {"train": [{"path": f"{folder}/data"}], "seq_len": SEQ},
            "train": {"global_batch_size": BATCH * size, "micro_batch_size": BATCH, "steps": 10**6, "log_every": 1},
            "optim": {"lr": LR, "schedule": "constant"},
            "parallel": {"engine": engine, "zero": stage},
        }
    )
    (config.folder / "logs").mkdir(parents=True, exist_ok=True)
    plan = make_plan(config, size)
    mesh = build_mesh(plan.degrees, torch.device("cpu"))
    assert mesh is not None
    here = Rank(rank=rank, size=size, local_rank=rank, local_size=size)
    watchdog = Watchdog(config.folder / "logs", here, mesh, 600)
    run = Run(config, plan, here, mesh, StopRequest(), watchdog)
    run._open_reporter()
    trainer, loader = run.trainer, run._loader(run.train_data, 0)

    def loop() -> None:
        run.watchdog.watch(trainer.state.step + 1)
        began = time.perf_counter()
        result = trainer.train_step(next(loader))
        run.report(result, time.perf_counter() - began)

    (batch,) = next(loader)
    tokens = batch.targets.numel() * size

    def bare() -> None:
        trainer.engine.backward(trainer.loss(batch, training=True) / tokens, last=True)
        norm = trainer.engine.finish_gradients()
        trainer.engine.clip(norm, 1.0)
        trainer.engine.step(LR)

    def seconds(step: object) -> float:
        began = time.perf_counter()
        step()  # type: ignore[operator]
        return time.perf_counter() - began

    for step in (loop, bare):
        step()
    ratios = []
    for i in range(rounds):
        first, second = (loop, bare) if i % 2 == 0 else (bare, loop)
        took = {first: seconds(first), second: seconds(second)}
        ratios.append(took[loop] / took[bare])
    loader.close()
    return ratios


def main(rounds: int = 8, engines: str = "fsdp-0,fsdp-2,fsdp-3,deepspeed-1,deepspeed-3") -> None:
    print(f"{'':<14}{'loop over bare engine':>24}")
    for name in engines.split(","):
        engine, stage = name.split("-")
        with tempfile.TemporaryDirectory() as folder:
            with IndexedWriter(Path(folder) / "data", np.dtype(np.uint16)) as writer:
                tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], size=40 * BATCH * SEQ * (rounds + 2))
                writer.add_document(tokens.astype(np.uint16))
            ratios = run_ranks(contend, 2, folder, engine, int(stage), rounds, timeout=590)[0]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{name:<14}{middle:>10.3f}   ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    answer_help(__doc__)
    pairs = (argument.lstrip("-").split("=") for argument in sys.argv[1:])
    main(**{key: int(value) if value.isdigit() else value for key, value in pairs})  # type: ignore[arg-type]
