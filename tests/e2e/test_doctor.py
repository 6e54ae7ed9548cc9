"""``launch doctor`` on real hosts: quiet where all is well, and one line with its fix for each thing that is not."""

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.kit.cluster import Cluster
from tests.kit.jobs import PYTHON, REPOSITORY, Result


@pytest.fixture
def hosts(cluster: Cluster) -> Cluster:
    if cluster.kind != "namespaces":
        pytest.skip("hosts with names and networks of their own need namespaces: run as root on Linux")
    return cluster


def doctor(cluster: Cluster, folder: Path, *flags: str, count: int = 2, env: dict | None = None) -> Result:
    """Run on node0, in the repository, with the run folder in ``folder``."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in cluster.hosts[:count]))
    argv = [PYTHON, "-m", "launch", "doctor", f"--hostfile={hostfile}", *flags]
    return cluster.run(0, argv, timeout=110, env={"PYTHONPATH": str(REPOSITORY), **(env or {})}, cwd=folder)


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
