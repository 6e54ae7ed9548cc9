"""Every check of the doctor, on hosts that are made up: health says nothing, and each thing wrong one line."""

import re
from dataclasses import replace

import pytest

from launch.doctor.checks import CHECKS, examine
from launch.doctor.doctor import exit_code, near, report
from launch.doctor.examination import Examination, Finding, amount
from launch.doctor.facts import Facts, Peer, left_visible
from launch.hosts.hostfile import Host

GIB = 1 << 30
HOSTS = (Host("node0", 2), Host("user@node1", 2), Host("node2", 2))
PEERS = {f"node{n}": Peer([f"10.0.0.{n}"], f"node{n}", "eth0") for n in range(3)}
VERSIONS = {"torch": "2.13.0", "deepspeed": None, "megatron_lite": "0.1.0"}
REDUCED = {"backend": "gloo", "latency": 1e-4, "all": 1e9, "pairs": [[0, 1, 1e9], [1, 2, 1e9]]}


def facts(number: int) -> Facts:
    return Facts(
        hostname=f"node{number}",
        own_address=f"10.0.0.{number}",
        python="3.12.1",
        executable="/env/bin/python",
        versions=VERSIONS,
        code="c0de",
        cores=8,
        gpus=0,
        rdma=False,
        shm_free=8 * GIB,
        shm_size=8 * GIB,
        limits={"nofile": 1024, "memlock": 65536, "nproc": -1},
        threads=100,
        peers=PEERS,
        speeds={"eth0": 10_000, "lo": 0},
        folder="",
        began=0.0,
        ended=0.0,
    )


HEALTHY = Examination(
    hosts=HOSTS,
    facts={host.name: facts(number) for number, host in enumerate(HOSTS)},
    seen=frozenset(host.name for host in HOSTS),
    folder="/runs",
    free=100 * GIB,
    links={("node0", "node2"): ""},
    omp=4,
    reduced=REDUCED,
)


def on(name: str, **changes) -> Examination:
    """The healthy case with one host's facts changed."""
    return replace(HEALTHY, facts={**HEALTHY.facts, name: replace(HEALTHY.facts[name], **changes)})


def everywhere(**changes) -> Examination:
    return replace(HEALTHY, facts={name: replace(known, **changes) for name, known in HEALTHY.facts.items()})


def silent(said: str) -> Examination:
    left = {name: known for name, known in HEALTHY.facts.items() if name != "node2"}
    return replace(HEALTHY, facts=left, silent={"node2": said}, reduced="not run")


def peer(name: str, other: str, changed: Peer) -> Examination:
    return on(name, peers={**PEERS, other: changed})


def limit(**changes: int) -> Examination:
    return on("node0", limits={"nofile": 1024, "memlock": 65536, "nproc": -1, **changes})


def reduced(*pairs: tuple[int, int, float], backend: str = "gloo", exam: Examination = HEALTHY) -> Examination:
    return replace(exam, reduced={**REDUCED, "pairs": pairs, "backend": backend})


