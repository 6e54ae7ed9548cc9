"""Which network interface leads to other hosts, and when ranks must be told to use it.

gloo listens on the first address of this machine that its host name resolves to. If /etc/hosts says ``127.0.1.1 NAME``
(Debian's installer writes that), or the name does not resolve, this is a loopback address, which other hosts cannot
reach.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

HOSTS = "MLITE_HOSTS"  # names of hosts of the job, separated by commas; the rendezvous host comes first
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFCONF, _IFREQ = 0x8912, 40  # <linux/sockios.h>, and the size of an ifreq on 64-bit machines


def interface_env(given: Mapping[str, str]) -> dict[str, str]:
    """The ``VARIABLES`` that a rank of a multi-host job needs on this host and the user has not set."""
    missing = [name for name in VARIABLES if name not in given]
    names = [name for name in given.get(HOSTS, "").split(",") if name]
    if not names or not missing or not is_loopback(own_address()):
        return {}
    # On the first host its own name may lead to loopback; the second host's name then shows the interface.
    interface = next(filter(None, map(interface_toward, names)), "")
    return dict.fromkeys(missing, interface) if interface else {}


def own_address() -> str:
    """The address that gloo binds to by default; loopback if the host's name does not resolve to a better one."""
    mine = {address for listed in addresses().values() for address in listed}
    for address in resolve(socket.gethostname()):
        if address in mine or is_loopback(address):
            return address
    return "127.0.0.1"


def interface_toward(name: str) -> str:
    """The interface through which packets to ``name`` leave this host; empty if they do not, or there is no route."""
    for address in resolve(name):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # connecting a datagram socket sends nothing
            source = probe.getsockname()[0]
            for interface, listed in addresses().items():
                if source in listed and not is_loopback(source):
                    return interface
    return ""


def resolve(name: str) -> list[str]:
    """The addresses of ``name``, the preferred ones first; empty if it does not resolve."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def addresses() -> dict[str, list[str]]:
    """The addresses of each interface that is up."""
    found: dict[str, list[str]] = {}
    buffer = array.array("B", bytes(_IFREQ * 1024))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        place = struct.pack("iP", len(buffer), buffer.buffer_info()[0])
        (filled,) = struct.unpack_from("i", fcntl.ioctl(query, _SIOCGIFCONF, place))
    for start in range(0, filled, _IFREQ):
        label = bytes(buffer[start : start + 16]).split(b"\0")[0].decode()  # eth0:1 is a second address of eth0
        found.setdefault(label.partition(":")[0], []).append(socket.inet_ntoa(bytes(buffer[start + 20 : start + 24])))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            number, *_, interface = line.split()
            found.setdefault(interface, []).append(str(ipaddress.IPv6Address(int(number, 16))))
    return found


def speed(interface: str) -> int:
    """The link speed in Mbit/s; 0 if the driver does not report one (virtual machines, loopback)."""
    try:
        return max(0, int(Path(f"/sys/class/net/{interface}/speed").read_text()))
    except (OSError, ValueError):
        return 0
