"""Launches over several hosts and on Slurm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.kit.cluster import Cluster
from tests.kit.hosts import eventually
from tests.kit.jobs import PYTHON, Result
from tests.kit.mpi import mpich
from tests.kit.slurm import Slurm
from tests.kit.tiny import TinyRuns, tiny_config


def launch(cluster: Cluster, folder: Path, *words: str, timeout: float = 110) -> Result:
    hostfile = cluster.hostfile(folder / "hosts", [1, 1])
    argv = [PYTHON, "-m", "launch", *words, f"--hostfile={hostfile}"]
    return cluster.run(0, argv, timeout=timeout, env={"OMP_NUM_THREADS": "1"})


def no_leftovers(cluster: Cluster) -> bool:
    return not any(cluster.processes(index) for index in range(cluster.count))


def through(name: str, cluster: Cluster) -> list[str]:
    """The flags of a launcher; skips where it is missing."""
    via = "mpirun" if name in ("Open MPI", "MPICH") else name
    needs(via, cluster)
    return [f"--via={via}", *([f"--mpirun={mpich().mpiexec}"] if name == "MPICH" else [])]


def needs(via: str, cluster: Cluster) -> None:
    if via == "deepspeed" and shutil.which("pdsh") is None:
        pytest.skip("there is no pdsh: tests/kit/install_system_packages.sh installs it")
    if cluster.kind == "loopback":
        pytest.skip(f"{via} needs hosts with names: run as root on Linux")


LIMIT = 150  # of waiting for a run, on a busy machine
# The second start of a job is without faults.
HEALED = """--launch.slurm.setup=['[ -z "$SLURM_RESTART_COUNT" ] || unset MLITE_FAULT']"""


def launch_on(slurm: Slurm, *words: str, faults: str = "") -> Result:
    return slurm.run([PYTHON, "-m", "launch", *words], timeout=60, env={"MLITE_FAULT": faults})


def submit(slurm: Slurm, tiny: TinyRuns, folder: Path, *flags: str, faults: str = "") -> list[int]:
    """Submit the tiny model on two nodes, one rank on each; returns the jobs' numbers."""
    config = tiny_config(folder, tiny.data, **{f"parallel__{key}": value for key, value in tiny.parallel.items()})
    words = ["run", str(config), "--via=slurm", "--nodes=2", "--launch.tp_across_hosts=true", *flags]
    return [int(job) for job in launch_on(slurm, *words, faults=faults).expect(exit_code=0).stdout.split()]


def output(run_dir: Path, job: int) -> str:
    path = run_dir / f"logs/slurm-{job}.out"
    return path.read_text() if path.exists() else ""


def queued_again(slurm: Slurm, job: int) -> None:
    """Wait until a job has gone back to the queue; it starts some 10 s later (see tests/kit/slurm.py)."""
    eventually(lambda: slurm.job(job)["Restarts"] == "1", f"{job} is queued again", LIMIT, every=0.2)
