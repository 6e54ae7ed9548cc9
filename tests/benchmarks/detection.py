"""How long a launch takes to end, with every process gone, after something went wrong in it.

``python -m tests.benchmarks.detection [ROUNDS]``: a rank is killed, or the launcher's agent; a rank is stopped, or the
link to a host cut (as root), with a ``hang_timeout`` of 5 seconds.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.help import answer_help
from tests.kit.cluster import Cluster
from tests.kit.hosts import Unavailable
from tests.kit.jobs import PYTHON, RunningJob, start_job
from tests.kit.tiny import tiny_config, tiny_data

HANG_TIMEOUT = 5
ENV = {"MLITE_FAULT": "sleep:seconds=0.2", "OMP_NUM_THREADS": "1"}


def argv(folder: Path, data: Path, *flags: str) -> list[str]:
    settings = {"train__hang_timeout": HANG_TIMEOUT, "train__steps": 1000, "checkpoint__every": 0}
    config = tiny_config(folder, data, parallel__tp=2, **settings)
    return [PYTHON, "-m", "launch", "run", str(config), *flags]


def seconds(job: RunningJob, fault: Callable[[], None]) -> float:
    """From the fault, in the middle of training, until the launcher has ended and nothing of it is left."""
    job.wait_for("step 4 ")
    began = time.monotonic()
    fault()
    result = job.finish()
    print(f"    {(result.stderr.splitlines() or [''])[-1][:150]}")
    return time.monotonic() - began


def show(fault: str, times: list[float]) -> None:
    print(f"{fault:<32}{statistics.median(times):5.1f} s  ({min(times):.1f} to {max(times):.1f})", flush=True)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    faults: dict[str, Callable[[RunningJob, Path], None]] = {
        "a rank is killed": lambda job, run: os.kill(job.rank_pid(run, 1), signal.SIGKILL),
        "the agent is killed": lambda job, run: os.kill(job.agent_pid(), signal.SIGKILL),
        "a rank is stopped": lambda job, run: os.kill(job.rank_pid(run, 1), signal.SIGSTOP),
    }
    with tempfile.TemporaryDirectory() as name:
        data, number = tiny_data(Path(name)), 0
        for fault, strike in faults.items():
            times = []
            for _ in range(rounds):
                (folder := Path(name) / str(number)).mkdir()
                number += 1
                with start_job(argv(folder, data, "--nproc=2"), timeout=100, env=ENV, cold=True) as job:
                    times.append(seconds(job, lambda: strike(job, folder / "run")))  # noqa: B023 (called at once)
            show(fault, times)
        try:
            with Cluster(2, "namespaces") as cluster:
                times = []
                for _ in range(rounds):
                    (folder := Path(name) / str(number)).mkdir()
                    number += 1
                    hosts = f"--hostfile={cluster.hostfile(folder / 'hosts')}"
                    command = argv(folder, data, hosts, "--launch.tp_across_hosts=true")
                    with cluster.start(0, command, timeout=100, env=ENV) as job:
                        times.append(seconds(job, lambda: cluster.cut(1)))
                    cluster.reset()
                show("a link is cut", times)
        except Unavailable as error:
            print(f"a link is cut: not measured: {error}")


if __name__ == "__main__":
    answer_help(__doc__)
    main()
