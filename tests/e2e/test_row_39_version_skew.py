"""FAULTS row 39: ranks that do not run the same code."""

import shutil
import socket
from pathlib import Path

from tests.e2e.test_row_38_two_jobs_one_port import by_hand, rank
from tests.kit.jobs import REPOSITORY, run_job, start_job
from tests.kit.tiny import TinyRuns, tiny_config


def test_the_odd_rank_is_named_before_anything_else_is_exchanged(tiny: TinyRuns, tmp_path: Path) -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
    other = tmp_path / "other"
    shutil.copytree(REPOSITORY / "megatron_lite", other / "megatron_lite")
    with (other / "megatron_lite" / "optim.py").open("a") as file:
        file.write("\n# edited on one host only\n")
    command = by_hand(tiny_config(tmp_path, tiny.data))
    with start_job(command, timeout=60, env=rank(0, port)) as first:
        second = run_job(command, timeout=60, env=rank(1, port), cwd=other)
        said = r"^error: rank 1 \(\S+\) runs megatron_lite's code [0-9a-f]{12}, the other rank [0-9a-f]{12}\n$"
        for result in (first.finish(), second):
            result.expect(exit_code=2, stderr=said)
