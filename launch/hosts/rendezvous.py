"""The rendezvous of ranks on several hosts: an address that all can reach, and a free port there.

``python -m launch.hosts.rendezvous PORT ADDRESS`` checks both on the host it runs on (PORT 0: any free one). It prints
the port, or one line that says who uses the port or that the address does not resolve.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from launch.hosts.elastic import Probe
from launch.hosts.hostfile import UsageError
from launch.hosts.job import Job
from launch.hosts.network import resolve
from launch.hosts.ssh import SSH_FAILED, also, here, ssh_argv

_ANSWER_S = 20.0


def meet(job: Job) -> Job:
    """``job`` with a rendezvous on its first host, if it needs one and none is given. Raises UsageError."""
    first = job.hosts[0]
    if job.rendezvous and (first.local or job.node is not None):
        check_resolves(job.rendezvous[0])
    if job.slurm is not None:
        address, port = job.rendezvous or (first.address, 0)
        return replace(
            job, rendezvous=(address, free_port(port) if first.local else port or job.slurm.port + job.attempt)
        )
    if job.node == 0 and job.rendezvous:
        free_port(job.rendezvous[1])
    if job.node is not None or (len(job.hosts) == 1 and job.rendezvous is None):
        return job
    address, port = job.rendezvous or ("", 0)
    address = address or first.address
    if len(job.hosts) > 1 and (address == "localhost" or address.startswith("127.") or address == "::1"):
        others = ", ".join(host.name for host in job.hosts[1:])
        raise UsageError(f"{others} cannot reach {address}; give the first host by a name or address of its own")
    if first.local:
        return replace(job, rendezvous=(address, free_port(port)))
    argv = ssh_argv(first, [*here(), "-m", "launch.hosts.rendezvous", str(port), address], job.ssh)
    try:
        asked = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_ANSWER_S, check=False)
        said = (asked.stdout or asked.stderr).decode(errors="replace").strip().splitlines()
    except subprocess.TimeoutExpired:
        raise UsageError(f"{first.name}: ssh gave no answer in {_ANSWER_S:g} s") from None
    if asked.returncode or not said or not said[-1].isdecimal():
        words = said[-1].removeprefix("error: ") if said else "ssh gave no answer"
        silent = set(job.hosts[1:] if asked.returncode == SSH_FAILED else ())
        silent -= set(Probe(tuple(silent), job.ssh).answered())
        raise UsageError(f"{first.name}: {words}{also(silent)}")
    return replace(job, rendezvous=(address, int(said[-1])))


def check_resolves(address: str) -> None:
    """Raises UsageError if ``address`` does not resolve on this host."""
    if not resolve(address):
        raise UsageError(f"--rdzv={address}: {socket.gethostname()} cannot resolve it; give a host's name or address")


def free_port(wanted: int = 0) -> int:
    """``wanted`` if that port is free on this machine (0: any free port). Raises UsageError naming the port's owner."""
    with listen(wanted) as listener:
        return int(listener.getsockname()[1])


def listen(wanted: int = 0) -> socket.socket:
    """A socket that listens on port ``wanted`` (0: any free port) of all addresses. Raises UsageError."""
    listener = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("", wanted))
        listener.listen(128)
    except OSError as error:
        listener.close()
        owner = _owner(wanted)
        by = f" by pid {owner[0]} ({owner[1]})" if owner else f": {error.strerror}"
        where = f"port {wanted} of {socket.gethostname()}"
        raise UsageError(f"{where} is in use{by}; give another --rdzv=HOST:PORT") from None
    return listener


def _owner(port: int) -> tuple[int, str] | None:
    """The pid and name of the process that listens on ``port``, if this user may see it."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "0A":  # LISTEN
                    inodes.add(f"socket:[{fields[9]}]")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # another user's process, or one that has ended
            if any(str(fd.readlink()) in inodes for fd in (entry / "fd").iterdir()):
                return int(entry.name), (entry / "comm").read_text().strip()
    return None


def main() -> int:
    port, address = sys.argv[1:]
    try:
        check_resolves(address)
        print(free_port(int(port)))
    except UsageError as error:
        print(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
