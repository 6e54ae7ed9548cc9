"""Starts ranks through ``torchrun``, one elastic agent for each host, over the system's ssh."""

from __future__ import annotations

import sys

from launch.hosts.job import Command, Job, Launch, device_env
from launch.hosts.ssh import over_ssh

# torchrun kills its workers this long after it got a signal; its default of 30 seconds may cut a save short.
_SAVE_SECONDS = 86400
_MEET_SECONDS = 600  # how long agents wait for each other by default


def command(job: Job) -> Launch:
    """One ``torchrun`` for each host, with its node rank and the rendezvous; on a single host, with any free port.

    torchrun does no restarts, because the supervisor does (``launch/watch/supervise.py``). Its rendezvous is static, so
    that ranks follow the order of the hosts and not the order of arrival.

    torchrun closes all descriptors except 0 to 2 in its workers. Its own stderr goes to a file; to let rank 0 still
    write to both streams of the console, the console's stderr is passed as descriptor 0.
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
    """The argv of the torchrun of one host, after the Python executable; ``options`` are for the shim."""
    return [
        *("-m", "torch.distributed.run"),
        *meeting,
        f"--nproc-per-node={slots}",
        "--max-restarts=0",
        *([f"--rdzv-conf=timeout={job.rendezvous_wait}"] if job.rendezvous_wait > _MEET_SECONDS else []),
        f"--shutdown-timeout={_SAVE_SECONDS}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # by default USR1 kills it and orphans ranks
        *job.rank_argv(*options),
    ]


def _meeting(job: Job, node: int) -> list[str]:
    if len(job.hosts) == 1 and job.rendezvous is None:
        # Independent of PET_NNODES and of how this machine's name resolves.
        return ["--standalone", "--nnodes=1", "--local-addr=127.0.0.1"]
    assert job.rendezvous is not None, "several hosts have to be told where to meet"
    address, port = job.rendezvous
    return [f"--nnodes={len(job.hosts)}", f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}"]
