"""Killed in the middle of a save, at every point of it: shards, manifest, rename, ``latest``."""

import os
import shutil
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as torch_dist

from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.training.faults import Faults
from tests.kit.pieces import OperationLog, commit, commit_beside, names, ready, resume
from tests.kit.tiny import TinyRuns, assert_same_run

SAVES = {"in front": commit, "beside training": commit_beside}


def save(rank: int, size: int, folder: Path, how: str, faults: Faults) -> None:
    """Step 2, by one rank of a world of its own."""
    if size > 1:
        store, limit = f"file://{folder}.store", timedelta(seconds=20)
        torch_dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
    SAVES[how](folder, 2, rank, size, faults)


def killed(_: int, __: int, folder: Path, how: str, ranks: int, victim: int, points: range) -> list[int]:
    """For each point a world of forked ranks, one of which dies there in a save of step 2 after that of step 1; what
    it ended with."""
    ends = []
    for point in points:
        children = []
        for rank in range(ranks):
            children.append(os.fork())
            if children[-1] == 0:
                try:
                    faults = Faults.parse(f"kill:rank={victim}:step=2:op={point}", rank)
                    save(rank, ranks, folder / str(point), how, faults)
                finally:
                    os._exit(0)
        ends.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children][victim])
    return ends


def operations(rank: int, size: int, folder: Path, how: str) -> list[str]:
    """The file operations of this rank in a save that nothing happens to."""
    log = OperationLog()
    SAVES[how](folder, 2, rank, size, log)
    return log.names


def assert_recovered(folder: Path, *, committed: bool) -> None:
    """A new start finds step 1, or 2 once ``latest`` said so; what was half done is gone, and saving works again."""
    found, _ = resume(folder)
    assert found is not None
    assert found.step == (2 if committed else 1)
    assert not [name for name in names(folder) if "tmp" in name or name.startswith(".")]
    commit(folder, 2)
    again, warnings = resume(folder)
    assert again is not None
    assert (again.step, warnings) == (2, [])


@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize(("ranks", "victim"), [(1, 0), (2, 1)], ids=["alone", "the other of two"])
def test_at_every_file_operation(tmp_path: Path, how: str, ranks: int, victim: int) -> None:
    before = ready(tmp_path / "before", 1)
    shutil.copytree(before, tmp_path / "counted")
    log = run_ranks(operations, ranks, tmp_path / "counted", how)[victim]
    assert len(log) > (5 if victim else 15)
    points = range(1, len(log) + 1)
    for point in points:
        shutil.copytree(before, tmp_path / str(point))
    ends = run_ranks(killed, 1, tmp_path, how, ranks, victim, points)[0]
    assert ends == [-signal.SIGKILL] * len(log)
    pointed = log.index("replace latest") + 1 if victim == 0 else len(log)
    for point in points:
        assert_recovered(tmp_path / str(point), committed=point > pointed)  # a fault strikes just before its operation


def test_a_real_run_goes_on_from_the_checkpoint_before(tiny: TinyRuns, tmp_path: Path) -> None:
    result = tiny.run(tmp_path, "--max_restarts=1", faults="kill:rank=0:step=6:op=7").expect(exit_code=0)
    assert "step_00000003" in result.stdout
    assert_same_run(tmp_path / "run", tiny.reference)
