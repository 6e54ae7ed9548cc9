"""``--nodes=MIN:MAX``: a run that loses a host goes on with the others, and takes it back when it returns."""

from pathlib import Path

import pytest

from tests.kit.cluster import Cluster
from tests.kit.jobs import PYTHON
from tests.kit.tiny import TinyRuns, losses, tiny_config


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_host_is_lost_and_comes_back(cluster: Cluster, tiny: TinyRuns, tmp_path: Path, zero: int) -> None:
    config = tiny_config(tmp_path, tiny.data, parallel__zero=zero, train__micro_batch_size=2, checkpoint__every=1)
    hostfile = cluster.hostfile(tmp_path / "hosts", [1, 1])
    argv = [PYTHON, "-m", "launch", "run", str(config), f"--hostfile={hostfile}", "--nodes=1:2", "--max_restarts=3"]
    argv += ["--look_for_hosts=1", "--train.steps=40"]
    slow = "sleep:seconds=0.2;sleep:seconds=0.2:attempt=1"
    with cluster.start(0, argv, timeout=170, env={"OMP_NUM_THREADS": "1", "MLITE_FAULT": slow}) as job:
        job.wait_for("step 3 ")
        cluster.kill_host(1)
        job.wait_for(rf"error: host {cluster.hosts[1]} cannot be reached any more, with rank 1.*; restart 1 of 3")
        job.wait_for(rf"restarting from the last checkpoint on {cluster.hosts[0]}, attempt 2")
        job.wait_for("1 rank = dp 1")
        job.wait_for(r"1 rank = dp 1[\s\S]*step \d+ ")
        cluster.revive_host(1)
        job.wait_for(rf"{cluster.hosts[1]} can be reached again: saving, to go on with more ranks")
        job.wait_for(r"1 rank = dp 1[\s\S]*2 ranks = dp 2")
        job.finish().expect(exit_code=0)
    steps = losses(tmp_path / "run")
    assert sorted(steps) == list(range(1, 41))
    (tmp_path / "same").mkdir()
    flags = ("--train.steps=40", "--train.micro_batch_size=2", "--parallel.tp=1", f"--parallel.zero={zero}")
    tiny.run(tmp_path / "same", *flags)
    reference = losses(tmp_path / "same/run")
    assert steps == pytest.approx(reference, rel=1e-4)
