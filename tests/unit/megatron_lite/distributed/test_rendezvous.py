"""Ranks that are not alike, told in one line."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.rendezvous import compare, meet, port_owner, shared_gpu
from megatron_lite.errors import ConfigError, MegatronLiteError, PeerError
from tests.kit.hosts import free_port


def ranks(**changed: dict[int, str]) -> list[dict[str, str]]:
    """Eight ranks on two hosts; ``changed``: what some of them have instead."""
    usual = {"python": "3.11.2", "torch": "2.13.0", "optim.lr": "0.01"}
    there = [{"host": f"node{rank // 4}", **usual} for rank in range(8)]
    for name, values in changed.items():
        for rank, value in values.items():
            there[rank][name.replace("__", ".")] = value
    return there


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, ""),
        ({"torch": {3: "2.12.0"}}, "rank 3 (node0) runs torch 2.12.0, the other 7 ranks 2.13.0"),
        ({"torch": {0: "2.12.0"}}, "rank 0 (node0) runs torch 2.12.0, the other 7 ranks 2.13.0"),
        (
            {"torch": dict.fromkeys(range(4, 8), "2.12.0")},
            "ranks 4, 5, 6, 7 (node1) run torch 2.12.0, the other 4 ranks 2.13.0",
        ),
        (
            {"torch": {3: "2.12.0", 5: "2.11.0"}},
            "rank 3 (node0) runs torch 2.12.0; rank 5 (node1) runs torch 2.11.0, the other 6 ranks 2.13.0",
        ),
        ({"optim__lr": {6: "0.1"}}, "rank 6 (node1) has optim.lr=0.1, the other 7 ranks 0.01"),
        ({"deepspeed": {6: "0.19"}}, "rank 6 (node1) runs deepspeed 0.19, the other 7 ranks nothing"),
    ],
)
def test_the_odd_ranks_are_named(changed: dict, line: str) -> None:
    assert compare(ranks(**changed)) == line


def test_no_two_ranks_have_one_gpu() -> None:
    own = {rank: f"GPU-{rank}" for rank in range(8)}
    assert compare(ranks(device=own)) == shared_gpu(ranks(device=own)) == shared_gpu(ranks()) == ""
    shared = shared_gpu(ranks(device={**own, 6: "GPU-5"}))
    assert shared.startswith("ranks 5, 6 (node1) were given one GPU (GPU-5); start one rank for each")


def test_who_listens_on_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert port_owner(server.getsockname()[1]).startswith(f"pid {os.getpid()} (")


def of_two(number: int, port: int, job: str = "x", address: str = "127.0.0.1") -> Rank:
    return Rank(number, 2, job=job, launcher="the environment", rendezvous=(address, port))


@pytest.mark.parametrize("number", [0, 1])
def test_a_place_that_does_not_resolve_is_named_at_once(number: int) -> None:
    with pytest.raises(ConfigError, match=rf"rank {number} .* cannot resolve no\.such\.host, where ranks meet"):
        meet(of_two(number, 29500, address="no.such.host"), {}, 60)


def test_a_rank_that_waits_in_vain_says_for_whom() -> None:
    port = free_port("127.0.0.1")
    with pytest.raises(PeerError, match=rf"nobody answered at 127.0.0.1, port {port}, for 0.2 s \(Connection refused"):
        meet(of_two(1, port), {}, 0.2)


def test_a_rank_that_comes_again_waits_for_the_end_of_those_it_has_left() -> None:
    port = free_port("127.0.0.1")
    with ThreadPoolExecutor() as pool:
        first, second = (pool.submit(meet, of_two(number, port), {"a.b": "1"}, 20) for number in (0, 1))
        (held, hosts), (_, nothing) = first.result(30), second.result(30)
        assert (len(hosts), nothing) == (2, [])
        with pytest.raises(ConfigError, match=r"rank 1 .* of job y came to the rendezvous of job x"):
            meet(of_two(1, port, "y"), {}, 20)
        again = pool.submit(meet, of_two(1, port), {"a.b": "1"}, 20)
        with pytest.raises(TimeoutError):
            again.result(0.5)
        del first, held  # the store goes with rank 0
        with pytest.raises(MegatronLiteError, match="ended while rank 1 waited there"):
            again.result(20)
