"""The disk of one rank is full; no other rank waits for it."""

import time
from pathlib import Path

import pytest

from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.errors import StorageError
from megatron_lite.training.faults import Faults
from tests.kit.pieces import commit, names, ready, resume


def save(rank: int, size: int, folder: Path, faults: str) -> str:
    try:
        commit(folder, 2, rank, size, Faults.parse(faults, rank))
    except StorageError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(("victim", "point"), [(0, 1), (1, 1), (1, 3)])
def test_all_ranks_fail_alike(tmp_path: Path, victim: int, point: int) -> None:
    folder = ready(tmp_path / "checkpoints", 1)
    began = time.monotonic()
    told = run_ranks(save, 2, folder, f"enospc:rank={victim}:step=2:op={point}", timeout=30)
    assert time.monotonic() - began < 20
    assert told[0] == told[1]
    assert told[0].startswith("disk full: need ")
    assert told[0].endswith(f"at {folder} (rank {victim})")
    assert names(folder) == ["latest", "step_00000001"]
    found, _ = resume(folder)
    assert found is not None
    assert found.step == 1
