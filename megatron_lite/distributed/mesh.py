"""The mesh: which ranks communicate with which. Axes, outermost first: pp, dp_replicate, dp_shard, cp, tp.

``Axis`` is all that layers and engines see of the distributed world: a rank, a size and a process group.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.rendezvous import meet
from megatron_lite.errors import ConfigError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Axis:
    """One line of ranks. At size 1 there is no group and every collective along it is the identity.

    ``layer``: the layer that this copy of the axis belongs to. ``calls``: the last collectives started along the axis,
    from any copy: their number in the process group, the layer, and whether in backward.
    """

    name: str
    rank: int = 0
    size: int = 1
    group: torch_dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    layer: str = field(default="", compare=False)
    calls: deque[tuple[int, str, bool]] = field(default_factory=lambda: deque(maxlen=256), repr=False, compare=False)

    def of(self, layer: str) -> Axis:
        """A copy of this axis for one layer, whose name is recorded with its collectives."""
        return replace(self, layer=layer)

    def note(self) -> None:
        """Record that a collective is about to start, so that a hang can be attributed to a layer. Under a
        microsecond."""
        group: Any = self.group
        backward = torch._C._current_graph_task_id() >= 0  # type: ignore[attr-defined]
        self.calls.append((group._get_sequence_number_for_group() + 1, self.layer, backward))


@dataclass(frozen=True)
class Mesh:
    """The axes through this rank; ``world`` contains every rank.

    ``data``: dp_replicate × dp_shard × cp, the ranks that have different tokens: losses, counts and gradients are
    summed over it. ``dp``: dp_replicate × dp_shard, who reads which samples; without a group, as nobody talks along it.
    """

    world: Axis
    pp: Axis
    dp_replicate: Axis
    dp_shard: Axis
    cp: Axis
    tp: Axis
    dp: Axis
    data: Axis
    device: torch.device
    device_mesh: DeviceMesh | None = field(default=None, repr=False, compare=False)

    @property
    def copies(self) -> int:
        """How many ranks hold the same loss: the sum over the world ÷ this is the sum over ``data``."""
        return self.tp.size

    def axis(self, name: str) -> Axis:
        """The axis that a ``ShardSpec`` names."""
        axis: Axis = getattr(self, name)
        return axis


def solo_mesh(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of a single process, without any process group."""
    axes: dict[str, Any] = {name: Axis(name) for name in ("world", *AXES, "dp", "data")}
    return Mesh(**axes, device=torch.device(device))


def build_mesh(degrees: Mapping[str, int], device: torch.device, ranks: Sequence[int] | None = None) -> Mesh | None:
    """Make the process groups of a mesh with the given degrees (missing axes are 1).

    ``ranks`` (default: all) are the members; other ranks take part in creating the groups and get None. Collective over
    the default process group: every rank must call it, in the same order.
    """
    sizes = [degrees.get(name, 1) for name in AXES]
    world = torch_dist.get_world_size() if torch_dist.is_initialized() else 1
    members = list(range(world)) if ranks is None else list(ranks)
    grid = torch.tensor(members).view(sizes)
    if world == 1:
        return solo_mesh(device)
    device_mesh = DeviceMesh(device.type, grid, mesh_dim_names=AXES)
    data_lines = grid.permute(0, 4, 1, 2, 3).reshape(-1, math.prod(sizes[1:4])).tolist()
    data_axes = [name for name, size in zip(AXES[1:4], sizes[1:4], strict=True) if size > 1]
    data_group = None
    if len(data_axes) > 1:
        data_group, _ = torch_dist.new_subgroups_by_enumeration(data_lines)
    world_group = torch_dist.group.WORLD if len(members) == world else torch_dist.new_group(members)
    here = torch_dist.get_rank()
    if here not in members:
        return None

    def axis(name: str) -> Axis:
        line = device_mesh[name]
        if line.size() == 1:
            return Axis(name)
        return Axis(name, line.get_local_rank(), line.size(), line.get_group())

    axes = {name: axis(name) for name in AXES}
    line = next(line for line in data_lines if here in line)
    group = axes[data_axes[0]].group if len(data_axes) == 1 else data_group
    data = Axis("data" if sizes[3] > 1 else "dp", line.index(here), len(line), group)
    dp = Axis("dp", data.rank // sizes[3], data.size // sizes[3])
    everyone = Axis("world", members.index(here), len(members), world_group if len(members) > 1 else None)
    return Mesh(world=everyone, **axes, dp=dp, data=data, device=device, device_mesh=device_mesh)


def pick_device(rank: Rank) -> torch.device:
    """The device of this rank: its own GPU if there is one, else the CPU. Raises ConfigError as ``gpu_index`` does."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", gpu_index(torch.cuda.device_count(), rank))
    torch.cuda.set_device(device)
    return device


def gpu_index(visible: int, rank: Rank) -> int:
    """The index of a rank's GPU among those it sees: the only one (Slurm and others may give each task its own), else
    that of its local rank. The rendezvous checks that no two ranks share a GPU.

    Raises ConfigError if it sees several GPUs, but fewer than its host has ranks.
    """
    if visible == 1:
        return 0
    if visible < rank.local_size:
        raise ConfigError(
            f"{rank.local_size} ranks were started on {rank.host}, where this one sees {visible} GPUs; start at most "
            f"{visible} there, let each see its own alone, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    return rank.local_rank


def _gpu_identity(device: torch.device) -> dict[str, str]:
    """An identifier of this rank's GPU that is unique across hosts; MIG parts are identified by the driver only."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {} if "MIG" in properties.name else {"device": str(getattr(properties, "uuid", ""))}


def peer_failure(error: BaseException) -> bool:
    """Whether a collective failed because another rank died, hung or became unreachable."""
    if isinstance(error, (torch_dist.DistBackendError, torch_dist.DistNetworkError, torch_dist.DistStoreError)):
        return True
    # gloo reports all of these as RuntimeError; a test with a killed and a stopped peer checks the wording.
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Connection refused")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def limit_waits(seconds: float) -> None:
    """Set the timeout of every existing group: torch gives each new group its own 30 minutes, whatever the timeout of
    the default group."""
    for group in list(torch_dist.distributed_c10d._world.pg_map):
        group.set_timeout(timedelta(seconds=seconds))


@contextlib.contextmanager
def process_group(
    rank: Rank, device: torch.device, timeout_seconds: float, identity: Mapping[str, str] | None = None
) -> Iterator[list[str]]:
    """The default process group during a ``with`` block; none for a single process.

    Before it is created, the ranks check that they belong together (``rendezvous.meet``); yields every rank's host on
    rank 0. On CUDA, gloo runs beside NCCL, for data on the CPU (checkpoint plans, flags).
    """
    if rank.size == 1:
        yield [rank.host]
        return
    store, hosts = meet(rank, {**(identity or {}), **_gpu_identity(device)}, timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # No device_id: with one, torch splits the mesh's groups off and passes NCCL's options to gloo.
    torch_dist.init_process_group(
        backend,
        store=store,
        rank=rank.rank,
        world_size=rank.size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        yield hosts
    except BaseException:
        # Peers may be gone: destroying the group could block, and the process is about to end anyway.
        raise
    else:
        torch_dist.destroy_process_group()
