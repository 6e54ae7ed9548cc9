"""The doctor's program on each host: ``python -m launch.doctor.facts``, started through ssh.

It reads requests from stdin, one line of JSON each (``{"ask": "facts", …}``), and answers each with a line of JSON on
stdout. It ends when stdin closes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import resource
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

from launch.hosts import network
from launch.hosts.hostfile import UsageError
from launch.hosts.rendezvous import listen

PACKAGES = ("torch", "deepspeed", "megatron_lite")  # their versions are compared
LIMITS = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK, "nproc": resource.RLIMIT_NPROC}
MARKER = "marker"
_NAMES_S = 8.0  # time limit of name resolution


@dataclass(frozen=True)
class Peer:
    """How one host sees another: the addresses of its name, the reverse name of the first, the interface used."""

    addresses: list[str] = field(default_factory=list)
    name: str = ""
    interface: str = ""


@dataclass(frozen=True)
class Facts:
    """One host's answer. ``began`` and ``ended``: Unix time before and after measuring; sizes in bytes."""

    hostname: str
    own_address: str
    python: str
    executable: str
    versions: dict[str, str | None]
    code: str
    cores: int
    gpus: int
    rdma: bool
    shm_free: int
    shm_size: int
    limits: dict[str, int]  # -1: unlimited
    threads: int
    peers: dict[str, Peer]
    speeds: dict[str, int]  # Mbit/s of each interface, 0 where unknown
    folder: str  # what is wrong with the run's folder here
    began: float
    ended: float


def facts(names: Iterable[str], folder: str, own: str, secret: str, visible: str | None) -> dict[str, Any]:
    """All facts, including how this host sees the hosts ``names``; writes ``secret`` to the file ``own`` in
    ``folder``."""
    began = time.time()
    memory = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    found = Facts(
        hostname=socket.gethostname(),
        own_address=_in_time({"": network.own_address}, "127.0.0.1")[""],
        python=platform.python_version(),
        executable=sys.executable,
        versions={name: _version(name) for name in PACKAGES},
        code=_code(),
        cores=len(os.sched_getaffinity(0)),
        gpus=_gpus(visible),
        rdma=any(Path("/sys/class/infiniband").glob("*")),
        shm_free=memory.f_bavail * memory.f_frsize if memory else 0,
        shm_size=memory.f_blocks * memory.f_frsize if memory else 0,
        limits={name: resource.getrlimit(number)[0] for name, number in LIMITS.items()},
        threads=_threads(),
        peers=_in_time({name: partial(_peer, name) for name in names}, Peer()),
        speeds={interface: network.speed(interface) for interface in network.addresses()},
        folder=_use(Path(folder), own, secret),
        began=began,
        ended=time.time(),
    )
    return asdict(found)


def _in_time(tasks: Mapping[str, Callable[[], Any]], otherwise: Any) -> dict[str, Any]:
    """The results of all tasks, run in parallel threads; ``otherwise`` for one that takes too long."""
    results: dict[str, Any] = {}

    def run(name: str) -> None:
        results[name] = tasks[name]()

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in tasks]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _NAMES_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {name: results.get(name, otherwise) for name in tasks}


def _peer(name: str) -> Peer:
    found = network.resolve(name)
    back = ""
    if found:
        with contextlib.suppress(OSError):
            back = socket.getnameinfo((found[0], 0), socket.NI_NAMEREQD)[0]
    return Peer(found, back, network.interface_toward(name))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _code() -> str:
    """A digest of the code that ranks would run: the packages that Python finds from here, without importing them."""
    digest = hashlib.sha256()
    for package in ("launch", "megatron_lite"):
        spec = util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(filter(Path.is_file, Path(root).rglob("*.py"))):  # skips dangling links, editors' locks
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _gpus(visible: str | None) -> int:
    """How many GPUs ranks may use: NVIDIA or AMD devices that CUDA_VISIBLE_DEVICES leaves visible."""
    nvidia = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    amd = [node for node in nodes if node.read_text().strip() not in ("", "0")]
    return left_visible(len(nvidia) or len(amd), visible)


def left_visible(gpus: int, visible: str | None) -> int:
    """How many of ``gpus`` GPUs (or MIG parts) CUDA_VISIBLE_DEVICES leaves visible. The list ends at the first word
    that names no GPU, such as ``-1`` or Slurm's ``NoDevFiles``."""
    if visible is None or not gpus:
        return gpus

    def names_one(word: str) -> bool:
        return word.startswith(("GPU-", "MIG-")) or (word.isdecimal() and int(word) < gpus)

    return len(list(itertools.takewhile(names_one, map(str.strip, visible.split(",")))))


def _threads() -> int:
    """The number of threads of this user, which the limit ``nproc`` counts."""
    count = 0
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and entry.stat().st_uid == os.getuid():
                count += len(list((entry / "task").iterdir()))
    return count


def _use(folder: Path, own: str, secret: str) -> str:
    """Read the doctor's marker in ``folder`` and write a file; returns what went wrong, or an empty string."""
    try:
        if (folder / MARKER).read_text() != secret:
            return "shows other files"
        (folder / own).write_text(secret)
    except FileNotFoundError:
        return "is not the same folder"
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    return ""


def serve(port: int, secret: str) -> dict[str, Any]:
    """Listen on ``port`` (0: a free one) until this program ends, answering every connection with ``secret``."""
    listener = listen(port)

    def answer() -> None:
        while True:
            with contextlib.suppress(OSError):
                caller, _ = listener.accept()
                with caller:
                    caller.sendall(secret.encode())

    threading.Thread(target=answer, daemon=True).start()
    return {"port": listener.getsockname()[1]}


def connect(to: Mapping[str, tuple[str, int]], secret: str, timeout: float) -> dict[str, str]:
    """Connect to the address and port of every host; returns the error of each, empty if it answered."""
    return _in_time({name: partial(_call, *place, secret, timeout) for name, place in to.items()}, "timed out")


def _call(address: str, port: int, secret: str, timeout: float) -> str:
    try:
        with socket.create_connection((address, port), timeout) as call:
            heard = call.recv(256)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "" if heard == secret.encode() else "something else answers there"


ANSWERS: dict[str, Callable[..., dict[str, Any]]] = {"facts": facts, "serve": serve, "connect": connect}


def main() -> None:
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            answer = ANSWERS[request.pop("ask")](**request)
        except (UsageError, OSError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def new_secret() -> str:
    """A random token that identifies the files and answers of this examination."""
    return secrets.token_hex(16)


if __name__ == "__main__":
    main()
