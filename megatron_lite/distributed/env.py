"""The rank variables of every launcher, read here and nowhere else.

Standard library only. Adding a launcher is one row in ``_DIALECTS``.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lite.errors import ConfigError


@dataclass(frozen=True)
class _Dialect:
    """The variables with which one launcher describes a rank, and one (``mark``) that only this launcher sets."""

    name: str
    mark: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    mpi: bool = False


# The innermost first: torchrun may run inside srun, mpirun inside a Slurm allocation.
_DIALECTS = (
    _Dialect("torchrun", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _Dialect("deepspeed", "CROSS_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    _Dialect(
        "Open MPI",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        mpi=True,
    ),
    _Dialect("MPICH", "MPI_LOCALNRANKS", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", mpi=True),
    # Only inside a step: a batch script also has SLURM_PROCID=0, but is no rank.
    _Dialect(
        "srun", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
    ),
    _Dialect("the environment", "RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)
_JOBS = ("MLITE_JOB", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "PMIX_NAMESPACE")  # "none" is torchrun's default
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMIX_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Rank:
    """One process of a job, as described by its launcher. ``attempt``: the number of automatic restarts so far.

    ``launcher``: whose variables were read. ``rendezvous``: address and port at which ranks meet; None if they agree
    over MPI (``mpi``) or there is only one rank. ``job``: the name of the job, the same on all ranks, if known.
    ``relay``: a pipe from the shim around this rank (``launch/watch/rank.py``), which writes a byte when it passes a
    signal on.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "localhost"
    attempt: int = 0
    faults: str = ""
    job: str = ""
    launcher: str = "python"
    mpi: bool = False
    rendezvous: tuple[str, int] | None = None
    relay: int | None = None


def read_rank(environ: Mapping[str, str] | None = None) -> Rank:
    """This process's rank in the job; a single process if no launcher's variables are set.

    Raises ConfigError if a launcher's variables are incomplete, or those of two launchers contradict each other.
    """
    environ = os.environ if environ is None else environ
    found = [dialect for dialect in _DIALECTS if dialect.mark in environ]
    common = {
        "host": socket.gethostname(),
        "attempt": int(environ.get("MLITE_ATTEMPT", "0") or 0),
        "faults": environ.get("MLITE_FAULT", ""),
        "relay": int(environ["MLITE_RELAY"]) if "MLITE_RELAY" in environ else None,
        "job": next((environ[name] for name in _JOBS if environ.get(name, "none") != "none"), ""),
    }
    rank, size, local_rank, local_size = _place(found[0], environ) if found else (0, 1, 0, 1)
    if environ.get("MLITE_RANKS", str(size)) != str(size):
        raise ConfigError(
            f"this host's launcher expects {environ['MLITE_RANKS']} ranks in all, but {size} were started: "
            "--nodes and --nproc must be the same on all hosts, and no option of srun may change the number of ranks"
        )
    if not found:
        return Rank(**common)  # type: ignore[arg-type]
    inner, *others = found
    for outer in others:
        theirs = environ.get(outer.rank, ""), environ.get(outer.size, "")
        # The same ranks in another order, or RANK and WORLD_SIZE left over in a shell.
        left_over = outer.rank == "RANK" and theirs != (str(rank), str(size))
        if left_over or (theirs[1] == str(size) and theirs[0] != str(rank)):
            raise ConfigError(
                f"two launchers disagree about this process: {inner.name} says {_told(inner, environ)}, "
                f"{outer.name} {_told(outer, environ)}; unset what is left over"
            )
    return Rank(
        rank,
        size,
        local_rank,
        local_size,
        **common,  # type: ignore[arg-type]
        launcher=inner.name,
        mpi=inner.mpi,
        rendezvous=_rendezvous(inner, environ) if size > 1 else None,
    )


def _place(dialect: _Dialect, environ: Mapping[str, str]) -> tuple[int, int, int, int]:
    names = (dialect.rank, dialect.size, dialect.local_rank, dialect.local_size)
    values = {name: environ.get(name, "") for name in names}
    if dialect.name == "srun":
        values[dialect.local_size] = _tasks_here(environ)
    missing = [name for name, value in values.items() if not (value.isascii() and value.isdigit())]
    if missing:
        raise ConfigError(f"started by {dialect.name}, but {', '.join(missing)} is missing or not a number")
    rank, size, local_rank, local_size = map(int, values.values())
    if not (rank < size and local_rank < local_size <= size):
        raise ConfigError(f"started by {dialect.name} with impossible numbers: {_told(dialect, environ)}")
    return rank, size, local_rank, local_size


def _told(dialect: _Dialect, environ: Mapping[str, str]) -> str:
    names = (dialect.rank, dialect.size, dialect.local_rank, dialect.local_size)
    return ", ".join(f"{name}={environ.get(name, '')}" for name in names)


def _tasks_here(environ: Mapping[str, str]) -> str:
    """The number of tasks of the step on this node, from ``2(x3),1`` and the node's index."""
    counts: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [count] * int(times or 1)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else ""


def _rendezvous(dialect: _Dialect, environ: Mapping[str, str]) -> tuple[str, int] | None:
    """MASTER_ADDR and MASTER_PORT; under srun without them, the step's first node and a port derived from the job
    id."""
    address, port = environ.get("MASTER_ADDR", "").strip(), environ.get("MASTER_PORT", "")
    if address and port.isascii() and port.isdigit() and 0 < int(port) < 65536:
        return address, int(port)
    if address or port:
        wanted = "MASTER_ADDR (a host) and MASTER_PORT (1 to 65535)"
        raise ConfigError(
            f"started by {dialect.name} with MASTER_ADDR={address!r}, MASTER_PORT={port!r}: need {wanted}"
        )
    if dialect.mpi:
        return None
    if dialect.name == "srun":
        first = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", environ.get("SLURM_STEP_NODELIST", ""))
        job = environ.get("SLURM_JOB_ID", "")
        if first and job.isdecimal():
            step = environ["SLURM_STEP_ID"]
            number = int(job) * 7 + (int(step) if step.isdecimal() else 0)
            return "".join(part or "" for part in first.groups()), 20000 + number % 12000
    raise ConfigError(f"started by {dialect.name} without MASTER_ADDR and MASTER_PORT: no place to meet")


def started_by_mpi(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``mpirun`` (Open MPI, MPICH, Intel MPI, PMIx) started this process with at least one peer."""
    environ = os.environ if environ is None else environ
    return any(environ.get(name, "").isdigit() and int(environ[name]) > 1 for name in _MPI_SIZES)


def export_for_deepspeed(device: str, index: int | None) -> None:
    """Set the variables that DeepSpeed reads at import: its accelerator, and LOCAL_RANK, which it uses as the GPU
    index. It also requires Open MPI's local rank to have the same value."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    mpi = "OMPI_COMM_WORLD_LOCAL_RANK"
    if index is None:
        os.environ.setdefault("LOCAL_RANK", os.environ.get(mpi, "0"))
    else:
        os.environ["LOCAL_RANK"] = str(index)
        if mpi in os.environ:
            os.environ[mpi] = str(index)
