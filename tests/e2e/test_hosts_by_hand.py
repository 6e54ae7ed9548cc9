"""Each host starts its own ranks: by hand, by the pods of a printed manifest, by a torchrun of one's own. All are one
job, and train what one host with as many ranks trains, to the bit."""

import re
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.kit.cluster import Cluster
from tests.kit.jobs import PYTHON, Result, run_job
from tests.kit.tiny import losses, short_config

LIMIT = 100
ENV = {"OMP_NUM_THREADS": "1"}


def on_both(
    cluster: Cluster, argvs: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]] = ({}, {})
) -> list[Result]:
    """Run a command on each of two hosts, the second one first, to their ends."""
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(cluster.start(host, argvs[host], timeout=LIMIT, env={**ENV, **envs[host]}))
            for host in (1, 0)
        ]
        return [job.finish() for job in reversed(jobs)]


def launches(cluster: Cluster, config: Path, *flags: str) -> list[list[str]]:
    place = [f"--rdzv={cluster.addresses[0]}:29517", "--nodes=2"]
    return [[PYTHON, "-m", "launch", "run", str(config), *place, f"--node_rank={host}", *flags] for host in (0, 1)]


def needs_hosts(cluster: Cluster) -> None:
    if cluster.kind == "loopback":
        pytest.skip("hosts with names need namespaces: run as root on Linux")


def test_two_launches_are_one_job(cluster: Cluster, tmp_path: Path, data: Path, by_hand: dict[int, float]) -> None:
    for result in on_both(cluster, launches(cluster, short_config(tmp_path, data))):
        result.expect(exit_code=0)
    assert losses(tmp_path / "run") == by_hand
    assert not any(cluster.processes(host) for host in (0, 1))


def test_what_differs_between_two_launches_is_named(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    first, second = launches(cluster, short_config(tmp_path, data))
    for result in on_both(cluster, [first, [*second, "--optim.lr=0.5"]]):
        result.expect(exit_code=2)
        logs = "".join(path.read_text() for path in (tmp_path / "run/logs").glob("rank_*.log"))
        assert re.search(r"rank 1 \(\S+\) has optim.lr=0.5, the other rank 0.01", logs)


@pytest.mark.slow
def test_two_torchruns_are_one_job(cluster: Cluster, tmp_path: Path, data: Path, by_hand: dict[int, float]) -> None:
    train = ["-m", "megatron_lite", "train", str(short_config(tmp_path, data))]
    place = ["--nnodes=2", f"--master-addr={cluster.addresses[0]}", "--master-port=29517"]
    torchrun = [str(Path(PYTHON).parent / "torchrun"), *place]
    for result in on_both(cluster, [[*torchrun, f"--node-rank={host}", *train] for host in (0, 1)]):
        result.expect(exit_code=0, traceback=True)
    assert losses(tmp_path / "run") == by_hand


@pytest.mark.parametrize(
    "kind", ["Job", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("PyTorchJob", "TrainJob"))]
)
def test_the_pods_of_a_manifest_are_one_job(
    cluster: Cluster, tmp_path: Path, data: Path, by_hand: dict[int, float], kind: str
) -> None:
    """What Kubernetes and the operators give a pod is played here: its number, names, and the config's file."""
    needs_hosts(cluster)
    argv = [PYTHON, "-m", "launch", "k8s", str(short_config(tmp_path, data)), "--nodes=2"]
    options = ["--launch.k8s.image=i", f"--launch.k8s.kind={kind}"]
    config, *_, job = yaml.safe_load_all(run_job([*argv, *options], timeout=60).expect(exit_code=0).stdout)
    (tmp_path / "config.yaml").write_text(config["data"]["config.yaml"])
    first = {"Job": "run-0.run", "PyTorchJob": "run-master-0", "TrainJob": "run-node-0-0.run"}[kind]
    for host in (0, 1):
        names = cluster.folder_of(host) / "etc/hosts"
        names.write_text(f"{names.read_text()}{cluster.addresses[0]} {first}\n")
    envs = [given(kind, host, first) for host in (0, 1)]
    argvs = [[substituted(word, envs[host], tmp_path) for word in command(job, host)] for host in (0, 1)]
    for result in on_both(cluster, argvs, envs):
        result.expect(exit_code=0)
    assert losses(tmp_path / "run") == by_hand


def command(job: dict, host: int) -> list[str]:
    """The words of a pod."""
    spec = job["spec"]
    if "trainer" in spec:
        return [*spec["trainer"]["command"], *spec["trainer"]["args"]]
    template = spec.get("template") or spec["pytorchReplicaSpecs"][("Master", "Worker")[host]]["template"]
    (container,) = template["spec"]["containers"]
    return [*container["command"], *container["args"]]


def given(kind: str, host: int, first: str) -> dict[str, str]:
    """The variables of a pod."""
    if kind == "Job":
        return {"JOB_COMPLETION_INDEX": str(host)}
    if kind == "PyTorchJob":
        return {"RANK": str(host), "WORLD_SIZE": "2", "MASTER_ADDR": first, "MASTER_PORT": "23456"}
    place = {"PET_MASTER_ADDR": first, "PET_MASTER_PORT": "29500"}
    return {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(host), **place}


def substituted(word: str, env: Mapping[str, str], folder: Path) -> str:
    word = re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], word).replace("/etc/megatron_lite", str(folder))
    return PYTHON if word == "python" else word


def test_a_launch_that_waits_for_the_others_stops_at_once(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    """For the name of their place (a pod's), and for the others there."""
    _, argv = launches(cluster, short_config(tmp_path, data))
    nameless = [*(word for word in argv if not word.startswith("--rdzv")), "--rdzv=no.such.pod:1", "--rdzv_wait=60"]
    for words, said in (
        (nameless, "no.such.pod, where ranks meet, does not resolve yet"),
        (argv, "2 ranks on 2 hosts"),
    ):
        with cluster.start(1, words, timeout=LIMIT, env=ENV) as job:
            job.wait_for(said)
            while words is argv and len(job.family()) < 2:
                assert job.process.poll() is None
            job.strike(job.pid, signal.SIGTERM)
            job.finish().expect(exit_code=75, stderr="SIGTERM: stopped before any rank had started", within=5)
    assert not cluster.processes(1)


def test_a_place_that_does_not_resolve_is_named_at_once(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    argv = [PYTHON, "-m", "launch", "run", str(short_config(tmp_path, data)), "--nodes=2", "--node_rank=1"]
    cluster.run(1, [*argv, "--rdzv=no.such.host:1"], timeout=LIMIT).expect(
        exit_code=2, stderr=r"error: --rdzv=no\.such\.host: \S+ cannot resolve it"
    )
