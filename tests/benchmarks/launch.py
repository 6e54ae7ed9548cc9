"""What the launcher adds to a start: ``launch run`` against a bare torchrun, and the time of an answer.

``python -m tests.benchmarks.launch [ROUNDS]``. The ranks run a program that ends at once, so that the time is all
theirs; the config check is the real one. Beside the time that passes, the CPU time of everything that was started,
which other work on the machine changes less.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.help import answer_help

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """
model: {vocab_size: 64, hidden_size: 32}
data: {train: [{path: none}]}
train: {global_batch_size: 8, micro_batch_size: 4}
"""


def seconds(argv: Sequence[str], folder: Path) -> tuple[float, float]:
    """Wall and CPU time of one command."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(argv, cwd=folder, env=env, capture_output=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "c.yaml").write_text(CONFIG)
        (folder / "nothing.py").write_text("")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        launch = [sys.executable, "-m", "launch"]
        # The real check of the config, then two ranks under their shims; the program they run is `nothing.py`.
        code = """
import sys
from dataclasses import replace
from launch import __main__ as launch
make = launch.make_job
launch.make_job = lambda *given: replace(make(*given), program=(sys.executable, "nothing.py"))
sys.argv = ["launch", "run", "c.yaml", "--nproc=2"]
sys.exit(launch.main())
"""
        contenders = {
            "torchrun, 2 ranks that do nothing": [*torchrun, "nothing.py"],
            "launch run of the same": [sys.executable, "-c", code],
            "launch --help": [*launch, "--help"],
            "launch run, an unknown flag": [*launch, "run", "c.yaml", "--nprocs=2"],
            "launch run, a bad config": [*launch, "run", "c.yaml", "--optim.lr=-1"],
        }
        times: dict[str, list[tuple[float, float]]] = {contender: [] for contender in contenders}
        for _ in range(rounds):
            for contender, argv in contenders.items():
                times[contender].append(seconds(argv, folder))
    medians = {}
    for contender, found in times.items():
        walls, cpus = zip(*found, strict=True)
        medians[contender] = wall, cpu = statistics.median(walls), statistics.median(cpus)
        print(f"{contender:<36}{wall:6.2f} s  ({min(walls):.2f} to {max(walls):.2f})   CPU {cpu:5.2f} s")
    (bare, bare_cpu), (ours, ours_cpu) = list(medians.values())[:2]
    print(f"{'added by launch run':<36}{ours - bare:6.2f} s{'':19}CPU {ours_cpu - bare_cpu:5.2f} s")


if __name__ == "__main__":
    answer_help(__doc__)
    main()
