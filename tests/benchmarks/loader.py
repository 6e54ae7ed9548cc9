"""Tokens a second of the loader against a bare loop that copies random windows out of a memory map, and start-up.

    python tests/benchmarks/loader.py [--seq_len=1024] [--rounds=7]

Both read the same dataset of 128 M tokens that lies in the page cache, on one core, in turns; the ratio is the median
over the rounds. Start-up is measured on an index of a billion tokens in a million documents.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_lite.config import DataConfig, SourceConfig
from megatron_lite.data.dataset import build_dataset
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.loader import Loader

BATCH = 16


def write(prefix: Path, documents: int, length: int) -> Path:
    """A dataset of equal documents."""
    with IndexedWriter(prefix, np.dtype(np.uint16), durable=False) as writer:
        tokens = (np.arange(1000 * length) % 30000).astype(np.uint16)
        for _ in range(documents // 1000):
            writer.add_documents(tokens, np.full(1000, length, np.int32), np.arange(1, 1001))
    return prefix


def config(prefix: Path, seq_len: int, **changes: object) -> DataConfig:
    return DataConfig(train=[SourceConfig(path=str(prefix))], seq_len=seq_len, split=(1, 0, 0), **changes)  # type: ignore[arg-type]


def bare(prefix: Path, seq_len: int, steps: int) -> None:
    """What every minimal training script does: np.memmap, random windows, int64, stacked."""
    data = np.memmap(f"{prefix}.bin", np.uint16, "r")
    generator = np.random.default_rng(0)
    for _ in range(steps):
        starts = generator.integers(0, len(data) - seq_len - 1, BATCH)
        rows = torch.stack([torch.from_numpy(data[i : i + seq_len + 1].astype(np.int64)) for i in starts])
        assert rows[:, :-1].shape == rows[:, 1:].shape


def ours(prefix: Path, seq_len: int, steps: int, **changes: object) -> None:
    dataset = build_dataset(config(prefix, seq_len, **changes), 0, "train", vocab_size=32000)
    loader = Loader(
        dataset,
        micro_batch_size=BATCH,
        num_micro_batches=1,
        dp_rank=0,
        dp_size=1,
        consumed_samples=0,
        prefetch=0,
        device=torch.device("cpu"),
    )
    for _ in range(steps):
        next(loader)


def start(prefix: Path) -> float:
    began = time.perf_counter()
    dataset = build_dataset(config(prefix, 4096), 0, "train")
    kwargs = {"micro_batch_size": 8, "num_micro_batches": 1, "dp_rank": 0, "dp_size": 1, "prefetch": 0}
    next(Loader(dataset, consumed_samples=10**9, device=torch.device("cpu"), **kwargs))  # type: ignore[arg-type]
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = write(Path(folder) / "data", 128_000, 1000)
        steps = 16_000_000 // (BATCH * options.seq_len)
        contenders = {
            "bare copy loop": lambda: bare(prefix, options.seq_len, steps),
            "loader": lambda: ours(prefix, options.seq_len, steps),
            "loader, document mask": lambda: ours(prefix, options.seq_len, steps, document_mask=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for warm in contenders.values():
            warm()
        for _ in range(options.rounds):
            for name, contender in contenders.items():
                began = time.process_time()
                contender()
                seconds[name].append(time.process_time() - began)
        print(f"seq_len {options.seq_len}, batch {BATCH}, {options.rounds} rounds, CPU time of one core")
        for name, taken in seconds.items():
            ratio = statistics.median(b / t for b, t in zip(seconds["bare copy loop"], taken, strict=True))
            rate = steps * BATCH * options.seq_len / statistics.median(taken)
            print(f"{name:<24}{rate / 1e6:8.1f} M tokens/s  {ratio:5.2f}×")
        big = write(Path(folder) / "big", 1_000_000, 1000)
        times = sorted(start(big) for _ in range(options.rounds))
        print(f"first batch of a billion-token index: {statistics.median(times) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
