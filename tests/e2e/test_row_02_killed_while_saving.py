"""FAULTS row 2: killed in the middle of a save, at every point of it: shards, manifest, rename, ``latest``."""

from pathlib import Path

import pytest

from megatron_lite.dist.spawn import run_ranks
from megatron_lite.errors import PeerError
from megatron_lite.faults import Faults
from tests.kit.pieces import OperationLog, commit, names, ready, resume
from tests.kit.tiny import TinyRuns, assert_same_run


def saves(rank: int, size: int, folder: Path, faults: str) -> None:
    commit(folder, 2, rank, size, Faults.parse(faults, rank))


def killed(folder: Path, size: int, victim: int, point: int) -> None:
    """A save of step 2 after that of step 1, in which one rank dies at its n-th file operation."""
    with pytest.raises(PeerError):
        run_ranks(saves, size, folder, f"kill:rank={victim}:step=2:op={point}", timeout=20)


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


def test_at_every_file_operation(tmp_path: Path) -> None:
    log = OperationLog()
    commit(ready(tmp_path / "counted", 1), 2, faults=log)
    pointed = log.names.index("replace latest") + 1
    assert len(log.names) > 15
    for point in range(1, len(log.names) + 1):
        folder = ready(tmp_path / str(point), 1)
        killed(folder, 1, 0, point)
        assert_recovered(folder, committed=point > pointed)  # a fault strikes just before its operation


@pytest.mark.parametrize(("victim", "point"), [(0, 1), (1, 1), (1, 2), (0, 4)])
def test_one_of_two_ranks(tmp_path: Path, victim: int, point: int) -> None:
    folder = ready(tmp_path / "checkpoints", 1)
    killed(folder, 2, victim, point)
    assert_recovered(folder, committed=False)


def test_a_real_run_goes_on_from_the_checkpoint_before(tiny: TinyRuns, tmp_path: Path) -> None:
    result = tiny.run(tmp_path, "--max_restarts=1", faults="kill:rank=0:step=6:op=7").expect(exit_code=0)
    assert "step_00000003" in result.stdout
    assert_same_run(tmp_path / "run", tiny.reference)
