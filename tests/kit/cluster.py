"""Several hosts on one machine, for tests of launches: each has its name, address, ssh server, and a cable to pull.

with Cluster(3) as cluster:
    cluster.run(0, ["ssh", cluster.hosts[1], "hostname"], timeout=10).expect(exit_code=0, stdout="node1")
    with cluster.start(0, argv, timeout=60) as job:      # what tests.kit.jobs.start_job does, on host 0
        job.wait_for("step 3")
        cluster.kill_host(2)

Two kinds of host:

- ``namespaces`` (root): a network, mount and UTS namespace each, joined by a bridge in a namespace of its own, so that
  no packet leaves. Names resolve, ``gethostname`` differs, /dev/shm is the host's own; the rest of the file system is
  shared, as by NFS. All namespaces are anonymous: they vanish with their processes.
- ``loopback`` (anybody): addresses 127.0.0.1, 127.0.0.2, …, each with an ssh server of the same user on a free port.
  Hosts have no names and no cables: what needs them skips.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import psutil
import pytest

from tests.kit import guard
from tests.kit.hosts import (
    SYSTEM_PATH,
    Host,
    Service,
    Unavailable,
    boot,
    call,
    check_namespaces,
    describe,
    eventually,
    make_key,
    plug,
    program,
    write_client,
    write_etc,
    write_server,
)
from tests.kit.jobs import PYTHON, REPOSITORY, Result, RunningJob, start_job

Kind = Literal["namespaces", "loopback"]


class Cluster:
    """``count`` hosts, from entering the block to leaving it, or to the death of the test run."""

    def __init__(self, count: int, kind: Kind | None = None, *, ipv6: bool = False) -> None:
        """``kind`` None: namespaces where this machine allows them, else loopback. ``ipv6``: the network between
        namespaces has addresses of IPv6 only."""
        self.count, self._wanted, self._ipv6 = count, kind, ipv6

    def __enter__(self) -> Cluster:
        reason = ""
        for kind in [self._wanted] if self._wanted else ["namespaces", "loopback"]:
            self.kind: Kind = kind  # type: ignore[assignment]
            try:
                self._begin()
                return self
            except Unavailable as error:
                self.close()
                reason += f"no hosts as {kind}: {error}. "
            except BaseException:
                self.close()
                raise
        raise Unavailable(reason)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self) -> None:
        namespaces = self.kind == "namespaces"
        self.folder = Path(tempfile.mkdtemp(prefix="mlite-hosts-"))
        self._guard = subprocess.Popen(
            [PYTHON, guard.__file__, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        self._members: list[Host] = []
        self._switch = Host("switch", "", 0, self.folder / "switch")
        sshd = program("sshd", "openssh-server")
        if namespaces:
            check_namespaces()
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        make_key(self.folder / "id")
        self._members = [
            describe(index, self.folder, namespaces=namespaces, ipv6=self._ipv6) for index in range(self.count)
        ]
        write_client(self.folder, self._members)
        if namespaces:
            self._boot(self._switch)
            self._switch.ip("link", "add", "br0", "type", "bridge")
            self._switch.ip("link", "set", "br0", "up")
        for index, host in enumerate(self._members):
            write_server(self.folder, host)
            if namespaces:
                write_etc(self.folder, host, self._members)
                self._boot(host)
                plug(host, self._switch, f"port{index}")
            else:
                host.place = str(host.folder)
                self._protect(host)
            argv = [sshd, "-D", "-e", "-f", str(host.folder / "sshd_config")]
            self.serve(index, "sshd", argv, ready="Server listening on")
        probe = self.run(0, ["ssh", self.hosts[-1], "true"], timeout=30)
        if probe.exit_code != 0:
            raise Unavailable(f"ssh to {self.hosts[-1]} ends with {probe.exit_code}: {probe.stderr.strip()}")

    def _boot(self, host: Host) -> None:
        boot(host)
        self._protect(host)

    def _protect(self, host: Host) -> None:
        assert self._guard.stdin
        self._guard.stdin.write(f"{host.place}\n".encode())
        self._guard.stdin.flush()

    # What tests ask and do

    @property
    def hosts(self) -> list[str]:
        """The hosts' names, as a hostfile has them."""
        return [host.name for host in self._members]

    @property
    def addresses(self) -> list[str]:
        return [host.address for host in self._members]

    def folder_of(self, index: int) -> Path:
        """A host's folder: its logs and, with namespaces, in etc/ the files over its /etc, which a test may change."""
        return self._members[index].folder

    def servers(self, index: int) -> list[int]:
        """The process ids of what makes it a host."""
        return self._members[index].servers

    def hostfile(self, path: Path, slots: int | Sequence[int] = 1) -> Path:
        """Write a hostfile of ``host slots=N`` lines."""
        numbers = [slots] * self.count if isinstance(slots, int) else slots
        path.write_text("".join(f"{host} slots={number}\n" for host, number in zip(self.hosts, numbers, strict=False)))
        return path

    def env(self, index: int) -> dict[str, str]:
        """What a program on a host finds in its environment beside the test run's own: an ssh that knows the hosts."""
        path = f"{self.folder / 'bin'}:{Path(PYTHON).parent}:{SYSTEM_PATH}"
        return {"PATH": path, guard.MARK: str(self._members[index].folder)}

    def argv(self, index: int, argv: Sequence[str], cwd: Path = REPOSITORY) -> list[str]:
        """The command line that becomes ``argv`` on a host, keeping its process id: signals reach it."""
        host = self._members[index]
        return host.enter(["env", "-C", str(cwd), *argv]) if self.kind == "namespaces" else list(argv)

    def run(
        self,
        index: int,
        argv: Sequence[str],
        *,
        timeout: float,
        env: Mapping[str, str | None] | None = None,
        cwd: Path = REPOSITORY,
    ) -> Result:
        """Run ``argv`` on a host to its end, as ``tests.kit.jobs.run_job`` does."""
        with self.start(index, argv, timeout=timeout, env=env, cwd=cwd) as job:
            return job.finish()

    @contextlib.contextmanager
    def start(
        self,
        index: int,
        argv: Sequence[str],
        *,
        timeout: float,
        env: Mapping[str, str | None] | None = None,
        cwd: Path = REPOSITORY,
    ) -> Iterator[RunningJob]:
        """Start ``argv`` on a host; what it starts over ssh carries its mark, too, and is dead after the block."""
        merged = {**self.env(index), **(env or {})}
        with start_job(self.argv(index, argv, cwd), timeout=timeout, env=merged, cwd=cwd) as job:
            yield job

    def processes(self, index: int) -> list[psutil.Process]:
        """What runs on a host beside its servers: at the end of a job, what it left behind."""
        found = []
        for pid in guard.inhabitants(self._members[index].place):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if pid not in self._members[index].servers and not process.name().startswith("sshd"):
                    found.append(process)
        return found

    def kill_host(self, index: int, *, silently: bool = False) -> None:
        """SIGKILL all on a host, its servers, too; peers see connections closed or, ``silently``, nothing any more."""
        if silently:
            self.cut(index)
        host = self._members[index]
        guard.kill_all(host.place, spare=[host.init.pid] if host.init else [])
        for service in host.services.values():
            if service.process:
                service.process.wait()

    def revive_host(self, index: int) -> None:
        """Heal a host's link, and start what is missing of its servers."""
        if self.kind == "namespaces":
            self.heal(index)
        for service in self._members[index].services.values():
            if service.process is None or service.process.poll() is not None:
                self._serve(self._members[index], service)

    def cut(self, index: int) -> None:
        """Pull a host's cable: nobody is told, packets just stop."""
        self._needs_namespaces("a link that can be cut")
        self._switch.ip("link", "set", f"port{index}", "down")

    def heal(self, index: int) -> None:
        """Plug it in again."""
        self._needs_namespaces("a link that can be cut")
        self._switch.ip("link", "set", f"port{index}", "up")

    def shape(self, index: int, rate: str | None) -> None:
        """Limit what a host sends, as in ``100mbit``; None lifts the limit."""
        self._needs_namespaces("a link whose rate can be limited")
        host, tc = self._members[index], [program("tc", "iproute2"), "qdisc"]
        if rate is None:
            subprocess.run(host.enter([*tc, "del", "dev", "eth0", "root"]), capture_output=True, check=False)
        else:
            limit = ["tbf", "rate", rate, "burst", "256kb", "latency", "400ms"]
            call(host.enter([*tc, "replace", "dev", "eth0", "root", *limit]))

    def reset(self) -> None:
        """Back to healthy hosts that run nothing but their servers."""
        for index, host in enumerate(self._members):
            if self.kind == "namespaces":
                self.shape(index, None)
                write_etc(self.folder, host, self._members)
            guard.kill_all(host.place, spare=host.servers)
            self.revive_host(index)

    def serve(
        self,
        index: int,
        name: str,
        argv: Sequence[str],
        *,
        ready: str | Callable[[], object],
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start a server on a host, which belongs to it from now on; ready when this is in its log, or says so."""
        host = self._members[index]
        log = host.folder / f"{name}.log"
        check = ready if callable(ready) else lambda: ready in log.read_text(errors="replace")
        host.services[name] = Service(list(argv), log, env or {}, check)
        self._serve(host, host.services[name])

    def stop(self, indices: Iterable[int], names: Sequence[str]) -> None:
        """End these servers of these hosts, and forget them."""
        for host in [self._members[index] for index in indices]:
            for service in [host.services.pop(name) for name in names if name in host.services]:
                if service.process:
                    service.process.kill()
                    service.process.wait()

    def close(self) -> None:
        """End all of it; the guard does the work, as it would had the test run died."""
        assert self._guard.stdin
        self._guard.stdin.close()
        self._guard.wait(timeout=60)
        for host in [*self._members, self._switch]:
            host.wait()

    def _serve(self, host: Host, service: Service) -> None:
        index = self._members.index(host)
        with service.log.open("wb") as log:  # from the start: ``ready`` looks for words of this time
            service.process = subprocess.Popen(
                self.argv(index, service.argv, host.folder),
                env={**os.environ, **self.env(index), **service.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        def ready() -> bool:
            assert service.process and service.process.poll() is None, (
                f"{service.argv} ended: {service.log.read_text(errors='replace')[-2000:]}"
            )
            return bool(service.ready())

        eventually(ready, f"{service.argv} is ready: {service.log.read_text(errors='replace')[-2000:]}")

    def _needs_namespaces(self, what: str) -> None:
        if self.kind != "namespaces":
            pytest.skip(f"{what} needs namespaces: run as root on Linux")
