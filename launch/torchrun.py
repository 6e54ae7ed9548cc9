"""Ranks on this machine through ``torchrun``, the launcher that comes with torch."""

from __future__ import annotations

import sys

from launch.job import Job, Launch

# torchrun kills its workers this long after a signal to itself; a save may take longer than its own 30 seconds.
_SAVE_SECONDS = 86400


def command(job: Job) -> Launch:
    """``torchrun`` on a free port of this machine. Restarts are ours (``launch/supervise.py``), so it gets none.

    torchrun closes every descriptor except 0-2 on the way to its workers. So that its own reports can go to a file
    while rank 0 still reaches both streams of the console, the console's stderr travels as descriptor 0.
    """
    argv = [
        *(sys.executable, "-m", "torch.distributed.run"),
        "--standalone",
        "--nnodes=1",  # whatever PET_NNODES says
        "--local-addr=127.0.0.1",  # never depends on how this machine's name resolves
        f"--nproc-per-node={job.nproc}",
        "--max-restarts=0",
        f"--shutdown-timeout={_SAVE_SECONDS}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # by default USR1 kills it and orphans the ranks
        *job.rank_argv("--stderr-fd=0"),
    ]
    return Launch("torchrun", argv, job.rank_env)
