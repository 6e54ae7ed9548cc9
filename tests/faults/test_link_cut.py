"""The link to a host is cut in the middle of a run; and heals."""

import time
from pathlib import Path

from tests.kit.cluster import Cluster
from tests.kit.jobs import PYTHON
from tests.kit.tiny import TinyRuns, assert_same_run, tiny_config

HANG_TIMEOUT = 6


def test_both_sides_end_in_time_and_the_run_goes_on_when_the_link_is_back(
    cluster: Cluster, tiny: TinyRuns, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, tiny.data, parallel__tp=2, train__hang_timeout=HANG_TIMEOUT)
    argv = [PYTHON, "-m", "launch", "run", str(config), f"--hostfile={cluster.hostfile(tmp_path / 'hosts', [1, 1])}"]
    argv.append("--launch.tp_across_hosts=true")
    env = {"OMP_NUM_THREADS": "1"}
    with cluster.start(0, argv, timeout=100, env={**env, "MLITE_FAULT": "sleep:seconds=0.2"}) as job:
        job.wait_for("step 4 ")
        cluster.cut(1)
        began = time.monotonic()
        job.finish().expect(
            exit_code=5, stderr=rf"error: host {cluster.hosts[1]} cannot be reached any more, with rank 1"
        )
        assert time.monotonic() - began < HANG_TIMEOUT + 8  # 4.2 where nothing else runs
    said = (tmp_path / "run/logs/rank_1.log").read_text()
    assert "lost contact with another rank" in said, said
    cluster.heal(1)
    cluster.run(0, argv, timeout=100, env=env).expect(exit_code=0)
    assert_same_run(tmp_path / "run", tiny.reference)