TABLE: list[tuple[str, Examination, str]] = [  # a check, a exam, and its one error or warning
    ("ssh", silent("Host key verification failed"), "error: node2: Host key .*; connect once by hand"),
    ("ssh", silent("REMOTE HOST IDENTIFICATION HAS CHANGED: …"), "error: node2: REMOTE .*; if it was reinstalled"),
    ("ssh", silent("me@node2: Permission denied (publickey)"), "error: node2: .*; it would ask for a password"),
    ("ssh", silent("env: cannot change directory to '/x'"), "error: node2: .*; the code has to lie at the same path"),
    ("ssh", silent("env: '/e/python': No such file or directory"), "error: node2: .*; Python has to lie at the same"),
    (
        "ssh",
        silent("/e/python: No module named launch.doctor.facts"),
        "error: node2: .*; the same version of this project",
    ),
    ("ssh", silent("timed out: no answer within 60 s"), "error: node2: timed out.*; is it up, and is port 22 open"),
    ("ssh", silent("something new"), "error: node2: something new$"),
    ("names", peer("node0", "node2", Peer()), "error: node0: does not know the name node2; add it"),
    (
        "names",
        peer("node0", "node1", Peer(["127.0.0.1"])),
        r"error: node0: resolves node1 to its own loopback address, 127\.0\.0\.1; give",
    ),
    (
        "names",
        peer("node2", "node0", Peer(["10.0.0.0"])),
        r"warning: node2: no name belongs to 10\.0\.0\.0 \(node0\); ",
    ),
    ("interface", on("node0", own_address="127.0.1.1"), "warning: node0: .*sets GLOO_SOCKET_IFNAME=eth0 and NCCL_S"),
    (
        "interface",
        replace(on("node0", own_address="127.0.0.1", peers={}), reduced="not run"),
        "error: node0: .*no interface leads to the others",
    ),
    (
        "interface",
        on("node0", own_address="fd00::1"),
        r"warning: node0: its name leads to IPv6 only \(fd00::1\); .*eth0",
    ),
    (
        "versions",
        on("node2", python="3.11.0"),
        "error: node2: has Python 3.11.0, others Python 3.12.1; install it for /",
    ),
    ("versions", on("node2", versions={**VERSIONS, "torch": None}), "error: node2: has no torch, others torch 2.13.0"),
    (
        "versions",
        on("node0", versions={**VERSIONS, "deepspeed": "1"}),
        "error: node0: has deepspeed 1, others no deeps",
    ),
    (
        "versions",
        on("user@node1", code="0dd"),
        "error: user@node1: has code 0dd, others code c0de; copy the code there",
    ),
    (
        "versions",
        everywhere(versions={**VERSIONS, "torch": None}),
        "error: no torch for this Python; pip install torch",
    ),
    ("devices", replace(on("node0", cores=1), omp=1), "warning: node0: 2 slots share 1 core; slots=1 is faster"),
    (
        "devices",
        on("node0", gpus=8),
        "error: user@node1, node2: 2 slots but 0 GPUs; leave it out, or look at nvidia-smi",
    ),
    (
        "threads",
        replace(on("node2", cores=7), omp=4),
        "warning: node2: OMP_NUM_THREADS=4 in 2 ranks: 8 threads share 7 cores; "
        "--launch.env.OMP_NUM_THREADS=3 is faster$",
    ),
    ("clock", replace(HEALTHY, skew={"node2": -3.2}), "warning: node2: its clock is 3 s behind; run chrony"),
    ("clock", replace(HEALTHY, skew={"node2": 3600.0}), "error: node2: its clock is 3600 s ahead; run chrony"),
    ("shm", on("node0", shm_free=64 << 20, shm_size=64 << 20), "warning: node0: /dev/shm has 64 MiB .*--shm-size=1g"),
    (
        "shm",
        on("node0", shm_free=0),
        "error: node0: /dev/shm has 0 B free of 8 GiB; remove what fills it, or in a cont",
    ),
    (
        "limits",
        limit(nofile=63),
        "error: node0: ulimit -n is 63, 6 ranks may open 304 files; raise it in /etc/security",
    ),
    ("limits", limit(nofile=256), "warning: node0: ulimit -n is 256"),
    ("limits", limit(nproc=200), "warning: node0: ulimit -u is 200, 2 ranks with what runs need 236 threads"),
    ("limits", on("node0", rdma=True), "warning: node0: ulimit -l is 64 KiB, but its RDMA network pins memory"),
    ("folder", on("node0", folder="cannot be used: Permission denied"), "error: node0: /runs .*; let the user write"),
    (
        "folder",
        replace(HEALTHY, seen=frozenset({"node0", "node2"})),
        "error: user@node1: /runs .* put it on a file sys",
    ),
    (
        "folder",
        replace(HEALTHY, facts={}, reduced="not run", unusable="No space left on device"),
        "error: /runs cannot be used: No space",
    ),
    (
        "disk",
        replace(HEALTHY, checkpoint=200 * GIB),
        "error: /runs has 100 GiB .* 1 kept and one being written 400 GiB",
    ),
    (
        "disk",
        replace(HEALTHY, checkpoint=60 * GIB, keep=2),
        "warning: /runs has 100 GiB free; .* written 180 GiB; make",
    ),
    ("port", replace(HEALTHY, port="port 1 of node0 is in use"), "error: node0: port 1 of node0 is in use"),
    (
        "links",
        replace(HEALTHY, links={("node0", "node2"): "timed out"}),
        "error: node0: cannot connect to node2: timed",
    ),
    (
        "bandwidth",
        reduced((1, 2, 2e8)),
        r"warning: user@node1 and node2: 0\.20 GB/s, expected 0\.25: a fifth of a link of",
    ),
    (
        "bandwidth",
        reduced((0, 1, 1e9), backend="nccl", exam=everywhere(speeds={"eth0": 100_000})),
        r"warning: node0 and user@node1: 1\.00 GB/s, expected 2\.50: a fifth of a link of 100 Gbit/s",
    ),
    (
        "bandwidth",
        replace(HEALTHY, reduced="all-reduce: lost", failed=True),
        "error: all-reduce: lost; is it the interface",
    ),
]


