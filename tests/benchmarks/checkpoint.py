"""Checkpoints against the disk they lie on, and against torch.distributed.checkpoint.

    python -m tests.benchmarks.checkpoint [--gigabytes=1] [--rounds=3] [--folder=DIR]

Two ranks hold so much float32 state, divided by rows. ``save`` and ``load`` are this project's (hashed, fsynced,
committed; verified, then read), ``dcp`` are ``dcp.save`` (with fsync) and ``dcp.load``, ``raw`` is the disk: each rank
writes its half and fsyncs, or reads it. ``stall`` is what a step waits for when saving is asynchronous. Contenders take
turns; loads are from a warm cache. ``reshard`` rewrites the checkpoint into two files within 256 MB.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from megatron_lite.checkpoint import BackgroundSaver, open_checkpoint, prepare, save
from megatron_lite.dist.mesh import Axis
from megatron_lite.dist.shard import Piece, Tile
from megatron_lite.dist.spawn import run_ranks
from megatron_lite.faults import Faults

TENSORS, COLUMNS = 32, 1024
EXTRAS = {"config.yaml": b"model: {vocab_size: 64}\n"}


def measure(rank: int, size: int, folder: str, gigabytes: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    torch.set_num_threads(1)
    world = Axis("world", rank, size, torch_dist.group.WORLD)
    rows = int(gigabytes * 1e9 / 4 / TENSORS / COLUMNS) // size
    parts = {f"t{i}": torch.randn(rows, COLUMNS) for i in range(TENSORS)}
    pieces = {
        f"model.{n}": Piece((rows * size, COLUMNS), p.dtype, [Tile(p, (rank * rows, 0))]) for n, p in parts.items()
    }
    mesh = init_device_mesh("cpu", (size,))
    views: dict[str, Any] = {n: DTensor.from_local(p, mesh, [Shard(0)], run_check=False) for n, p in parts.items()}
    saver = BackgroundSaver(world)
    found: dict[str, list[float]] = {}
    root = Path(folder)

    def timed(name: str, action: Callable[[], Any]) -> Any:
        torch_dist.barrier()
        began = time.perf_counter()
        value = action()
        torch_dist.barrier()
        found.setdefault(name, []).append(time.perf_counter() - began)
        return value

    def raw_write() -> None:
        with (root / f"raw.{rank}").open("wb", buffering=0) as file:
            for part in parts.values():
                file.write(part.numpy().data)
            os.fsync(file.fileno())

    def raw_read() -> None:
        with (root / f"raw.{rank}").open("rb", buffering=0) as file:
            for part in parts.values():
                file.readinto(part.numpy().data)

    def load(path: Path, trust: bool) -> None:
        open_checkpoint(path, world, trust=trust).load(pieces, world)

    for i in range(rounds):
        ours = root / f"ours.{i}"
        prepare(ours, world)
        timed("raw write", raw_write)
        path = timed("save", lambda: save(ours, i, pieces, {}, EXTRAS, world, Faults.none()))  # noqa: B023
        timed("dcp write", lambda: dcp.save(views, checkpoint_id=str(root / f"dcp.{i}")))  # noqa: B023
        timed("raw read", raw_read)
        timed("load", lambda: load(path, False))  # noqa: B023
        timed("load, trusted", lambda: load(path, True))  # noqa: B023
        timed("dcp read", lambda: dcp.load(views, checkpoint_id=str(root / f"dcp.{i}")))  # noqa: B023
        timed("stall", lambda: saver.save(ours, i + 100, pieces, {}, EXTRAS, Faults.none(), lambda path: None))  # noqa: B023
        timed("saved behind", saver.wait)
        torch_dist.barrier()
        if rank == 0:
            for old in [*ours.glob("step_*")][: None if i < rounds - 1 else 1]:
                shutil.rmtree(old)
            shutil.rmtree(root / f"dcp.{i}")
    return found


def reshard(root: Path, gigabytes: float) -> tuple[float, float]:
    """Seconds, and the peak of memory over that of a process that has only started, in MB, seen from outside."""
    source = next(root.glob("ours.*/step_*"))
    peaks = []
    for argv in (["--help"], ["reshard", str(source), str(root / "again"), "--files=2", "--max_ram=256M"]):
        code = (
            "import sys, resource; sys.argv = ['x', 'ckpt', *sys.argv[1:]]\n"
            "import megatron_lite.convert\n"
            "from megatron_lite.__main__ import main\n"
            "main(); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
        took = time.perf_counter() - began
        peaks.append(int(done.stdout.split()[-1]) / 1e3)
    return took, peaks[1] - peaks[0]


def main(gigabytes: float = 1.0, rounds: int = 3, folder: str = "") -> None:
    root = Path(tempfile.mkdtemp(prefix="mlite-ckpt-", dir=folder or None))
    try:
        found = run_ranks(measure, 2, str(root), gigabytes, rounds, timeout=1500)[0]
        for name, against in (
            *(("raw write", "raw write"), ("save", "raw write"), ("dcp write", "raw write")),
            *(("stall", "save"), ("saved behind", "save")),
            *(("raw read", "raw read"), ("load", "raw read"), ("load, trusted", "raw read"), ("dcp read", "raw read")),
        ):
            rate = gigabytes * 1e3 / statistics.median(found[name])
            ratio = statistics.median(b / a for a, b in zip(found[name], found[against], strict=True))
            print(f"{name:<14}{statistics.median(found[name]):>7.2f} s {rate:>7.0f} MB/s {ratio:>6.2f} × {against}")
        took, memory = reshard(root, gigabytes)
        print(f"{'reshard':<14}{took:>7.2f} s {gigabytes * 1e3 / took:>7.0f} MB/s, {memory:.0f} MB over the baseline")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    pairs = (argument.lstrip("-").split("=") for argument in sys.argv[1:])
    kinds = {"gigabytes": float, "rounds": int, "folder": str}
    main(**{key: kinds[key](value) for key, value in pairs})
