"""Starts ranks through DeepSpeed's launcher; over several hosts with its pdsh or openmpi runner."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from launch.hosts.hostfile import UsageError
from launch.hosts.job import Command, Job, Launch, ordered
from launch.hosts.rendezvous import free_port

_PLAIN = re.compile(r"[A-Za-z0-9_./:@,=+-]*")  # characters that a shell does not interpret
_EXPORTED = (
    "MLFLOW",
    "PYTHON",
    "MV2",
    "UCX",
    "NCCL",
    "CUDA",
    "DS_",
)  # the prefixes that DeepSpeed puts on command lines


def command(job: Job) -> Launch:
    """One ``deepspeed`` command with a hostfile written for it. Raises UsageError.

    DeepSpeed passes an unquoted line to a shell on every host and forwards few variables. So our part of that line is
    one word, the name of a file that holds the program, its arguments and all variables. Variables that DeepSpeed would
    export itself are removed from its environment.
    """
    here = str(Path.cwd())
    for path in (here, sys.executable):
        if not _PLAIN.fullmatch(path):
            raise UsageError(
                f"--via=deepspeed: its launcher passes {path!r} to a shell unquoted; move it, or use --via=torchrun"
            )
    hostfile = job.log_dir / "hostfile"
    address, port = job.rendezvous or ("127.0.0.1", free_port())
    openmpi = len(job.hosts) > 1 and job.runner == "openmpi"
    meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(port)} if openmpi else {}  # the pdsh runner sets them itself
    rank = ["--rank=OMPI_COMM_WORLD_RANK"] if openmpi else []
    shim, files = ordered(job, meeting, "--stderr-fd=1", *rank, lease=True)
    files[hostfile] = "".join(f"{host.name} slots={_slots(host.devices, host.slots)}\n" for host in job.hosts)
    argv = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", "--no_ssh_check"]
    if any(host.devices is not None for host in job.hosts):
        if openmpi:
            raise UsageError("--runner=openmpi: DeepSpeed's cannot choose devices; use --runner=pdsh, or --via=mpirun")
        chosen = (f"{host.name}:{','.join(map(str, host.devices or range(host.slots)))}" for host in job.hosts)
        argv.append(f"--include={'@'.join(chosen)}")
    if openmpi:
        root = " --allow-run-as-root" if os.geteuid() == 0 else ""
        argv += ["--launcher=openmpi", f"--launcher_args=--bind-to none{root}"]
    elif len(job.hosts) > 1:
        argv += ["--launcher=pdsh", "--launcher_args=-N"]  # -N: no host name before every line
    argv += [f"--master_addr={address}", f"--master_port={port}", "--no_local_rank", "--module", *shim[1:]]
    env = {"DS_ENV_FILE": os.devnull, "PDSH_SSH_ARGS_APPEND": _ssh(job)}
    return Launch("deepspeed", [Command(argv, env, without=_EXPORTED)], files)


def _slots(devices: tuple[int, ...] | None, slots: int) -> int:
    """The number of slots in the hostfile. DeepSpeed counts from 0, so the highest chosen slot must exist."""
    return slots if devices is None else max(devices) + 1


def _ssh(job: Job) -> str:
    words = ["-oBatchMode=yes", *(f"-o{option}" for option in job.ssh.options)]
    if job.ssh.port is not None:
        words.append(f"-p{job.ssh.port}")
    if any(shlex.quote(word) != word for word in words):
        raise UsageError(
            f"launch.ssh.options={list(job.ssh.options)}: pdsh splits them at spaces; put them in ~/.ssh/config"
        )
    return " ".join(words)