@pytest.mark.parametrize(("check", "exam", "wanted"), TABLE)
def test_what_is_wrong_is_one_line_of_one_check(check: str, exam: Examination, wanted: str, capsys) -> None:
    findings = examine(exam)
    report(exam, findings)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(wanted, line), line
    assert [name for name, found in findings.items() if any(f.level != "note" for f in found)] == [check]
    assert exit_code(findings) == (CHECKS[check][0] if line.startswith("error") else 0)


def test_every_check_is_in_the_table() -> None:
    assert {check for check, _, _ in TABLE} == set(CHECKS)


def test_healthy_hosts_give_a_table_of_what_they_have(capsys) -> None:
    table = report(HEALTHY, examine(HEALTHY))
    assert capsys.readouterr().err == ""
    lines = dict(line.split(maxsplit=1) for line in table.splitlines())
    assert list(lines) == list(CHECKS)
    assert all(line.startswith("ok") for line in lines.values())
    assert lines["versions"].endswith("Python 3.12.1; torch 2.13.0; megatron_lite 0.1.0; code c0de")
    assert lines["devices"].endswith(" 8 cores, no GPU for 2 ranks")
    assert lines["threads"].endswith(" OMP_NUM_THREADS=4")
    assert "node0: 10.0.0.0 (eth0); user@node1: 10.0.0.1 (eth0)" in lines["interface"]
    assert "node0 and user@node1: 1.00 GB/s (at least 0.25 expected: a fifth of a link of 10 Gbit/s)" in table


def test_a_link_of_unknown_speed_is_measured_and_not_judged() -> None:
    exam = reduced((0, 1, 1.0), exam=on("user@node1", speeds={"eth0": 0}))
    assert examine(exam, ["bandwidth"])["bandwidth"][0] == Finding(
        "note", "node0 and user@node1: 0.00 GB/s (no expectation: the driver of eth0 reports no speed)"
    )


@pytest.mark.parametrize("chosen", ["eth0", "eth", "=eth0", "^docker0", "ib0,eth0"])
def test_an_interface_that_the_user_chose_is_right_where_it_exists(chosen: str) -> None:
    exam = replace(on("node0", own_address="127.0.1.1"), chosen={"GLOO_SOCKET_IFNAME": chosen})
    assert {finding.level for finding in examine(exam, ["interface"])["interface"]} == {"note"}


def test_the_first_failing_check_decides_the_exit_code() -> None:
    exam = replace(silent("timed out"), port="taken", checkpoint=200 * GIB)
    assert exit_code(examine(exam)) == 5
    assert exit_code(examine(replace(exam, silent={}))) == 7
    assert exit_code(examine(replace(exam, silent={}, checkpoint=0))) == 2


def test_what_no_host_could_be_asked_is_skipped() -> None:
    exam = replace(HEALTHY, facts={}, silent={host.name: "timed out" for host in HOSTS}, links={}, reduced="not run")
    states = dict(line.split()[:2] for line in report(exam, examine(exam)).splitlines())
    assert states.pop("ssh") == "ERROR"
    assert states.pop("disk") == "ok"
    assert set(states.values()) == {"skipped"}


def test_of_many_hosts_each_asks_about_the_first_and_its_neighbours() -> None:
    few, many = [f"node{n}" for n in range(16)], [f"node{n}" for n in range(17)]
    assert near(few, "node3") == few
    assert near(many, "node3") == ["node0", "node2", "node3", "node4"]
    assert near(many, "node16") == ["node0", "node15", "node16"]


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1 << 20, "1 MiB"), (3 << 39, "1.5 TiB"), (7.5e15, "6,821.2 TiB")]
)
def test_sizes_are_for_people(size: float, text: str) -> None:
    assert amount(size) == text


@pytest.mark.parametrize(
    ("gpus", "visible", "left"),
    [
        (8, None, 8),
        (8, "0,3", 2),
        (8, "GPU-0a,GPU-0b", 2),
        (1, "MIG-0a, MIG-0b,MIG-0c", 3),
        (2, "0,1,2", 2),
        (8, "0,-1,2", 1),
        (8, "NoDevFiles", 0),
        (8, "", 0),
        (0, "GPU-0a", 0),
    ],
)
def test_gpus_are_those_that_a_rank_would_see(gpus: int, visible: str | None, left: int) -> None:
    assert left_visible(gpus, visible) == left
