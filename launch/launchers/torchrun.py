"""Ranks through ``torchrun``, the launcher that comes with torch: one agent a host, over the system's ssh."""

from __future__ import annotations

import sys

from launch.hosts.job import Command, Job, Launch, device_env
from launch.hosts.ssh import over_ssh

# torchrun kills its workers this long after a signal to itself; a save may take longer than its own 30 seconds.
_SAVE_SECONDS = 86400
_MEET_SECONDS = 600  # that its agents wait for each other


def command(job: Job) -> Launch:
    """One ``torchrun`` for each host, told its node rank and where to meet; on a free port for a single host.

    Restarts are ours (``launch/watch/supervise.py``), so it gets none, and its static rendezvous is used: ranks follow
    the order of the hosts, not that of arrival.

    torchrun closes every descriptor except 0-2 on the way to its workers. So that its own reports can go to a file
    while rank 0 still reaches both streams of the console, the console's stderr travels as descriptor 0.
    """
    commands = []
    for node, host in enumerate(job.hosts):
        if job.node not in (None, node):
            continue
        argv = [sys.executable, *agent(job, host.slots, _meeting(job, node), "--stderr-fd=0")]
        env = job.rank_env | device_env(host)
        local = host.local or job.node is not None
        commands.append(Command(argv, env, host, console=True) if local else over_ssh(job, host, argv, env))
    return Launch("torchrun", commands)


def agent(job: Job, slots: int, meeting: list[str], *options: str) -> list[str]:
    """The argv, after the Python executable, of the torchrun of one host; ``options`` are the shim's."""
    return [
        *("-m", "torch.distributed.run"),
        *meeting,
        f"--nproc-per-node={slots}",
        "--max-restarts=0",
        *([f"--rdzv-conf=timeout={job.rendezvous_wait}"] if job.rendezvous_wait > _MEET_SECONDS else []),
        f"--shutdown-timeout={_SAVE_SECONDS}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # by default USR1 kills it, orphans the ranks
        *job.rank_argv(*options),
    ]


def _meeting(job: Job, node: int) -> list[str]:
    if len(job.hosts) == 1 and job.rendezvous is None:
        # Whatever PET_NNODES says, and however this machine's name resolves.
        return ["--standalone", "--nnodes=1", "--local-addr=127.0.0.1"]
    assert job.rendezvous is not None, "several hosts have to be told where to meet"
    address, port = job.rendezvous
    return [f"--nnodes={len(job.hosts)}", f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}"]
