"""The rendezvous: before any process group is created, the ranks compare what they run, over the launcher's store.

All messages are JSON under ``mlite/…``: each rank writes its identity, rank 0 compares them and writes the verdict.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as torch_dist

from megatron_lite.distributed.env import Rank
from megatron_lite.errors import ConfigError, PeerError

_OWN = ("host", "device")  # keys that may differ between ranks
_KNOCK_S = 5.0  # timeout of one attempt to connect; afterwards a rank reports that it waits
_LINGER_S = 5.0  # rank 0 may host the store: it stays this long so that others can read a bad verdict


def meet(rank: Rank, identity: Mapping[str, str], timeout_seconds: float) -> tuple[torch_dist.Store, list[str]]:
    """Wait for all ranks and compare them. Returns the job's store and, on rank 0, every rank's host.

    ``identity``: values that must be equal on all ranks, under names that fit into ``runs NAME VALUE`` (a name with a
    dot is a config key), and ``device``, a GPU that no other rank may have. Raises ConfigError on every rank if one
    differs; on a rank of another job, or one that cannot resolve the address; and if the store's port is taken. Raises
    PeerError if a rank does not arrive in time or the store disappears.
    """
    limit = timedelta(seconds=timeout_seconds)
    address, port = rank.rendezvous or agree_by_mpi(rank)
    place = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"rank {rank.rank} ({rank.host}) cannot resolve {address}, where ranks meet (MASTER_ADDR): "
            f"{getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        store = _open(rank, address, port, limit)
        theirs = store.compare_set("mlite/job", "", rank.job or "-") if rank.rank == 0 else store.get("mlite/job")
        if theirs.decode() != (rank.job or "-"):
            raise ConfigError(
                f"rank {rank.rank} ({rank.host}) of job {rank.job or '-'} came to the rendezvous of job "
                f"{theirs.decode()}, port {port}; give each job a port of its own (MASTER_PORT)"
            )
        # A store may outlive its ranks. Restarted ranks therefore meet under the number of their start, where a rank
        # that restarts before the others have ended waits for them.
        store = torch_dist.PrefixStore(f"meeting {store.add(f'mlite/came/{rank.rank}', 1)}", store)
        return store, _compare(store, rank, identity, limit)
    except torch_dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise PeerError(f"the rendezvous at {place} ended while rank {rank.rank} waited there") from None
        raise ConfigError(
            f"port {port} of {rank.host} is in use by {port_owner(port)}; choose another MASTER_PORT"
        ) from None
    except torch_dist.DistStoreError:
        raise PeerError(
            f"rank {rank.rank} waited {timeout_seconds:g} s for the others at the rendezvous {place}"
        ) from None


def _open(rank: Rank, address: str, port: int, limit: timedelta) -> torch_dist.Store:
    """Connect to the store of the launcher or of rank 0's process. Raises PeerError if nobody listens in time."""
    if rank.rank != 0 or rank.launcher == "torchrun":
        _wait_for_listener(rank, address, port, limit.total_seconds())
    if rank.launcher == "torchrun":  # torchrun already hosts a store
        store = next(torch_dist.rendezvous("env://", rank.rank, rank.size, timeout=limit))[0]
    else:
        store = torch_dist.TCPStore(
            address, port, rank.size, is_master=rank.rank == 0, timeout=limit, wait_for_workers=False
        )
    store.set_timeout(limit)
    return store


def _wait_for_listener(rank: Rank, address: str, port: int, seconds: float) -> None:
    began, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((address, port), timeout=_KNOCK_S).close()
            return
        except OSError as error:
            waited, reason = time.monotonic() - began, error.strerror or str(error)
        if waited > seconds:
            raise PeerError(
                f"rank {rank.rank} ({rank.host}): nobody answered at {address}, port {port}, for {seconds:g} s "
                f"({reason})"
            )
        if waited > _KNOCK_S and not told:
            print(f"rank {rank.rank} waits for rank 0 at {address}, port {port}: {reason}", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1)


def _compare(store: torch_dist.Store, rank: Rank, identity: Mapping[str, str], limit: timedelta) -> list[str]:
    """Write this rank's identity; rank 0 compares all and returns every rank's host, others read the verdict."""
    store.set(f"mlite/{rank.rank}", json.dumps({"host": rank.host, **identity}))
    if rank.rank == 0:
        return _judge(store, rank.size, limit)
    kind, message = json.loads(store.get("mlite/verdict"))
    if store.add("mlite/read", 1) == rank.size - 1:
        store.set("mlite/read by all", "")
    if message:
        raise (ConfigError if kind == "config" else PeerError)(message)
    return []


