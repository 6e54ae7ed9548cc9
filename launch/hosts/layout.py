"""The placement of ranks on hosts and on the mesh, the same under every launcher: a check and a table."""

from __future__ import annotations

from collections.abc import Mapping

from launch.hosts.hostfile import Host, UsageError
from launch.hosts.job import Job

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # outermost first: tensor-parallel peers have adjacent ranks


def check_layout(hosts: tuple[Host, ...], tp: int, across: bool) -> None:
    """Refuse tensor-parallel groups that span hosts, unless ``across`` allows them. Raises UsageError."""
    first = 0
    for host in hosts:
        if (first % tp or host.slots % tp) and len(hosts) > 1 and not across:
            fits = [str(n) for n in range(1, tp) if all(h.slots % n == 0 for h in hosts)]
            raise UsageError(
                f"parallel.tp={tp} would span hosts: {host.name} has {host.slots} ranks; use tp {', '.join(fits)}, "
                "another number of slots, or --launch.tp_across_hosts=true"
            )
        first += host.slots


def coordinates(rank: int, mesh: Mapping[str, int]) -> dict[str, int]:
    """The coordinate of ``rank`` along every mesh axis of size above 1."""
    found = {}
    for axis in reversed(AXES):
        rank, found[axis] = divmod(rank, mesh.get(axis, 1))
    return {axis: found[axis] for axis in AXES if mesh.get(axis, 1) > 1}


def picture(job: Job, mesh: Mapping[str, int]) -> str:
    """A table: rank, node, host, local rank, device and mesh coordinates."""
    rows = [("rank", "node", "host", "local rank", "device", "mesh")]
    for place in job.places:
        chosen = place.host.devices
        device = place.local_rank if chosen is None else chosen[place.local_rank]
        at = " ".join(f"{axis}={n}" for axis, n in coordinates(place.rank, mesh).items())
        rows.append((str(place.rank), str(place.node), place.host.name, str(place.local_rank), str(device), at or "–"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
