"""Elastic runs: each attempt uses the hosts that answer, as many as --nodes allows and the config can use."""

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
    """Probes hosts in parallel, without blocking: can ssh reach them within ``limit_s`` seconds?"""

    def __init__(self, hosts: Sequence[Host], ssh: Ssh, limit_s: float = 10.0) -> None:
        self._since, self._limit_s = time.monotonic(), limit_s
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._asked = {
            host: None if host.local else process.start(ssh_argv(host, ["true"], ssh), unblock=(), **quiet)
            for host in hosts
        }

    @property
    def done(self) -> bool:
        """Whether every host has answered or timed out."""
        waiting = [child for child in self._asked.values() if child and child.poll() is None]
        if waiting and time.monotonic() - self._since > self._limit_s:
            for child in waiting:
                child.kill()
                child.wait()
            return True
        return not waiting

    def answered(self) -> list[Host]:
        """Wait until ``done``; returns the hosts that can be reached."""
        while not self.done:
            time.sleep(0.05)
        return [host for host, child in self._asked.items() if child is None or child.returncode == 0]


@dataclass(frozen=True)
class Pool:
    """The hosts that a run may use, between ``least`` and ``most`` of them. ``fits``: whether the config can use a
    given number of ranks. ``interval``: how often, in seconds, a run that lost hosts checks whether they are back."""

    hosts: tuple[Host, ...]
    least: int
    most: int
    fits: Callable[[int], bool]
    interval: float = 30.0

    def choose(self, reachable: Sequence[Host]) -> tuple[Host, ...]:
        """The largest usable number of reachable hosts, in the pool's order; empty if there are too few."""
        up = [host for host in self.hosts if host in reachable]
        for count in range(min(self.most, len(up)), self.least - 1, -1):
            if self.fits(sum(host.slots for host in up[:count])):
                return tuple(up[:count])
        return ()
