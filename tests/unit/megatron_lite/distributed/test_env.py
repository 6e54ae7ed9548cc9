"""The rank variables of every launcher, as they come and as they go wrong."""

import os

import pytest

from megatron_lite.distributed.env import Rank, export_for_deepspeed, read_rank
from megatron_lite.errors import ConfigError

MEET = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
BARE = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MEET}
TORCHRUN = {**BARE, "TORCHELASTIC_RUN_ID": "x"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_SIZE": "2", **MEET}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "5",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu-[07-08],login",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
BATCH = {"SLURM_JOB_ID": "1234", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}


def place(rank: Rank) -> tuple[int, int, int, int]:
    return rank.rank, rank.size, rank.local_rank, rank.local_size


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        (DEEPSPEED, "deepspeed"),
        (OPEN_MPI, "Open MPI"),
        (MPICH, "MPICH"),
        (SRUN, "srun"),
        (BARE, "the environment"),
        ({**TORCHRUN, **SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "torchrun"),
        ({**OPEN_MPI, **BATCH}, "Open MPI"),
        ({**OPEN_MPI, **BARE}, "Open MPI"),
        ({**BARE, **BATCH}, "the environment"),
    ],
)
def test_every_launcher_gives_the_same_place(environ: dict[str, str], launcher: str) -> None:
    rank = read_rank(environ)
    assert place(rank) == (5, 8, 1, 4)
    assert rank.launcher == launcher
    assert rank.mpi == (launcher in ("Open MPI", "MPICH"))


@pytest.mark.parametrize("environ", [{}, BATCH, {"MASTER_ADDR": "x"}, {"OMPI_MCA_x": "1", "PMIX_VERSION": "5"}])
def test_without_a_launcher_there_is_one_rank(environ: dict[str, str]) -> None:
    assert place(read_rank(environ)) == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "started by the environment, but WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE is missing"),
        ({**TORCHRUN, "RANK": "8"}, "started by torchrun with impossible numbers: RANK=8, WORLD_SIZE=8"),
        ({**TORCHRUN, "RANK": "٣"}, "RANK is missing or not a number"),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "two launchers disagree about this process: Open MPI says"),
        ({**SRUN, "RANK": "4", "WORLD_SIZE": "8"}, "the environment RANK=4, WORLD_SIZE=8"),
        ({**TORCHRUN, **MPICH, "PMI_RANK": "4"}, "torchrun says RANK=5, .*, MPICH PMI_RANK=4, PMI_SIZE=8"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": ""}, "started by srun, but SLURM_STEP_TASKS_PER_NODE is missing"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR='', MASTER_PORT='29500': need MASTER_ADDR"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT='0'"),
        ({k: v for k, v in TORCHRUN.items() if k not in MEET}, "no place to meet"),
        ({"MLITE_RANKS": "4"}, "this host's launcher expects 4 ranks in all, but 1 were started: --nodes and"),
        (
            {**TORCHRUN, "MLITE_RANKS": "4"},
            "this host's launcher expects 4 ranks in all, but 8 were started: --nodes and",
        ),
    ],
)
def test_sets_that_cannot_be_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rank(environ)


def test_where_ranks_meet() -> None:
    assert read_rank(TORCHRUN).rendezvous == ("node0", 29500)
    assert read_rank(OPEN_MPI).rendezvous is None
    assert read_rank({**OPEN_MPI, **MEET}).rendezvous == ("node0", 29500)
    address, port = read_rank(SRUN).rendezvous or ("", 0)
    assert address == "gpu-07"
    assert 20000 <= port < 32000
    assert read_rank({**SRUN, "SLURM_STEP_ID": "1"}).rendezvous != (address, port)
    assert (read_rank({**SRUN, "SLURM_STEP_NODELIST": "a-1.x,b[1-2]"}).rendezvous or ("",))[0] == "a-1.x"


@pytest.mark.parametrize(
    ("given", "index", "local_rank"),
    [
        ({"LOCAL_RANK": "3"}, None, "3"),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3"}, None, "3"),
        ({"LOCAL_RANK": "3"}, 0, "0"),  # it sees one GPU, its own
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3"}, 0, "0"),
    ],
)
def test_deepspeed_is_told_the_gpu(
    given: dict[str, str], index: int | None, local_rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    export_for_deepspeed("cuda", index)
    assert {os.environ[name] for name in {"LOCAL_RANK", *given}} == {local_rank}
