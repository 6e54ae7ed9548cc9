"""The launcher contract: the rank variables of every launcher, read here and nowhere else.

Standard library only. Adding a launcher is one row in ``_DIALECTS``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lite.errors import ConfigError

# dialect: rank, world size, local rank, local world size
_DIALECTS: dict[str, tuple[str, str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
}
_JOBS = ("MLITE_JOB", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "PMIX_NAMESPACE")  # "none" is torchrun's default
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMIX_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Rank:
    """One process of a job, as its launcher described it. ``attempt`` counts automatic restarts from 0.

    ``job``: what all ranks of one job have been told it is called, if anything; ``master_port``: where they meet.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "localhost"
    attempt: int = 0
    faults: str = ""
    job: str = ""
    master_port: int = 0


def read_rank(environ: Mapping[str, str] | None = None) -> Rank:
    """This process's place in the job; one process on its own when no launcher's variables are there.

    Raises ConfigError when a launcher's variables are incomplete or contradict each other.
    """
    environ = os.environ if environ is None else environ
    rank, size, local_rank, local_size = 0, 1, 0, 1
    for dialect, names in _DIALECTS.items():
        if names[0] not in environ:
            continue
        missing = [n for n in names if not environ.get(n, "").isdigit()]
        if missing:
            raise ConfigError(f"started by {dialect}, but {', '.join(missing)} is missing or not a number")
        rank, size, local_rank, local_size = (int(environ[n]) for n in names)
        if not (rank < size and local_rank < local_size <= size):
            numbers = ", ".join(f"{name}={environ[name]}" for name in names)
            raise ConfigError(f"started by {dialect} with impossible numbers: {numbers}")
        break
    return Rank(
        rank,
        size,
        local_rank,
        local_size,
        host=socket.gethostname(),
        attempt=int(environ.get("MLITE_ATTEMPT", "0") or 0),
        faults=environ.get("MLITE_FAULT", ""),
        job=next((environ[name] for name in _JOBS if environ.get(name, "none") != "none"), ""),
        master_port=int(environ.get("MASTER_PORT", "0") or 0),
    )


def started_by_mpi(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``mpirun`` (Open MPI, MPICH, Intel MPI, PMIx) started this process with at least one peer."""
    environ = os.environ if environ is None else environ
    return any(environ.get(name, "").isdigit() and int(environ[name]) > 1 for name in _MPI_SIZES)


def export_for_deepspeed(device: str, local_rank: int) -> None:
    """Write the variables that DeepSpeed reads, where the launcher did not; before it is imported."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    os.environ.setdefault("DS_ACCELERATOR", device)
