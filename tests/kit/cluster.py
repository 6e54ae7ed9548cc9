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
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import pytest

from tests.kit import guard
from tests.kit.jobs import MARK, PYTHON, REPOSITORY, Result, RunningJob, start_job

Kind = Literal["namespaces", "loopback"]
INSTALL = "tests/kit/install_system_packages.sh, as root, installs it"
_SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# What a host's first process does before it sleeps: $1 its name, $2 its folder. /sys must be mounted anew to show the
# host's own network devices, and cgroups brought along.
_BOOT = """
hostname "$1"
for file in "$2"/etc/*; do
    target=/etc/${file##*/}; [ "$target" != /etc/ssh_config ] || target=/etc/ssh/ssh_config
    [ ! -e "$target" ] || mount --bind "$file" "$target"
done
mount -t tmpfs tmpfs /dev/shm
mkdir "$2/cgroup"
if mount --rbind /sys/fs/cgroup "$2/cgroup" 2>/dev/null && mount -t sysfs sysfs /sys 2>/dev/null; then
    mount --rbind "$2/cgroup" /sys/fs/cgroup
fi
ip link set lo up
echo ready
exec sleep infinity
"""


class Unavailable(Exception):
    """Why this machine cannot have such hosts."""


def program(name: str, package: str) -> str:
    """The path of a system program, /usr/sbin included."""
    if (path := shutil.which(name, path=_SYSTEM_PATH)) is None:
        raise Unavailable(f"there is no {name}: Debian's package {package} has it; {INSTALL}")
    return path


