"""The port is taken, by a stranger or by another job."""

import os
import socket
from pathlib import Path

from tests.kit.jobs import run_job, start_job
from tests.kit.tiny import TinyRuns, rank_env, tiny_config, train_argv


def test_a_taken_port_is_told_with_its_owner(tiny: TinyRuns, tmp_path: Path) -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        result = run_job(train_argv(tiny_config(tmp_path, tiny.data)), timeout=60, env=rank_env(0, port))
    result.expect(
        exit_code=2, stderr=rf"^error: port {port} of \S+ is in use by pid {os.getpid()} \(.+\); choose another"
    )


def test_a_rank_of_another_job_is_turned_away_and_the_job_goes_on(tiny: TinyRuns, tmp_path: Path) -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
    command = train_argv(tiny_config(tmp_path, tiny.data))
    with start_job(command, timeout=100, env=rank_env(0, port, "blue")) as first:
        stranger = run_job(command, timeout=60, env=rank_env(1, port, "red"))
        said = rf"^error: rank 1 \(\S+\) of job red came to the rendezvous of job blue, port {port}; give each job"
        stranger.expect(exit_code=2, stderr=said)
        run_job(command, timeout=60, env=rank_env(1, port, "blue")).expect(exit_code=0)
        first.finish().expect(exit_code=0, stdout="step 1 ")
