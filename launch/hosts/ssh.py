"""Commands on other hosts, through the system's ssh: the user's ssh config, keys and agent apply."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from launch.hosts.hostfile import Host, UsageError
from launch.hosts.job import Command, Job, Ssh

SSH_FAILED = 255  # the exit code of ssh itself when it fails
# No prompts; a host that is gone is noticed within 15 seconds.
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3")


def ssh_argv(host: Host, words: list[str], ssh: Ssh, log: Path | None = None) -> list[str]:
    """The argv that runs ``words`` on ``host``, with ssh's own messages in ``log``.

    ssh passes one string to the login shell of the other side, so every word is quoted here.
    """
    options = [f"-o{option}" for option in (*ssh.options, *_OPTIONS)]  # the first value of an option wins
    port = [] if ssh.port is None else [f"-p{ssh.port}"]
    messages = [] if log is None else ["-E", str(log)]
    return ["ssh", *options, *port, *messages, "--", host.name, shlex.join(words)]


def also(silent: Iterable[Host]) -> str:
    """Text for an error line: further hosts that ssh does not reach."""
    names = sorted(host.name for host in silent)
    return f"; ssh does not reach {', '.join(names)} either" if names else ""


def check_program(name: str) -> None:
    """Raises UsageError if a program that is needed to reach other hosts is missing."""
    if shutil.which(name) is None:
        raise UsageError(f"other hosts are reached by {name}, which is not in PATH")


def here() -> list[str]:
    """The start of a remote command: same directory, same Python executable, same PYTHONPATH."""
    path = os.environ.get("PYTHONPATH")
    return ["env", f"--chdir={Path.cwd()}", *([f"PYTHONPATH={path}"] if path else []), sys.executable]


def over_ssh(job: Job, host: Host, argv: list[str], env: Mapping[str, str]) -> Command:
    """Run ``argv`` on ``host`` under ``launch/watch/host.py``. The argv and its variables are sent through stdin, so
    that no shell interprets them and no secret shows in a process list."""
    order = {"argv": argv, "env": dict(env), "cwd": str(Path.cwd()), "log_dir": str(job.log_dir), "host": host.name}
    words = [*here(), "-m", "launch.watch.host"]
    return Command(
        ssh_argv(host, words, job.ssh, job.log_dir / f"ssh.{host.name}.log"),
        host=host,
        stdin=json.dumps(order) + "\n",
    )
