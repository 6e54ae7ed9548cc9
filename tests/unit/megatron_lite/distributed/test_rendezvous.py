"""Ranks that are not alike, told in one line."""

import os
import socket

import pytest

from megatron_lite.distributed.rendezvous import compare, port_owner, shared_gpu


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
