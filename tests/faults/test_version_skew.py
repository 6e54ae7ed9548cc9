"""Ranks that do not run the same code."""

import shutil
import socket
from pathlib import Path

from tests.kit.jobs import REPOSITORY, run_job, start_job
from tests.kit.tiny import TinyRuns, rank_env, tiny_config, train_argv


def test_the_odd_rank_is_named_before_anything_else_is_exchanged(tiny: TinyRuns, tmp_path: Path) -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
    other = tmp_path / "other"
    shutil.copytree(REPOSITORY / "megatron_lite", other / "megatron_lite")
    with (other / "megatron_lite" / "optim.py").open("a") as file:
        file.write("\n# edited on one host only\n")
    command = train_argv(tiny_config(tmp_path, tiny.data))
    with start_job(command, timeout=60, env=rank_env(0, port)) as first:
        second = run_job(command, timeout=60, env=rank_env(1, port), cwd=other)
        said = r"^error: rank 1 \(\S+\) runs megatron_lite's code [0-9a-f]{12}, the other rank [0-9a-f]{12}\n$"
        for result in (first.finish(), second):
            result.expect(exit_code=2, stderr=said)
