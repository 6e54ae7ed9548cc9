"""A world of ranks that outlives tests tells what failed in it, and is a new one for the next."""

import os
import signal
import time

import pytest
import torch

from megatron_lite.errors import ConfigError, PeerError


def total(rank: int, size: int, number: int) -> tuple[float, int]:
    tensor = torch.tensor(float(rank + number))
    torch.distributed.all_reduce(tensor)
    return tensor.item(), os.getpid()


def fails(rank: int, size: int) -> None:
    assert rank != 1, "a mistake in rank 1"
    torch.distributed.barrier()


def dies(rank: int, size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def refuses(rank: int, size: int) -> None:
    raise ConfigError("not with me")


def hangs(rank: int, size: int) -> None:
    time.sleep(60 * rank)


@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        (fails, PeerError, r"rank 1 failed:\n(?s:.*)a mistake in rank 1"),
        (dies, PeerError, r"rank 1 ended without a result|rank 0 failed"),
        (refuses, ConfigError, "not with me"),
        (hangs, PeerError, r"ranks \[1\] did not finish within 2 s"),
    ],
)
def test_what_fails_is_told_and_the_next_one_finds_ranks_again(pair, function, kind, said):
    before = pair.run(total, 3)
    assert before == pair.run(total, 3)  # in the same processes
    assert [value for value, _ in before] == [7.0, 7.0]
    with pytest.raises(kind, match=said):
        pair.run(function, timeout=2 if function is hangs else 60)
    after = pair.run(total, 4)
    assert [value for value, _ in after] == [9.0, 9.0]
    assert {pid for _, pid in before}.isdisjoint(pid for _, pid in after)