def agree_by_mpi(rank: Rank) -> tuple[str, int]:
    """Broadcast rank 0's address and a free port over MPI. Raises ConfigError without a matching mpi4py."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"started by {rank.launcher}, and mpi4py does not load ({error}): pip install 'megatron_lite[mpi]', "
            "or set MASTER_ADDR and MASTER_PORT"
        ) from None
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (rank.rank, rank.size):
        raise ConfigError(
            f"{rank.launcher} says rank {rank.rank} of {rank.size}, mpi4py rank {world.rank} of {world.size}: it loads "
            f"another MPI ({MPI.Get_library_version().split(',')[0]}); set MPI4PY_LIBMPI to the libmpi of your mpirun"
        )
    with socket.socket() as listener:
        listener.bind(("", 0))
        mine = (socket.gethostname(), listener.getsockname()[1]) if rank.rank == 0 else None
        address, port = world.bcast(mine)
        hosts = world.allgather(rank.host)
    return ("127.0.0.1" if len(set(hosts)) == 1 else str(address)), int(port)


def _judge(store: torch_dist.Store, size: int, limit: timedelta) -> list[str]:
    keys = [f"mlite/{rank}" for rank in range(size)]
    error: ConfigError | PeerError | None = None
    identities: list[dict[str, str]] = []
    try:
        store.wait(keys, limit)
        identities = [json.loads(store.get(key)) for key in keys]
        if message := compare(identities) or shared_gpu(identities):
            error = ConfigError(message)
    except torch_dist.DistStoreError:
        missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
        error = PeerError(f"rank {missing} did not come to the rendezvous within {limit.total_seconds():g} s")
    kind = "config" if isinstance(error, ConfigError) else "peer"
    store.set("mlite/verdict", json.dumps([kind, str(error or "")]))
    if error is None:
        return [identity["host"] for identity in identities]
    with contextlib.suppress(torch_dist.DistStoreError):
        store.wait(["mlite/read by all"], timedelta(seconds=_LINGER_S))
    raise error


def compare(identities: Sequence[Mapping[str, str]]) -> str:
    """The first difference between ranks, as one line that names the deviating ranks; empty if they are equal.

    The majority is taken as correct; in a tie, rank 0 is.
    """
    names = list(dict.fromkeys(name for identity in identities for name in identity if name not in _OWN))
    for name in names:
        values = [identity.get(name, "nothing") for identity in identities]
        if len(set(values)) == 1:
            continue
        counts = Counter(values)  # in rank order; most_common keeps this order for ties
        usual = counts.most_common(1)[0][0]
        verbs = ("has", "have") if "." in name else ("runs", "run")
        told = []
        for value in counts:
            ranks = [rank for rank, theirs in enumerate(values) if theirs == value]
            hosts = ", ".join(dict.fromkeys(identities[rank]["host"] for rank in ranks))
            who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} ({hosts}) {verbs[len(ranks) > 1]}"
            if value != usual:
                told.append(f"{who} {name}={value}" if "." in name else f"{who} {name} {value}")
        others = counts[usual]
        return f"{'; '.join(told)}, the other {f'{others} ranks' if others > 1 else 'rank'} {usual}"
    return ""


def shared_gpu(identities: Sequence[Mapping[str, str]]) -> str:
    """The first GPU that several ranks would use, as one line that names them; empty if each rank has its own."""
    users: dict[str, list[int]] = {}
    for rank, identity in enumerate(identities):
        if device := identity.get("device"):
            users.setdefault(device, []).append(rank)
    for device, ranks in users.items():
        if len(ranks) > 1:
            return (
                f"ranks {', '.join(map(str, ranks))} ({identities[ranks[0]]['host']}) were given one GPU ({device}); "
                "start one rank for each, or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
    return ""


def port_owner(port: int) -> str:
    """The process that listens on a TCP port of this host, if this user may see it: ``pid N (command)``."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(fd.readlink()) in inodes for fd in (process / "fd").iterdir()):
                return f"pid {process.name} ({(process / 'comm').read_text().strip()})"
    return "a process of another user"
