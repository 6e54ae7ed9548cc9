"""Which hosts an attempt uses: those that answer, as many as the run may have and its config can use."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch import process
from launch.hosts.hostfile import Host
from launch.hosts.job import Ssh
from launch.hosts.ssh import ssh_argv


class Probe:
    """Asks hosts, all at once and without waiting, whether ssh gets through to them in ``limit_s`` seconds."""

    def __init__(self, hosts: Sequence[Host], ssh: Ssh, limit_s: float = 10.0) -> None:
        self._since, self._limit_s = time.monotonic(), limit_s
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._asked = {
            host: None if host.local else process.start(ssh_argv(host, ["true"], ssh), unblock=(), **quiet)
            for host in hosts
        }

    @property
    def done(self) -> bool:
        """Whether every host has answered, or had its time."""
        waiting = [child for child in self._asked.values() if child and child.poll() is None]
        if waiting and time.monotonic() - self._since > self._limit_s:
            for child in waiting:
                child.kill()
                child.wait()
            return True
        return not waiting

    def answered(self) -> list[Host]:
        """Wait for ``done``; the hosts that can be reached."""
        while not self.done:
            time.sleep(0.05)
        return [host for host, child in self._asked.items() if child is None or child.returncode == 0]


@dataclass(frozen=True)
class Pool:
    """Hosts of which ``least`` to ``most`` make a run; ``fits`` says whether the config can use a number of ranks, and
    every ``interval`` seconds a run that has lost hosts looks whether they are back."""

    hosts: tuple[Host, ...]
    least: int
    most: int
    fits: Callable[[int], bool]
    interval: float = 30.0

    def choose(self, reachable: Sequence[Host]) -> tuple[Host, ...]:
        """The most of the hosts that answered which the config can use, in the pool's order; none if too few."""
        up = [host for host in self.hosts if host in reachable]
        for count in range(min(self.most, len(up)), self.least - 1, -1):
            if self.fits(sum(host.slots for host in up[:count])):
                return tuple(up[:count])
        return ()
