"""How the hosts of ``tests.kit.cluster`` are made: namespaces, ssh servers, keys, and an ssh that knows them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.kit import guard
from tests.kit.jobs import MARK

SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PORT = 2222

# What a host's first process does before it sleeps: $1 its name, $2 its folder. /sys must be mounted anew to show the
# host's own network devices, and the cgroups in it brought along.
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
    """Why this machine cannot have such hosts, or such servers."""


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
    port: int  # of its ssh server
    folder: Path
    place: str = ""  # where ``guard`` finds its processes
    init: subprocess.Popen[bytes] | None = None  # holds the namespaces
    services: dict[str, Service] = field(default_factory=dict)

    @property
    def servers(self) -> list[int]:
        """The process ids of what makes it a host: its servers, and what holds the namespaces."""
        processes = [self.init, *(service.process for service in self.services.values())]
        return [process.pid for process in processes if process and process.poll() is None]

    def enter(self, argv: Sequence[str]) -> list[str]:
        """The command line that becomes ``argv`` in the namespaces."""
        assert self.init
        return [*f"nsenter --target {self.init.pid} --net --uts --mount --".split(), *argv]

    def ip(self, *words: str) -> None:
        """Run iproute2's ``ip`` on it."""
        call(self.enter([program("ip", "iproute2"), *words]))

    def wait(self) -> None:
        """Wait for all that makes it a host, killed by now."""
        for process in [self.init, *(service.process for service in self.services.values())]:
            if process:
                process.wait(timeout=10)


def program(name: str, package: str) -> str:
    """The path of a system program, /usr/sbin included."""
    if (path := shutil.which(name, path=SYSTEM_PATH)) is None:
        raise Unavailable(
            f"there is no {name}, which Debian has in the package {package}: "
            "tests/kit/install_system_packages.sh, run as root, installs it"
        )
    return path


def call(argv: Sequence[str]) -> None:
    """Run a command that sets something up."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise Unavailable(f"{' '.join(argv)}: {done.stderr.strip()}")


def eventually(condition: Callable[[], object], what: str, seconds: float = 15, every: float = 0.02) -> None:
    """Poll until ``condition()`` is true; fails with ``what`` was waited for after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(every)


def free_port(address: str) -> int:
    """A port that nobody listened on at this address, a moment ago."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def check_namespaces() -> None:
    """Raise ``Unavailable`` where namespaces cannot be had."""
    if sys.platform != "linux" or os.getuid() != 0:
        raise Unavailable("namespaces need root on Linux")
    program("ip", "iproute2")
    call(["unshare", "--net", "--uts", "--mount", "true"])


def describe(index: int, folder: Path, *, namespaces: bool, ipv6: bool = False) -> Host:
    """Host number ``index`` and its key."""
    if namespaces:
        address = f"fd77::{10 + index}" if ipv6 else f"10.77.0.{10 + index}"
        host = Host(f"node{index}", address, PORT, folder / f"node{index}")
    else:
        address = f"127.0.0.{1 + index}"
        host = Host(address, address, free_port(address), folder / address)
    host.folder.mkdir()
    make_key(host.folder / "host_key")
    return host


def make_key(path: Path) -> None:
    keygen = program("ssh-keygen", "openssh-client")
    call([keygen, "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)])


def write_client(folder: Path, hosts: Iterable[Host]) -> None:
    """ssh's config and the keys of all hosts, and in bin/ an ``ssh`` that uses them.

    ssh looks for its config where passwd says, whatever $HOME is; hence the shim.
    """
    known, config = "", ""
    for host in hosts:
        key = (host.folder / "host_key.pub").read_text().strip()
        names = sorted({host.name, host.address})
        known += "".join(f"[{name}]:{host.port} {key}\n" for name in names)
        config += f"Host {' '.join(names)}\n    Port {host.port}\n"
    config += f"""Host *
    IdentityFile {folder}/id
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    SendEnv {MARK}
"""
    (folder / "known_hosts").write_text(known)
    (folder / "ssh_config").write_text(config)
    shim = folder / "bin/ssh"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {program("ssh", "openssh-client")} -F {folder}/ssh_config "$@"\n')
    shim.chmod(0o755)


def write_server(folder: Path, host: Host) -> None:
    """sshd's config."""
    listen = host.address if host.name == host.address else "0.0.0.0"  # loopback hosts share an interface
    more = "ListenAddress ::" if ":" in host.address else ""
    (host.folder / "sshd_config").write_text(f"""
ListenAddress {listen}
{more}
Port {host.port}
HostKey {host.folder}/host_key
AuthorizedKeysFile {folder}/id.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
AcceptEnv {MARK}
SetEnv {guard.MARK}={host.folder}
""")


def write_etc(folder: Path, host: Host, hosts: Iterable[Host]) -> None:
    """The files that lie over those in a host's /etc; in place, so that hosts that are up see them, too."""
    etc = host.folder / "etc"
    etc.mkdir(exist_ok=True)
    names = "".join(f"{other.address} {other.name}\n" for other in hosts)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
    (etc / "shadow").write_text("root:*:20000:0:99999:7:::\n")  # "!", as some images have it, would lock root out
    shutil.copy(folder / "ssh_config", etc / "ssh_config")


def boot(host: Host) -> None:
    """Make a host's namespaces, its /etc and an empty /dev/shm."""
    host.folder.mkdir(exist_ok=True)
    argv = ["unshare", "--net", "--uts", "--mount", "sh", "-ec", _BOOT, "sh", host.name, str(host.folder)]
    log = host.folder / "boot.log"
    with log.open("wb") as errors:
        host.init = subprocess.Popen(
            argv,
            env={**os.environ, "PATH": SYSTEM_PATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert host.init.stdout
    with host.init.stdout:
        if host.init.stdout.readline() != b"ready\n":
            raise Unavailable(f"{host.name} does not come up: {log.read_text().strip()}")
    host.place = str(Path(f"/proc/{host.init.pid}/ns/net").readlink())


def plug(host: Host, switch: Host, port: str) -> None:
    """A cable from a host's eth0 to a port of the switch, and an address."""
    assert host.init and switch.init
    ends = ["eth0", "netns", str(host.init.pid), "type", "veth", "peer", port, "netns", str(switch.init.pid)]
    call([program("ip", "iproute2"), "link", "add", *ends])
    switch.ip("link", "set", port, "master", "br0", "up")
    if ":" in host.address:
        host.ip("address", "add", f"{host.address}/64", "dev", "eth0", "nodad")  # there at once: it is not probed
    else:
        host.ip("address", "add", f"{host.address}/24", "dev", "eth0")
    host.ip("link", "set", "eth0", "up")
