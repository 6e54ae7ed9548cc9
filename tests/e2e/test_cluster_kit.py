"""The hosts that other tests launch on are hosts: names, ssh, Slurm, cables, crashes, and nothing left behind."""

import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.kit.cluster import Cluster
from tests.kit.hosts import Unavailable, eventually
from tests.kit.jobs import PYTHON, REPOSITORY
from tests.kit.mpi import mpich

ALL_REDUCE = """
import socket, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()}: {total.item():g}", flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module", params=["namespaces", "loopback"])
def two(request):
    """Two hosts of each kind."""
    try:
        with Cluster(2, request.param) as cluster:
            yield cluster
    except Unavailable as error:
        pytest.skip(str(error))


def test_ssh_leads_from_host_to_host(two):
    here, there = two.hosts
    result = two.run(0, ["ssh", there, "hostname; echo $SSH_CONNECTION; ssh -V"], timeout=20).expect(exit_code=0)
    name, connection = result.stdout.splitlines()
    assert connection.split()[2] == two.addresses[1]
    if two.kind == "namespaces":
        assert name == there
        nested = two.run(0, ["ssh", there, "ssh", here, "hostname"], timeout=20)  # without a shim on its PATH
        nested.expect(exit_code=0, stdout=f"^{here}\n$")


def test_an_unknown_host_key_is_refused(two):
    known = two.folder / "known_hosts"
    kept = known.read_text()
    try:
        known.write_text("")
        refused = two.run(0, ["ssh", two.hosts[1], "true"], timeout=20)
        refused.expect(exit_code=255, stderr="Host key verification failed")
    finally:
        known.write_text(kept)


def test_a_killed_host_takes_its_processes_along_and_comes_back(two):
    with two.start(0, ["ssh", two.hosts[1], "echo started; sleep 100"], timeout=20) as job:
        job.wait_for("started")
        assert any("sleep" in process.name() for process in two.processes(1))
        two.kill_host(1)
        job.finish().expect(exit_code=255)
    assert not two.processes(1)
    two.run(0, ["ssh", two.hosts[1], "true"], timeout=20).expect(exit_code=255)
    two.revive_host(1)
    two.run(0, ["ssh", two.hosts[1], "true"], timeout=20).expect(exit_code=0)


def test_what_a_job_starts_over_ssh_counts_as_its_own(two):
    left = two.run(0, ["ssh", two.hosts[1], "sleep 100 >/dev/null 2>&1 </dev/null &"], timeout=20)
    assert left.exit_code == 0
    assert any("sleep 100" in orphan for orphan in left.orphans)


def test_a_cut_link_swallows_what_is_sent(cluster):
    connect = f"import socket; socket.create_connection(({cluster.addresses[1]!r}, 2222), timeout=1)"
    cluster.cut(1)
    cut = cluster.run(0, [PYTHON, "-c", connect], timeout=20)
    cut.expect(exit_code=1, stderr="timed out|No route to host", traceback=True)
    cluster.heal(1)
    cluster.run(0, [PYTHON, "-c", connect], timeout=20).expect(exit_code=0)


def test_a_shaped_link_takes_its_time(cluster):
    send = ["sh", "-c", f"head -c 1000000 /dev/zero | ssh {cluster.hosts[1]} 'cat >/dev/null'"]
    cluster.shape(0, "8mbit")
    assert cluster.run(0, send, timeout=20).expect(exit_code=0).seconds > 0.7  # of 1 s; the first 256 KB pass at once
    cluster.shape(0, None)
    assert "tbf" not in cluster.run(0, ["tc", "qdisc", "show", "dev", "eth0"], timeout=20).expect(exit_code=0).stdout


def test_reset_ends_what_runs_and_mends_what_is_broken(cluster):
    names = cluster.folder_of(0) / "etc/hosts"
    with cluster.start(0, ["sleep", "100"], timeout=20) as job:
        cluster.kill_host(1, silently=True)
        names.write_text("nothing\n")
        cluster.reset()
        assert job.finish().exit_code == -signal.SIGKILL
    cluster.run(0, ["ssh", cluster.hosts[1], "true"], timeout=20).expect(exit_code=0)


@pytest.mark.parametrize("kind", ["namespaces", "loopback"])
@pytest.mark.parametrize("end", [pytest.param("closed", marks=pytest.mark.slow), "killed"])
def test_nothing_of_a_cluster_outlives_its_test_run(kind, end, tmp_path):
    program = f"""
