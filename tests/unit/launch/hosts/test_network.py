"""Which interface leads where: on this machine as it is, and under names that mislead."""

import socket
from collections.abc import Callable

import pytest

from launch.hosts import network
from launch.hosts.hostfile import Host
from launch.hosts.job import Job
from launch.hosts.network import HOSTS, interface_env


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have names resolve to these addresses, where this machine's are 10.0.0.1 on eth0 and a loopback."""
    monkeypatch.setattr(socket, "gethostname", lambda: "me")
    monkeypatch.setattr(network, "addresses", lambda: {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]})

    def set_names(**known: list[str]) -> None:
        monkeypatch.setattr(network, "resolve", lambda name: known.get(name, []))
        ways = {name: "eth0" for name, found in known.items() if not network.is_loopback(found[0])}
        monkeypatch.setattr(network, "interface_toward", lambda name: ways.get(name, ""))

    return set_names


SET = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}


@pytest.mark.parametrize(
    ("own", "given", "wanted"),
    [
        (["127.0.1.1"], {HOSTS: "me,other"}, SET),  # Debian's line
        ([], {HOSTS: "me,other"}, SET),  # no such name
        (["10.9.9.9"], {HOSTS: "me,other"}, SET),  # an address this machine no longer has
        (["10.0.0.1"], {HOSTS: "me,other"}, {}),
        (["10.9.9.9", "10.0.0.1"], {HOSTS: "me,other"}, {}),
        (["127.0.1.1"], {}, {}),  # one host: loopback is right
        (["127.0.1.1"], {HOSTS: "me"}, {}),  # no way out is known
        (["127.0.1.1"], {HOSTS: "other", "GLOO_SOCKET_IFNAME": "ib0"}, {"NCCL_SOCKET_IFNAME": "eth0"}),
        (["127.0.1.1"], {HOSTS: "other", "GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "ib0"}, {}),
    ],
)
def test_ranks_are_told_only_where_their_name_misleads(names, own: list[str], given, wanted) -> None:
    names(**({"me": own} if own else {}), other=["10.0.0.2"])
    assert interface_env(given) == wanted


def test_the_hosts_of_a_job_are_known_to_its_ranks() -> None:
    hosts = (Host("me@a", 1), Host("b", 1), Host("c", 1))
    job = Job((), hosts, run_dir=None, rendezvous=("a.site", 29500))  # type: ignore[arg-type]
    assert job.rank_env[HOSTS] == "a.site,a,b"
    assert HOSTS not in Job((), hosts[:1], run_dir=None).rank_env  # type: ignore[arg-type]


def test_this_machine_has_a_loopback_and_finds_it() -> None:
    assert "127.0.0.1" in network.addresses()["lo"]
    assert network.interface_toward("127.0.0.1") == ""
    assert network.resolve("127.0.0.1") == ["127.0.0.1"]
    assert network.resolve("no such name") == network.resolve("a" * 300) == []
    assert network.speed("lo") == network.speed("../../etc") == 0
