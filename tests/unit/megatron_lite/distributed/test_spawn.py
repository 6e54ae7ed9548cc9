"""What goes to the ranks of a world on this machine, and what comes back from them."""

import os

import pytest
import torch

from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.errors import DataError, PeerError


def _add(rank, size, tensor):
    assert not tensor.is_shared()
    return tensor + rank


def _refuse(rank, size):
    if rank == 1:
        raise DataError("not this")


def _fail(rank, size):
    if rank == 1:
        raise ValueError("a defect")


def _leave(rank, size):
    if rank == 1:
        os._exit(0)


def test_tensors_are_copied_and_outlive_who_made_them():
    # Shared memory would be gone with the rank, for whoever reads its answer late.
    answers = run_ranks(_add, 2, torch.arange(3))
    assert [answer.tolist() for answer in answers] == [[0, 1, 2], [1, 2, 3]]
    assert not any(answer.is_shared() for answer in answers)


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        (_refuse, DataError, "^not this$"),
        (_fail, PeerError, "(?s)rank 1 failed:.*ValueError: a defect"),
        (_leave, PeerError, "rank 1 ended without a result"),
    ],
)
def test_who_failed_is_told(function, error, text):
    with pytest.raises(error, match=text):
        run_ranks(function, 2)