def eventually(condition: Callable[[], object], what: str, seconds: float = 15, every: float = 0.02) -> None:
    """Poll until ``condition()`` is true; fails with ``what`` was waited for after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(every)


@dataclass
class Service:
    """A server of a host, started again when the host is."""

    argv: list[str]
    log: Path
    env: Mapping[str, str]
    ready: Callable[[], object]
    process: subprocess.Popen[bytes] | None = None


@dataclass
class Host:
    name: str  # what a hostfile calls it
    address: str
    port: int
    folder: Path
    place: str = ""  # where guard.py finds its processes
    init: subprocess.Popen[bytes] | None = None  # holds the namespaces
    services: dict[str, Service] = field(default_factory=dict)

    @property
    def servers(self) -> list[int]:
        """The process ids of what makes it a host: its servers, and what holds the namespaces."""
        processes = [self.init, *(service.process for service in self.services.values())]
        return [process.pid for process in processes if process and process.poll() is None]


class Cluster:
    """``count`` hosts, from entering the block to leaving it, or to the death of the test run."""

    def __init__(self, count: int, kind: Kind | None = None) -> None:
        """``kind`` None: namespaces where this machine allows them, else loopback."""
        self.count, self._wanted = count, kind

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
        self.folder = Path(tempfile.mkdtemp(prefix="mlite-hosts-"))
        self._guard = subprocess.Popen(
            [PYTHON, guard.__file__, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        self._members: list[Host] = []
        self._switch: Host | None = None
        sshd = program("sshd", "openssh-server")
        keygen = program("ssh-keygen", "openssh-client")
        if self.kind == "namespaces":
            self._check_namespaces()
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self._make_key(keygen, self.folder / "id")
        for index in range(self.count):
            self._members.append(self._describe(index, keygen))
        self._write_client()
        if self.kind == "namespaces":
            self._switch = Host("switch", "", 0, self.folder / "switch")
            self._boot(self._switch)
            self._ip(self._switch, "link", "add", "br0", "type", "bridge")
            self._ip(self._switch, "link", "set", "br0", "up")
        for index, host in enumerate(self._members):
            self._write_host(host)
            if self.kind == "namespaces":
                self._boot(host)
                self._plug(index)
            else:
                self._protect(host, str(host.folder))
            argv = [sshd, "-D", "-e", "-f", str(host.folder / "sshd_config")]
            self.serve(index, "sshd", argv, ready="Server listening on")
        with contextlib.suppress(subprocess.TimeoutExpired):
            probe = subprocess.run(
                self.argv(0, ["ssh", self.hosts[-1], "true"]),
                env={**os.environ, **self.env(0)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=20,
            )
            if probe.returncode == 0:
                return
            raise Unavailable(f"ssh to {self.hosts[-1]} fails: {probe.stderr.strip()}")
        raise Unavailable(f"ssh to {self.hosts[-1]} hangs")

    # What tests ask and do

    @property
    def hosts(self) -> list[str]:
        """The hosts' names, as a hostfile has them."""
        return [host.name for host in self._members]

    @property
    def addresses(self) -> list[str]:
        return [host.address for host in self._members]

    def folder_of(self, index: int) -> Path:
        """A host's folder: its logs, and in etc/ its /etc/hosts, which a test may write to (in place)."""
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
        """What a program on this host needs in its environment beside the test run's own: an ssh that knows the hosts."""
        path = f"{self.folder / 'bin'}:{Path(PYTHON).parent}:{_SYSTEM_PATH}"
        return {"PATH": path, guard.MARK: str(self._members[index].folder)}

    def argv(self, index: int, argv: Sequence[str], cwd: Path = REPOSITORY) -> list[str]:
        """The command line that runs ``argv`` on a host; it becomes ``argv``, so its process id and signals are that."""
        host = self._members[index]
        return self._enter(host, ["env", "-C", str(cwd), *argv]) if self.kind == "namespaces" else list(argv)

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
        """SIGKILL all that runs on a host, servers, too: peers see connections closed, or, ``silently``, just nothing."""
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
        self._ip(self._switch, "link", "set", f"port{index}", "down")

    def heal(self, index: int) -> None:
        """Plug it in again."""
        self._needs_namespaces("a link that can be cut")
        self._ip(self._switch, "link", "set", f"port{index}", "up")

    def shape(self, index: int, rate: str | None) -> None:
        """Limit what a host sends, as in ``100mbit``; None lifts the limit."""
        self._needs_namespaces("a link whose rate can be limited")
        tc = [program("tc", "iproute2"), "qdisc"]
        if rate is None:
            subprocess.run(
                self._enter(self._members[index], [*tc, "del", "dev", "eth0", "root"]), capture_output=True, check=False
            )
        else:
            limit = ["tbf", "rate", rate, "burst", "256kb", "latency", "400ms"]
            self._call(self._enter(self._members[index], [*tc, "replace", "dev", "eth0", "root", *limit]))

    def reset(self) -> None:
        """Back to healthy hosts that run nothing but their servers."""
        for index, host in enumerate(self._members):
            if self.kind == "namespaces":
                self.shape(index, None)
                self._write_names(host)
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
        for host in [*self._members, *([self._switch] if self._switch else [])]:
            for process in [host.init, *(service.process for service in host.services.values())]:
                if process:
                    process.wait(timeout=10)

    # How hosts are made

    def _check_namespaces(self) -> None:
        if sys.platform != "linux" or os.getuid() != 0:
            raise Unavailable("namespaces need root on Linux")
        program("ip", "iproute2")
        check = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
        if check.returncode:
            raise Unavailable(f"namespaces are not allowed here: {check.stderr.strip()}")

    def _describe(self, index: int, keygen: str) -> Host:
        if self.kind == "namespaces":
            host = Host(f"node{index}", f"10.77.0.{10 + index}", 2222, self.folder / f"node{index}")
        else:
            address = f"127.0.0.{1 + index}"
            host = Host(address, address, free_port(address), self.folder / address)
        (host.folder / "etc").mkdir(parents=True)
        self._make_key(keygen, host.folder / "host_key")
        return host

    def _make_key(self, keygen: str, path: Path) -> None:
        self._call([keygen, "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)])

    def _write_client(self) -> None:
        known, config = "", ""
        for host in self._members:
            key = (host.folder / "host_key.pub").read_text().strip()
            known += "".join(f"[{name}]:{host.port} {key}\n" for name in {host.name, host.address})
            config += f"Host {' '.join(sorted({host.name, host.address}))}\n    Port {host.port}\n"
        config += f"""Host *
    IdentityFile {self.folder}/id
    IdentitiesOnly yes
    UserKnownHostsFile {self.folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    SendEnv {MARK}
"""
        (self.folder / "known_hosts").write_text(known)
        (self.folder / "ssh_config").write_text(config)
        shim = self.folder / "bin/ssh"  # ssh looks for its config where passwd says, whatever $HOME is
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec {program("ssh", "openssh-client")} -F {self.folder}/ssh_config "$@"\n')
        shim.chmod(0o755)

    def _write_host(self, host: Host) -> None:
        (host.folder / "sshd_config").write_text(f"""
ListenAddress {"0.0.0.0" if self.kind == "namespaces" else host.address}
Port {host.port}
HostKey {host.folder}/host_key
AuthorizedKeysFile {self.folder}/id.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
AcceptEnv {MARK}
SetEnv {guard.MARK}={host.folder}
""")
        if self.kind == "namespaces":
            self._write_names(host)
            etc = host.folder / "etc"
            (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
            (etc / "shadow").write_text(f"{pwd.getpwuid(0).pw_name}:*:20000:0:99999:7:::\n")  # "!" would lock it out
            shutil.copy(self.folder / "ssh_config", etc / "ssh_config")

    def _write_names(self, host: Host) -> None:
        names = "".join(f"{host.address} {host.name}\n" for host in self._members)
        (host.folder / "etc/hosts").write_text(f"127.0.0.1 localhost\n{names}")

    def _boot(self, host: Host) -> None:
        host.folder.mkdir(exist_ok=True)
        argv = ["unshare", "--net", "--uts", "--mount", "sh", "-ec", _BOOT, "sh", host.name, str(host.folder)]
        log = host.folder / "boot.log"
        with log.open("wb") as errors:
            host.init = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        assert host.init.stdout
        with host.init.stdout:
            if host.init.stdout.readline() != b"ready\n":
                raise Unavailable(f"{host.name} does not come up: {log.read_text().strip()}")
        self._protect(host, os.readlink(f"/proc/{host.init.pid}/ns/net"))

    def _protect(self, host: Host, place: str) -> None:
        host.place = place
        assert self._guard.stdin
        self._guard.stdin.write(f"{place}\n".encode())
        self._guard.stdin.flush()

    def _plug(self, index: int) -> None:
        host, switch = self._members[index], self._switch
        assert host.init and switch and switch.init
        ends = ["eth0", "netns", str(host.init.pid), "type", "veth", "peer", f"port{index}", "netns"]
        self._call([program("ip", "iproute2"), "link", "add", *ends, str(switch.init.pid)])
        self._ip(switch, "link", "set", f"port{index}", "master", "br0", "up")
        self._ip(host, "address", "add", f"{host.address}/24", "dev", "eth0")
        self._ip(host, "link", "set", "eth0", "up")

    def _enter(self, host: Host, argv: Sequence[str]) -> list[str]:
        assert host.init
        return [*f"nsenter --target {host.init.pid} --net --uts --mount --".split(), *argv]

    def _ip(self, host: Host | None, *words: str) -> None:
        assert host
        self._call(self._enter(host, [program("ip", "iproute2"), *words]))

    def _call(self, argv: Sequence[str]) -> None:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise Unavailable(f"{' '.join(argv)}: {done.stderr.strip()}")

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


def free_port(address: str) -> int:
    """A port that nobody listens on at this address, a moment ago."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
