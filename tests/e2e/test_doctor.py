"""``launch doctor`` on real hosts: quiet where all is well, and one line with its fix for each thing that is not."""

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from tests.kit.cluster import Cluster
from tests.kit.jobs import PYTHON, REPOSITORY, Result, run_job
from tests.kit.tiny import tiny_config, tiny_data


@pytest.fixture
def hosts(cluster: Cluster) -> Cluster:
    if cluster.kind != "namespaces":
        pytest.skip("hosts with names and networks of their own need namespaces: run as root on Linux")
    return cluster


def doctor(cluster: Cluster, folder: Path, *flags: str, count: int = 2) -> Result:
    """Run on node0, in the repository, with the run folder in ``folder``."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in cluster.hosts[:count]))
    argv = [PYTHON, "-m", "launch", "doctor", f"--hostfile={hostfile}", *flags]
    return cluster.run(0, argv, timeout=280, env={"PYTHONPATH": str(REPOSITORY)}, cwd=folder)


def inside(cluster: Cluster, index: int, *argv: str) -> None:
    subprocess.run(cluster.argv(index, argv), check=True, timeout=20)


@contextlib.contextmanager
def bound(cluster: Cluster, index: int, source: Path, target: Path, *options: str) -> Iterator[None]:
    """``target`` is something else on one host."""
    inside(cluster, index, "mount", "--bind", str(source), str(target))
    try:
        if options:
            inside(cluster, index, "mount", "-o", ",".join(("remount", "bind", *options)), str(target))
        yield
    finally:
        inside(cluster, index, "umount", "-l", str(target))


def errors(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_healthy_hosts_are_ready(hosts: Cluster, tmp_path: Path) -> None:
    result = doctor(hosts, tmp_path, "--json", count=3).expect(exit_code=0)
    assert not errors(result)
    told = json.loads(result.stdout)
    assert told["exit_code"] == 0
    assert [told["hosts"][name]["hostname"] for name in hosts.hosts] == hosts.hosts
    assert [pair[:2] for pair in told["bandwidth"]["pairs"]] == [[0, 1], [1, 2]]
    assert all(speed > 1e6 for *_, speed in told["bandwidth"]["pairs"])
    assert [path.name for path in tmp_path.iterdir()] == ["hostfile"]


@pytest.mark.slow
def test_a_misleading_own_name_works_and_a_slow_link_is_named(hosts: Cluster, tmp_path: Path) -> None:
    for index, name in enumerate(hosts.hosts[:2]):
        names = hosts.folder_of(index) / "etc/hosts"
        names.write_text(names.read_text().replace(f"{hosts.addresses[index]} {name}", f"127.0.1.1 {name}"))
    hosts.shape(1, "100mbit")
    result = doctor(hosts, tmp_path, "--timeout=40").expect(exit_code=0, stdout="bandwidth +warning +all: 0.0")
    assert not errors(result)
    for name in hosts.hosts[:2]:
        trap = f"warning: {name}: its own name {name} leads to 127.0.1.1, where no other host can connect"
        assert f"{trap}; launch run sets GLOO_SOCKET_IFNAME=eth0 and NCCL_SOCKET_IFNAME=eth0 there" in result.stderr
    slow = r"warning: node0 and node1: 0\.0\d GB/s, expected 0\.25: a fifth of a link of 10 Gbit/s; look at"
    assert re.search(slow, result.stderr)


def replaced(path: Path, old: str, new: str) -> None:
    """In place: the hosts see this very file."""
    path.write_text(path.read_text().replace(old, new))


@contextlib.contextmanager
def unknown_name(hosts: Cluster, folder: Path) -> Iterator[None]:
    replaced(hosts.folder_of(0) / "etc/hosts", "node1", "node9")
    yield


@contextlib.contextmanager
def no_ssh_server(hosts: Cluster, folder: Path) -> Iterator[None]:
    hosts.kill_host(1)
    yield


@contextlib.contextmanager
def unknown_key(hosts: Cluster, folder: Path) -> Iterator[None]:
    known = hosts.folder / "known_hosts"
    kept = known.read_text()
    known.write_text("")
    try:
        yield
    finally:
        known.write_text(kept)


@contextlib.contextmanager
def password_wanted(hosts: Cluster, folder: Path) -> Iterator[None]:
    keys = hosts.folder / "id.pub"
    kept = keys.read_text()
    keys.write_text("")
    try:
        yield
    finally:
        keys.write_text(kept)


@contextlib.contextmanager
def link_cut(hosts: Cluster, folder: Path) -> Iterator[None]:
    hosts.cut(1)
    yield


@contextlib.contextmanager
def no_route(hosts: Cluster, folder: Path) -> Iterator[None]:
    """Between node1 and node2."""
    routes = {1: f"{hosts.addresses[2]}/32", 2: f"{hosts.addresses[1]}/32"}
    for index, to in routes.items():
        inside(hosts, index, "ip", "route", "add", "unreachable", to)
    try:
        yield
    finally:
        for index, to in routes.items():
            inside(hosts, index, "ip", "route", "del", "unreachable", to)


@contextlib.contextmanager
def taken_for_itself(hosts: Cluster, folder: Path) -> Iterator[None]:
    replaced(hosts.folder_of(1) / "etc/hosts", f"{hosts.addresses[0]} node0", "127.0.0.1 node0")
    yield


@contextlib.contextmanager
def other_torch(hosts: Cluster, folder: Path) -> Iterator[None]:
    file = next(path for path in metadata.files("torch") or [] if path.name == "METADATA")
    changed = folder.parent / f"{folder.name}.metadata"
    changed.write_text(re.sub(r"(?m)^Version: .*$", "Version: 1.0", file.read_text(), count=1))
    with bound(hosts, 1, changed, Path(str(file.locate()))):
        yield


@contextlib.contextmanager
def read_only(hosts: Cluster, folder: Path) -> Iterator[None]:
    with bound(hosts, 1, folder, folder, "ro"):
        yield


@contextlib.contextmanager
def unshared(hosts: Cluster, folder: Path) -> Iterator[None]:
    (other := folder.parent / f"{folder.name}.other").mkdir()
    with bound(hosts, 1, other, folder):
        yield


@contextlib.contextmanager
def small_shm(hosts: Cluster, folder: Path) -> Iterator[None]:
    inside(hosts, 1, "mount", "-o", "remount,size=1m", "/dev/shm")
    try:
        yield
    finally:
        inside(hosts, 1, "mount", "-o", "remount,size=50%", "/dev/shm")


@contextlib.contextmanager
def few_files(hosts: Cluster, folder: Path) -> Iterator[None]:
    server = psutil.Process(min(pid for pid in hosts.servers(1) if psutil.Process(pid).name() == "sshd"))
    kept = server.rlimit(psutil.RLIMIT_NOFILE)
    server.rlimit(psutil.RLIMIT_NOFILE, (200, kept[1]))
    try:
        yield
    finally:
        server.rlimit(psutil.RLIMIT_NOFILE, kept)


@contextlib.contextmanager
def port_taken(hosts: Cluster, folder: Path) -> Iterator[None]:
    code = "import socket, time; s = socket.create_server(('', 29777)); print('open', flush=True); time.sleep(60)"
    with hosts.start(0, [PYTHON, "-c", code], timeout=60) as job:
        job.wait_for("open")
        yield


SSH = "ssh: connect to host node1 port 2222: "
FAULTS = {  # what is done to the hosts; the exit code, and all errors and warnings, without their fixes' ends
    "names": (
        [unknown_name],
        5,
        ["error: node1: ssh: Could not .*; correct", "error: node0: does not know the name node1"],
    ),
    "ssh": ([no_ssh_server], 5, [f"error: node1: {SSH}Connection refused; start sshd there"]),
    "host key": ([unknown_key], 5, ["error: node1, node2: Host key verification failed; connect once by hand"]),
    "password": ([password_wanted], 5, [rf"error: node{n}: .*Permission denied \(.*; it would ask" for n in (1, 2)]),
    "link": ([link_cut], 5, [f"error: node1: {SSH}(No route to host|Connection timed out); is it up"]),
    "route": (
        [no_route],
        5,
        [
            "error: node1: cannot connect to node2: no route to host; look at cable",
            "error: node2: cannot connect to node1: no route to host; look at cable",
        ],
    ),
    "loopback": (
        [taken_for_itself],
        5,
        [
            "error: node1: resolves node0 to its own loopback address, 127.0.0.1; give",
            "error: node1: cannot connect to node0: connection refused; look",
        ],
    ),
    "one host unlike the others": (
        [other_torch, small_shm, few_files, unshared],
        2,
        [
            r"error: node1: has torch 1.0, others torch 2\.\S+; install it for /",
            "error: node1: /dev/shm has 1 MiB free of 1 MiB; remove what fills it, or in a container: --shm-size",
            "error: node1: .* is not the same folder; put it on a file system all share",
            "warning: node1: ulimit -n is 200, 3 ranks may open 280 files; raise it",
        ],
    ),
    "read-only": ([read_only], 7, ["error: node1: .* cannot be used: Read-only file system; let the user write there"]),
    "port": (
        [port_taken],
        2,
        [r"error: node0: port 29777 of node0 is in use by pid \d+ \(python.*\); give another --rdzv"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_one_line(hosts: Cluster, tmp_path: Path, name: str) -> None:
    faults, code, wanted = FAULTS[name]
    ssh = {"options": ["ConnectTimeout=3"]}
    config = tiny_config(tmp_path, tmp_path / "data", train__global_batch_size=12, launch__ssh=ssh)
    with contextlib.ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault(hosts, tmp_path))
        result = doctor(hosts, tmp_path, str(config), "--bandwidth=false", "--rdzv=node0:29777", count=3)
    result.expect(exit_code=code)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("doctor: ")]
    assert len(lines) == len(wanted), result.stderr
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.match(pattern, line), line
    assert not list(tmp_path.glob(".doctor*"))


def test_a_checkpoint_that_does_not_fit_is_told_before_the_run(hosts: Cluster, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "data", model__hidden_size=65536, model__num_layers=1000)
    result = doctor(hosts, tmp_path, str(config), "--bandwidth=false")
    result.expect(exit_code=7, stderr=r"error: .* free; a checkpoint takes [\d.,]+ TiB, 10 kept and one being written ")
    assert not (tmp_path / "run").exists()


def test_an_all_reduce_that_fails_is_told_in_its_own_words(tmp_path: Path) -> None:
    argv = [PYTHON, "-m", "launch", "doctor", "--nproc=2"]
    env = {"GLOO_SOCKET_IFNAME": "nope0"}
    result = run_job(argv, timeout=60, env=env, cwd=tmp_path).expect(exit_code=5, stdout="bandwidth +ERROR\n$")
    (error,) = errors(result)
    assert re.match(r"error: all-reduce: rank \d \(.*\) ended with exit code 1 .*nope0.*; is it the interface", error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["environment", "config"])
def test_more_threads_than_cores_are_told(tmp_path: Path, where: str) -> None:
    argv = [PYTHON, "-m", "launch", "doctor", "--nproc=2", "--bandwidth=false"]
    if where == "config":
        variables = {"OMP_NUM_THREADS": "5000"}
        argv.insert(4, str(tiny_config(tmp_path, tiny_data(tmp_path), launch__env=variables)))
    env = {"OMP_NUM_THREADS": "5000" if where == "environment" else "1"}
    result = run_job(argv, timeout=60, env=env, cwd=tmp_path).expect(exit_code=0, stdout="threads +warning")
    told = (
        r"warning: OMP_NUM_THREADS=5000 in 2 ranks: 10000 threads share \d+ cores?; --launch.env.OMP_NUM_THREADS=\d+ is"
    )
    assert re.search(told, result.stderr)