import os, signal
from tests.kit.cluster import Cluster, Unavailable
try:
    with Cluster(2, {kind!r}) as cluster, cluster.start(1, ["setsid", "sleep", "100"], timeout=100) as job:
        print(cluster.folder, *(cluster._members[1].servers), job.pid, flush=True)
        if {end == "killed"}:
            os.kill(os.getpid(), signal.SIGKILL)
except Unavailable as error:
    print("unavailable", error)
"""
    told = subprocess.run([PYTHON, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60).stdout
    if told.startswith("unavailable"):
        pytest.skip(told)
    folder, *pids = told.split()
    assert len(pids) >= 2
    eventually(lambda: not Path(folder).exists(), f"{folder} is gone")
    alive = {process.pid for process in psutil.process_iter() if process.status() != psutil.STATUS_ZOMBIE}
    assert not alive & set(map(int, pids))
    names = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [name for name in names if folder in name]


def test_srun_spans_nodes(slurm):
    argv = ["srun", "-N2", "--ntasks-per-node=1", "sh", "-c", "echo $SLURM_PROCID $SLURM_NODEID $SLURMD_NODENAME"]
    shown = slurm.run(argv, timeout=20).expect(exit_code=0).stdout
    assert sorted(shown.splitlines()) == [f"{number} {number} {slurm.nodes[number]}" for number in range(2)]


def test_a_batch_job_runs_is_cancelled_and_leaves_its_output(slurm):
    job = slurm.submit("#!/bin/sh\nsrun hostname\nsleep 100\n", "-N2", "--gres=gpu:1", "--constraint=cpu")
    slurm.wait(job, "RUNNING")
    eventually(lambda: slurm.output(job).count("\n") == 2, "both nodes said their names")
    slurm.run(["scancel", str(job)], timeout=20).expect(exit_code=0)
    slurm.wait(job, "CANCELLED")


def test_slurm_notices_that_a_node_is_gone_and_is_back(slurm):
    slurm.kill_node(1)
    assert not slurm.cluster.processes(1)
    slurm.revive_node(1)
    slurm.run(["srun", "-N2", "-w", ",".join(slurm.nodes[:2]), "true"], timeout=30).expect(exit_code=0)


def test_mpich_spans_hosts(cluster, tmp_path):
    mpi, hosts = mpich(), tmp_path / "hosts"
    hosts.write_text("".join(f"{host}:1\n" for host in cluster.hosts[:2]))
    program = "from mpi4py import MPI; world = MPI.COMM_WORLD; sent = world.bcast(world.rank)\n"
    program += "print(f'{world.rank} {world.size} {sent} {MPI.Get_library_version()[:5]}\\n', end='', flush=True)"
    argv = [mpi.mpiexec, "-f", str(hosts), "-n", "2", PYTHON, "-c", program]
    told = cluster.run(0, argv, timeout=30, env=mpi.env).expect(exit_code=0).stdout
    assert sorted(told.split("\n")) == ["", "0 2 0 MPICH", "1 2 0 MPICH"]


@pytest.mark.slow
def test_torchrun_by_hand_reduces_across_two_hosts(cluster, tmp_path):
    (tmp_path / "reduce.py").write_text(ALL_REDUCE)
    endpoint = f"--rdzv-endpoint={cluster.addresses[0]}:29400"
    argv = [PYTHON, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", endpoint]
    argv += ["--rdzv-id=kit", str(tmp_path / "reduce.py")]
    interface = {"GLOO_SOCKET_IFNAME": "lo"} if cluster.kind == "loopback" else {}
    with (
        cluster.start(0, argv, timeout=60, env=interface) as first,
        cluster.start(1, argv, timeout=60, env=interface) as second,
    ):
        told = first.finish().expect(exit_code=0).stdout + second.finish().expect(exit_code=0).stdout
    assert re.search(r"rank 0 of 2 on \S+: 3", told)
    assert re.search(r"rank 1 of 2 on \S+: 3", told)
    if cluster.kind == "namespaces":
        assert {f"node{index}" for index in range(2)} == set(re.findall(r"on (\S+):", told))
