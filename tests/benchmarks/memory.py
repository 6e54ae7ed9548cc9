"""What a rank holds at its peak beside what the formula says, of a model so deep that a few gathered blocks are little.

``python -m tests.benchmarks.memory [--layers=128] [--only='fsdp, zero 3'] [--precision=float32]``, on Linux. Measured
as the difference to a model of the same depth and a sixteenth of the width: what modules and hooks take for each block
is no parameter.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import fire

from megatron_lite.distributed.spawn import run_ranks
from tests.kit.tiny import tiny_data
from tests.multi import test_costs as costs

WIDTHS = (16, 256)


def peak(rank: int, size: int, data: str, engine: str, precision: str, layers: int, width: int) -> tuple[float, float]:
    """Megabytes that a rank takes, and what the formula says its model does. In a process of its own, since an engine
    may not let go of all that a first model took."""
    costs.give_back_what_is_freed(1 << 17)  # smaller tensors would each be rounded up to pages
    costs.SIZES.update(hidden_size=width, ffn_size=3 * width)
    found = costs.train(size, data, costs.ENGINES[engine], precision, layers)
    return found["peak"], found["formula"]


def main(layers: int = 128, only: str = "", precision: str = "") -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = str(tiny_data(Path(folder)))
        for engine in [only] if only else list(costs.ENGINES):
            for kind in [precision] if precision else ["float32", "bfloat16"]:
                for size in (2, 4):
                    narrow, wide = (
                        max(run_ranks(peak, size, data, engine, kind, layers, width, timeout=600)) for width in WIDTHS
                    )
                    taken, formula = wide[0] - narrow[0], wide[1] - narrow[1]
                    print(f"{engine}, {kind}, N = {size}: {taken:.0f} MB, {taken / formula:.2f}", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
