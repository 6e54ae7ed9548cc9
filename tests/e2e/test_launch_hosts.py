"""One job over real hosts, started in every way there is: ranks where the plan says, and the same losses to the bit."""

import json
from pathlib import Path

import pytest

from tests.kit.cluster import Cluster
from tests.kit.jobs import PYTHON
from tests.kit.launches import launch, needs, no_leftovers, through
from tests.kit.mpi import mpich, open_mpi
from tests.kit.tiny import losses, short_config

BIN = Path(PYTHON).parent


def test_torchrun_over_two_hosts_trains_what_one_host_trains(
    cluster: Cluster, tmp_path: Path, data: Path, by_hand: dict[int, float]
) -> None:
    result = launch(cluster, tmp_path, "run", str(short_config(tmp_path, data))).expect(exit_code=0)
    assert "run: 2 ranks on 2 hosts through torchrun" in result.stderr
    assert "step 3  loss" in result.stdout
    assert losses(tmp_path / "run") == by_hand
    hosts = [json.loads((tmp_path / f"run/logs/rank_{rank}.exit.json").read_text())["host"] for rank in (0, 1)]
    assert cluster.kind == "loopback" or hosts == ["node0", "node1"]
    assert no_leftovers(cluster)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed", "Open MPI", "MPICH"])
def test_other_launchers_train_the_same(
    cluster: Cluster, tmp_path: Path, data: Path, by_hand: dict[int, float], name: str
) -> None:
    words = ["run", str(short_config(tmp_path, data)), *through(name, cluster)]
    result = launch(cluster, tmp_path, *words).expect(exit_code=0)
    assert "step 3  loss" in result.stdout
    assert losses(tmp_path / "run") == by_hand
    assert no_leftovers(cluster)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Open MPI", "MPICH", "deepspeed"])
def test_launchers_of_ones_own_train_the_same(
    cluster: Cluster, tmp_path: Path, data: Path, by_hand: dict[int, float], name: str
) -> None:
    """Where ranks meet is agreed on over MPI, or told by DeepSpeed; the trainer reads the variables of each."""
    hostfile = cluster.hostfile(tmp_path / "hosts", [1, 1])
    train = [PYTHON, "-m", "megatron_lite", "train", str(short_config(tmp_path, data))]
    if name == "deepspeed":
        needs("deepspeed", cluster)
        options = [f"--hostfile={hostfile}", "--no_ssh_check", "--master_addr=node0", "--no_local_rank", "--module"]
        argv, env = [str(BIN / "deepspeed"), *options, *train[2:]], {}
    else:
        needs("mpirun", cluster)
        mpi = open_mpi() if name == "Open MPI" else mpich()
        where = ["--host", "node0:1,node1:1"] if name == "Open MPI" else ["-hosts", "node0,node1"]
        argv, env = [mpi.mpiexec, "-n", "2", *where, *train], dict(mpi.env)
    with cluster.start(0, argv, timeout=110, env={"OMP_NUM_THREADS": "1", **env}) as job:
        job.finish(grace=10).expect(exit_code=0, traceback=True)  # Open MPI's ssh outlives its mpirun
    assert losses(tmp_path / "run") == by_hand


@pytest.mark.parametrize(
    "via",
    [
        "torchrun",
        "mpirun",
        "MPICH",
        pytest.param("deepspeed", marks=pytest.mark.slow),
        pytest.param("deepspeed openmpi", marks=pytest.mark.slow),
    ],
)
def test_every_rank_is_where_the_plan_has_it(cluster: Cluster, tmp_path: Path, via: str) -> None:
    """Uneven hosts, the last one first, one of its slots left out."""
    other = [f"--mpirun={mpich().mpiexec}"] if via == "MPICH" else []
    via, _, runner = ("mpirun" if via == "MPICH" else via).partition(" ")
    needs(via, cluster)
    other += [f"--runner={runner}"] if runner else []
    names = cluster.hosts
    hostfile = tmp_path / "hosts"
    slots = 2 if runner else 3  # it cannot leave one out
    hostfile.write_text(f"{names[1]} slots={slots}\n{names[0]} slots=1\n")
    other += [] if runner else [f"--exclude={names[1]}:1"]
    flags = [f"--hostfile={hostfile}", f"--via={via}", f"--dir={tmp_path}", *other]
    result = cluster.run(0, [PYTHON, "-m", "launch", "verify", *flags], timeout=100)
    result.expect(exit_code=0, stdout=f"{via}: 3 ranks on 2 hosts, each where the plan has it")
    assert no_leftovers(cluster)


def test_a_host_that_refuses_is_named(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    cluster.kill_host(1)
    launch(cluster, tmp_path, "run", str(short_config(tmp_path, data))).expect(
        exit_code=5,
        stderr=rf"error: host {cluster.hosts[1]} was lost, with rank 1: ssh: connect to host .* Connection refused",
        within=60,
    )
    assert no_leftovers(cluster)
