"""What a rank holds at its peak beside what the formula says, of a model so deep that a few gathered blocks are little.

``python -m tests.benchmarks.memory [--layers=128] [--only='fsdp, zero 3']``, on Linux. Measured as the difference to a
model of the same depth and a sixteenth of the width: what modules and hooks take for each block is no parameter.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import fire

from megatron_lite.dist.spawn import run_ranks
from tests.kit.tiny import tiny_data
from tests.multi import test_costs as costs

WIDTHS = (16, 256)


def peaks(rank: int, size: int, data: str, engine: str, precision: str, layers: int) -> tuple[float, float]:
    """Megabytes that the wide model takes beyond the narrow one, and what the formula says of that."""
    costs.give_back_what_is_freed(1 << 17)  # smaller tensors would each be rounded up to pages
    found = []
    for width in WIDTHS:
        costs.SIZES.update(hidden_size=width, ffn_size=3 * width)
        found.append(costs.train(size, data, costs.ENGINES[engine], precision, layers))
        gc.collect()
    narrow, wide = found
    return wide["peak"] - narrow["peak"], wide["formula"] - narrow["formula"]


def main(layers: int = 128, only: str = "") -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = str(tiny_data(Path(folder)))
        for engine in [only] if only else list(costs.ENGINES):
            for precision in ("float32", "bfloat16"):
                for size in (2, 4):
                    ranks = run_ranks(peaks, size, data, engine, precision, layers, timeout=600)
                    taken, formula = max(ranks)
                    print(f"{engine}, {precision}, N = {size}: {taken:.0f} MB, {taken / formula:.2f}", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
