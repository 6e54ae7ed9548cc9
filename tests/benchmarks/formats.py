"""A training step in bfloat16 against the same in float32, on one rank of a CPU.

    python tests/benchmarks/formats.py [--rounds=5] [--mode=plain] [--tokens=256]
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python tests/benchmarks/formats.py

The two take turns in one process, one step at a time; the ratio is the median of paired ones. The second command takes
away what a CPU without AVX-512 lacks. ``mode``: plain, or a method of ``train.py``.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from tests.benchmarks.help import answer_help
from tests.benchmarks.train import ours

MODEL = {"vocab_size": 8000, "hidden_size": 512, "num_layers": 2, "num_heads": 8, "ffn_size": 1376}


def main(rounds: int, mode: str, tokens: int) -> None:
    torch.set_num_threads(1)
    drawn = torch.randint(8000, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    batch = drawn[:, :-1], drawn[:, 1:].contiguous()
    steps = {dtype: ours(MODEL, dtype, mode, lambda: batch)[0] for dtype in ("float32", "bfloat16")}
    taken: dict[str, list[float]] = {dtype: [] for dtype in steps}
    for number in range(rounds + 1):  # the first warms up
        for dtype, step in steps.items():
            began = time.thread_time()
            step(number)
            taken[dtype].append(time.thread_time() - began)
    own = {dtype: seconds[1:] for dtype, seconds in taken.items()}
    ratio = statistics.median(a / b for a, b in zip(own["float32"], own["bfloat16"], strict=True))
    medians = ", ".join(f"{dtype} {tokens / statistics.median(seconds):.0f}" for dtype, seconds in own.items())
    print(f"{mode}: tokens/s: {medians}; bfloat16 over float32 {ratio:.2f}")


if __name__ == "__main__":
    answer_help(__doc__)
    given = dict(argument.removeprefix("--").split("=") for argument in sys.argv[1:])
    main(int(given.get("rounds", 5)), given.get("mode", "plain"), int(given.get("tokens", 256)))
