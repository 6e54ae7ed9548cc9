"""What the watchdog records of real gloo groups, and which ranks it calls slow."""

import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as torch_dist

from megatron_lite.distributed import comm
from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.mesh import build_mesh, limit_waits, solo_mesh
from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.training.watchdog import Stragglers, Watchdog, flight_record


def one_rank_stays_out(rank: int, size: int) -> tuple[dict, float]:
    """Rank 1 does not come to the tensor-parallel group's third collective, the one of a layer's backward."""
    torch_dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    mesh = build_mesh({"dp_shard": 2, "tp": 2}, torch.device("cpu"))
    assert mesh is not None
    limit_waits(1.0)
    for axis in (mesh.world, mesh.tp, mesh.data, mesh.tp.of("blocks.0")):
        comm.all_reduce(torch.ones(3), axis)
    began = time.monotonic()
    if rank != 1:
        try:
            weight = torch.ones(5, requires_grad=True)
            comm.copy_to(weight, mesh.tp.of("blocks.1.out")).sum().backward()
        except RuntimeError:
            waited, record = time.monotonic() - began, flight_record(mesh, failed=True)
            return record, waited
    time.sleep(2)
    return flight_record(mesh), 0.0


def test_a_record_tells_group_number_and_layer_of_what_a_rank_waits_in() -> None:
    (zero, waited), (one, _), (two, _), _ = run_ranks(one_rank_stays_out, 4)
    (open_call,) = [call for call in zero["collectives"] if not call["done"]]
    facts = {"op": "all_reduce", "sizes": [[5]], "layer": "blocks.1.out", "backward": True, "number": 3}
    assert facts.items() <= open_call.items()
    group = zero["groups"][open_call["group"]]
    assert group == {"axis": "tp", "ranks": [0, 1]}
    assert one["entered"][open_call["group"]] == 2
    assert all(call["done"] for call in one["collectives"] + two["collectives"])
    assert 0.9 < waited < 5, "the groups of a mesh would wait for torch's 30 minutes"


def test_a_stall_is_recorded_and_forgotten_when_it_was_none(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, Rank(rank=3), solo_mesh(), hang_timeout=0.2)
    try:
        watchdog.watch(7)
        deadline = time.monotonic() + 10
        while not watchdog.path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert '"step": 7' in (record := watchdog.path.read_text())
        assert "test_a_stall_is_recorded" in record
        watchdog.hang_timeout = 60
        watchdog.watch(8)
        while watchdog.path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        watchdog.close()
    assert "test_a_stall_is_recorded" in (tmp_path / "rank_3.stacks.txt").read_text()


def test_one_rank_is_slow_only_when_it_stays_so() -> None:
    stragglers = Stragglers(["a", "a", "b", "b"])
    even, uneven, little = [0.9, 1.0, 1.1, 1.0], [0.9, 1.0, 1.1, 2.4], [0.02, 0.02, 0.02, 0.1]
    said = [stragglers.add(busy, 3.0 * i) for i, busy in enumerate([uneven, uneven, even, uneven, little, little])]
    assert not any(said)
    said = [stragglers.add(uneven, 3.0 * i) for i in range(6, 10)]
    assert said == [
        "",
        "rank 3 (b) is slow, 2.4 times the median rank: it works 80% of the time, the median rank 33%; the others wait",
        "",
        "",
    ]
    assert [bool(stragglers.add(uneven, 3000.0 + 3 * i)) for i in range(4)] == [False, False, True, False]
