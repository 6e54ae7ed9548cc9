"""Hosts whose own name leads to 127.0.1.1, as Debian's installer writes it, and hosts without IPv4."""

from pathlib import Path

import pytest

from tests.kit.cluster import Cluster
from tests.kit.jobs import PYTHON, REPOSITORY, Result
from tests.kit.launches import launch, no_leftovers, through
from tests.kit.slurm import Slurm
from tests.kit.tiny import losses, short_config

LIMIT = 110
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("deepspeed", "Open MPI", "MPICH")]


def mislead(cluster: Cluster, count: int) -> None:
    """Debian's line in /etc/hosts, on the first ``count`` hosts."""
    if cluster.kind != "namespaces":
        pytest.skip("hosts with names of their own need namespaces: run as root on Linux")
    for index, (name, address) in enumerate(zip(cluster.hosts[:count], cluster.addresses, strict=False)):
        names = cluster.folder_of(index) / "etc/hosts"
        names.write_text(names.read_text().replace(f"{address} {name}", f"127.0.1.1 {name}"))  # in place: it is mounted


def by_address(cluster: Cluster, folder: Path, *words: str) -> Result:
    """``launch`` with a hostfile of addresses instead of names."""
    hostfile = folder / "addresses"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in cluster.addresses))
    argv = [PYTHON, "-m", "launch", *words, f"--hostfile={hostfile}"]
    return cluster.run(0, argv, timeout=LIMIT, env={"OMP_NUM_THREADS": "1"})


def refused(result: Result, line: str) -> None:
    result.expect(exit_code=2, stdout="^$", within=30)
    assert result.stderr.splitlines()[1:] == [f"error: --via=mpirun: {line}"]  # after the line that says what is run


@pytest.mark.parametrize("name", ["torchrun", *SLOW])
def test_a_misleading_own_name_does_not_matter(
    cluster: Cluster, tmp_path: Path, data: Path, by_hand: dict[int, float], name: str
) -> None:
    mislead(cluster, 2)
    flags = through(name, cluster)
    launch(cluster, tmp_path, "run", str(short_config(tmp_path, data)), *flags).expect(exit_code=0)
    assert losses(tmp_path / "run") == by_hand
    assert no_leftovers(cluster)


@pytest.mark.slow
def test_a_misleading_own_name_does_not_matter_under_slurm(
    slurm: Slurm, tmp_path: Path, data: Path, by_hand: dict[int, float]
) -> None:
    mislead(slurm.cluster, 2)
    words = ["run", str(short_config(tmp_path, data)), "--via=slurm", "--nodes=2"]
    job = int(slurm.run([PYTHON, "-m", "launch", *words], timeout=60).expect(exit_code=0).stdout)
    slurm.wait(job, "COMPLETED", LIMIT)
    assert losses(tmp_path / "run") == by_hand


@pytest.mark.parametrize("name", ["torchrun", *SLOW[:2]])
def test_hosts_without_ipv4_train_the_same(
    six: Cluster, tmp_path: Path, data: Path, by_hand: dict[int, float], name: str
) -> None:
    flags = through(name, six)
    launch(six, tmp_path, "run", str(short_config(tmp_path, data)), *flags).expect(exit_code=0)
    assert losses(tmp_path / "run") == by_hand
    assert no_leftovers(six)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_a_hostfile_of_ipv6_addresses_and_misleading_names_work_together(
    six: Cluster, tmp_path: Path, data: Path, by_hand: dict[int, float], name: str
) -> None:
    mislead(six, 2)
    by_address(six, tmp_path, "run", str(short_config(tmp_path, data)), *through(name, six)).expect(exit_code=0)
    assert losses(tmp_path / "run") == by_hand
    assert no_leftovers(six)


def test_what_an_mpirun_cannot_do_with_ipv6_is_one_line(six: Cluster, tmp_path: Path, data: Path) -> None:
    words = ["run", str(short_config(tmp_path, data))]
    address = six.addresses[0]
    refused(
        by_address(six, tmp_path, *words, *through("Open MPI", six)),
        f"mpirun splits {address} at its colons; write the host's name in the hostfile",
    )
    refused(
        launch(six, tmp_path, *words, *through("MPICH", six)),
        f"MPICH connects hosts by IPv4, and node0 has {address} only; use Open MPI, --via=torchrun, or give it an "
        "IPv4 address",
    )
    assert no_leftovers(six)


def test_the_doctor_finds_hosts_without_ipv4(six: Cluster, tmp_path: Path) -> None:
    argv = [PYTHON, "-m", "launch", "doctor", f"--hostfile={six.hostfile(tmp_path / 'hosts')}", "--bandwidth=false"]
    result = six.run(0, argv, timeout=60, env={"PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path).expect(exit_code=0)
    hint = "set GLOO_SOCKET_IFNAME=eth0 and NCCL_SOCKET_IFNAME=eth0, or give the host an IPv4 address"
    said = [line for line in result.stderr.splitlines() if not line.startswith("doctor: ")]
    assert said == [
        f"warning: {host}: its name leads to IPv6 only ({address}); where ranks do not connect, {hint}"
        for host, address in zip(six.hosts, six.addresses, strict=True)
    ]
