"""Measures all-reduce: ``python -m megatron_lite.distributed.bandwidth OUT SECONDS``, as a rank of any launcher.

Rank 0 writes JSON to OUT: ``backend``; ``latency`` of 4 bytes among all ranks, in seconds; ``all``, the bus bandwidth
among all ranks, and ``pairs``, ``[a, b, bandwidth]`` for each two neighbours, in bytes a second. After SECONDS the
process kills itself.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as torch_dist

from megatron_lite.distributed.env import read_rank
from megatron_lite.distributed.mesh import pick_device, process_group

_FIRST, _LARGEST = 1 << 20, 1 << 28  # bytes of a message
_LONG_S = 0.02  # seconds after which a measurement is accurate enough


def measure(group: torch_dist.ProcessGroup | None, device: torch.device, size: int) -> float:
    """Seconds for an all-reduce of ``size`` bytes on the slowest rank, the best of two. Collective."""
    message, best = torch.ones(size // 4, device=device), float("inf")
    for _ in range(3):  # the first one only sets up connections
        torch_dist.barrier(group)
        began = time.perf_counter()
        torch_dist.all_reduce(message, group=group)
        message[0].item()  # waits for the end of a GPU's all-reduce
        best = min(best, time.perf_counter() - began)
        message.fill_(1.0)
    slowest = torch.tensor(best, device=device)
    torch_dist.all_reduce(slowest, torch_dist.ReduceOp.MAX, group=group)
    return float(slowest.item())


def bandwidth(group: torch_dist.ProcessGroup | None, ranks: int, device: torch.device) -> float:
    """Bus bandwidth: bytes a second over each link when ``ranks`` ranks all-reduce in a ring. The message is enlarged
    until it takes long enough to measure. Collective."""
    size = _FIRST
    seconds = measure(group, device, size)
    while seconds < _LONG_S and size < _LARGEST:
        size = min(_LARGEST, 4 * size)
        seconds = measure(group, device, size)
    return size * 2 * (ranks - 1) / ranks / seconds


def main(out: str, seconds: str) -> None:
    signal.alarm(int(seconds))
    rank = read_rank()
    device = pick_device(rank)
    with process_group(rank, device, int(seconds)):
        found = {
            "backend": "nccl" if device.type == "cuda" else "gloo",
            "latency": measure(None, device, 4),
            "all": bandwidth(None, rank.size, device),
        }
        pairs = []
        for first in range(rank.size - 1):
            pair = torch_dist.new_group([first, first + 1])
            speed = torch.zeros((), dtype=torch.float64, device=device)
            if rank.rank in (first, first + 1):
                speed += bandwidth(pair, 2, device)
            torch_dist.broadcast(speed, first)
            pairs.append((first, first + 1, float(speed.item())))
    if rank.rank == 0:
        Path(out).write_text(json.dumps({**found, "pairs": pairs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
